"""The page of data layouts: every listing is laid on disk, every command trains on it, and takes the images it says."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "layout.md"
FORM = re.compile(r"^## (.+?)\n(.*?)```text\n(.*?)```.*?```bash\n(.*?)```", re.DOTALL | re.MULTILINE)
FORMS = FORM.findall(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else []
SMALL = {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
SMALL |= {"model.backbone": "filter_bank", "model.layers": "[scale1]", "model.image_size": "[32,32]"}
SMALL |= {
    "model.num_prototypes": "4",
    "model.visualizer": "false",
    "data.num_workers": "0",
    "trainer.accelerator": "cpu",
}
SMALL |= {"trainer.enable_progress_bar": "false"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGE.is_file(), reason="this is not a checkout: docs/ is not here"),
]


def lay_out(listing):
    """Make the files of a listing: `...` stands for more good images, and for one more of any other folder."""
    rng = np.random.default_rng(0)
    made = []
    for line in listing.splitlines():
        first, *more = line.split()
        first = Path(first)
        count = {False: 1, True: 12 if "good" in first.parts else 3}[more == ["..."]]
        number = first.stem.partition("_")[0]
        for step in range(count):
            path = first.with_name(first.name.replace(number, f"{int(number) + step:0{len(number)}d}"))
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(90, 120, (32, 32, 3), dtype=np.uint8)
            if first.parts[1] in ("masks", "ground_truth"):
                pixels = np.zeros((32, 32), np.uint8)
                pixels[8:16, 8:16] = 255
            elif "good" not in first.parts:
                pixels[8:16, 8:16] = 255
            Image.fromarray(pixels).save(path)
            made.append(path)
    return made


def mask_of(image, masks):
    """The mask that the listing means: under the same number, and the same kind of defect where there are several."""
    kinds = {mask.parent.name for mask in masks}
    found = [mask for mask in masks if mask.stem.partition("_")[0] == image.stem]
    (own,) = [mask for mask in found if len(kinds) == 1 or mask.parent.name == image.parent.name]
    return own


@pytest.mark.parametrize(("listing", "command"), [form[2:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_the_command_trains_on_the_listing(listing, command, tmp_path, monkeypatch, capsys):
    from anomalib.cli import AnomalibCLI

    from anomalib_ot.integration.cli import register_classes

    register_classes()
    monkeypatch.chdir(tmp_path)
    made = lay_out(listing)
    masks = [path for path in made if path.parts[1] in ("masks", "ground_truth")]
    held_out = [path for path in made if path.parts[1] in ("held_out", "test") and "good" in path.parts]
    bad = [path for path in made if path not in masks and "good" not in path.parts]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    cli = AnomalibCLI(args=[*shlex.split(command.replace("\\\n", " "))[1:], *small])
    assert cli.model.is_fitted
    assert next(tmp_path.rglob("model.ckpt")).is_file()

    data = cli.datamodule
    sets = {name: getattr(data, f"{name}_data").samples for name in ("train", "val", "test")}
    images = {name: [Path(path).relative_to(tmp_path) for path in found.image_path] for name, found in sets.items()}
    assert sorted(path for found in images.values() for path in found) == sorted(set(made) - set(masks))
    assert not set(images["train"]) & {*bad, *held_out}
    if held_out:  # then no good image is taken from the training for the test
        assert set(images["val"] + images["test"]) == {*bad, *held_out}
    for name in ("val", "test"):
        assert images[name]
        for path, label, mask in zip(images[name], sets[name].label_index, sets[name].mask_path, strict=True):
            assert label == (path in bad)
            if masks and path in bad:
                assert Path(mask).relative_to(tmp_path) == mask_of(path, masks)
    assert ("pixel_AUROC" in capsys.readouterr().out) == bool(masks)


def test_the_page_has_every_folder_argument():
    words = " ".join(command for _, _, _, command in FORMS)
    for name in ("normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir"):
        assert f"--data.{name} " in words
        assert name == "normal_test_dir" or f"--data.{name} '[" in words, "one folder, and a list of them"


def test_images_that_the_page_names_are_those_of_anomalib():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    (named,) = re.findall(r"Images are\s(.*?);", PAGE.read_text("utf-8"), re.DOTALL)
    assert set(re.findall(r"`(\.\w+)`", named)) == set(IMG_EXTENSIONS)
