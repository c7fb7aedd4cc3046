"""The folder of synthetic fabric: complete or absent, used again when it fits, refused when it does not."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.synthetic.fabric import DEFECTS, render_fabric
from anomalib_ot.synthetic.picture import tight_boxes

SMALL = {"num_train": 3, "num_test_good": 2, "num_per_defect": 2, "image_size": (64, 72)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("fabric") / "set"
    FabricFolder(**SMALL).ensure(root)
    return root


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout(written):
    counts = {path.relative_to(written).as_posix(): len(list(path.glob("*.png"))) for path in written.rglob("*/")}
    expected = {"train": 0, "test": 0, "ground_truth": 0, "train/good": 3, "test/good": 2}
    for defect in DEFECTS:
        expected |= {f"test/{defect}": 2, f"ground_truth/{defect}": 2}
    assert counts == expected
    assert [path.name for path in written.parent.iterdir()] == ["set"]


def test_files_hold_what_the_generator_draws(written):
    for picture in FabricFolder(**SMALL).pictures():
        sample = render_fabric(0, picture.index, picture.defect, (64, 72))
        np.testing.assert_array_equal(np.asarray(Image.open(written / picture.path)), sample.image)
        if picture.defect:
            mask = Image.open(written / picture.path.replace("test", "ground_truth"))
            np.testing.assert_array_equal(np.asarray(mask), sample.mask)


def test_coco_boxes_are_those_of_the_masks(written):
    coco = json.loads((written / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert names == dict(enumerate(DEFECTS, start=1))
    files = {path for path in files_of(written) if path.startswith(("train", "test")) and path.endswith(".png")}
    assert {image["file_name"] for image in coco["images"]} == files
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        assert (image["width"], image["height"]) == Image.open(written / image["file_name"]).size
        _, group, name = image["file_name"].split("/")
        found = [annotation for annotation in coco["annotations"] if annotation["image_id"] == image["id"]]
        assert {names[annotation["category_id"]] for annotation in found} == ({group} - {"good"})
        corners = [(x, y, x + w, y + h) for x, y, w, h in (annotation["bbox"] for annotation in found)]
        mask = [] if group == "good" else np.asarray(Image.open(written / "ground_truth" / group / name))
        expected = [] if group == "good" else tight_boxes(mask).tolist()
        assert corners == [tuple(box) for box in expected]
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] > 0 and a["iscrowd"] == 0 for a in found)


def test_an_image_keeps_its_content_when_the_counts_change():
    few, many = FabricFolder(**SMALL), FabricFolder(num_train=9, num_per_defect=5, image_size=(64, 72))
    assert set(few.pictures()) < set(many.pictures())
    indices = [picture.index for picture in many.pictures()]
    assert len(set(indices)) == len(indices)


def test_a_fitting_folder_is_used_again(written, monkeypatch):
    before = files_of(written)
    monkeypatch.setattr(FabricFolder, "render", lambda *_: pytest.fail("drawn again"))
    FabricFolder(**SMALL, defects=DEFECTS[::-1]).ensure(written)
    assert files_of(written) == before


@pytest.mark.parametrize(("name", "value"), [("num_train", 4), ("seed", 1), ("defects", ("hole",))])
def test_other_parameters_are_refused(written, name, value):
    before = files_of(written)
    with pytest.raises(ValueError, match=rf"(?s)root is '.*set'.*{name} is .* there and .* here.*delete this folder"):
        FabricFolder(**{**SMALL, name: value}).ensure(written)
    assert files_of(written) == before


def test_pictures_of_another_generation_are_refused(written, monkeypatch):
    monkeypatch.setattr(FabricFolder, "GENERATION", 999)
    with pytest.raises(ValueError, match="generation is 1 there and 999 here"):
        FabricFolder(**SMALL).ensure(written)


def test_foreign_files_are_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("draft")
    with pytest.raises(ValueError, match=r"holds other files, such as 'thesis\.tex'.*give another root"):
        FabricFolder(**SMALL).ensure(tmp_path)
    assert files_of(tmp_path) == {"thesis.tex": b"draft"}
    with pytest.raises(ValueError, match="a file; expected a new or empty folder"):
        FabricFolder(**SMALL).ensure(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "test/hole/001.png").unlink(), r"'test/hole/001\.png' \(missing\)"),
        (lambda root: (root / "annotations.json").unlink(), r"'annotations\.json' \(missing\)"),
        (lambda root: (root / "train/good/mine.png").touch(), r"'train/good/mine\.png' \(not of this data set\)"),
        (lambda root: (root / "synthetic_fabric.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_changed_folder_is_refused(tmp_path, change, message):
    few = {**SMALL, "num_train": 2, "defects": ("hole",)}
    root = tmp_path / "set"
    FabricFolder(**few).ensure(root)
    change(root)
    with pytest.raises(ValueError, match=message):
        FabricFolder(**few).ensure(root)


def test_an_empty_folder_is_filled(tmp_path):
    few = FabricFolder(**{**SMALL, "num_train": 2, "defects": ("hole",)})
    few.ensure(tmp_path)
    few.ensure(tmp_path)
    assert (tmp_path / "train/good/000.png").is_file()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, failure):
    def render(seed, index, defect, size):
        if defect == "stain":
            raise failure
        return render_fabric(seed, index, defect, size)

    root = tmp_path / "deep" / "set"
    monkeypatch.setattr(FabricFolder, "render", staticmethod(render))
    with pytest.raises(failure):
        FabricFolder(**SMALL).ensure(root)
    assert list(root.parent.iterdir()) == []
    monkeypatch.undo()
    FabricFolder(**SMALL).ensure(root)
    assert (root / "synthetic_fabric.json").is_file()


DRAW = (
    "import sys; from pathlib import Path; from anomalib_ot.integration.data.synthetic_fabric import FabricFolder\n"
    "FabricFolder(num_train=int(sys.argv[2]), num_test_good=2, num_per_defect=2, image_size=(64, 72))"
    ".ensure(Path(sys.argv[1]))"
)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    root = tmp_path / "set"
    process = subprocess.Popen([sys.executable, "-c", DRAW, str(root), "5000"])
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not root.exists()
    FabricFolder(**SMALL).ensure(root)
    assert len(list((root / "train/good").iterdir())) == 3


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_good_folder(tmp_path, written):
    root = tmp_path / "set"
    processes = [subprocess.Popen([sys.executable, "-c", DRAW, str(root), "3"]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert files_of(root) == files_of(written)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_slower_of_two_runs_takes_the_folder_of_the_faster(tmp_path, monkeypatch):
    root = tmp_path / "set"
    few = FabricFolder(**{**SMALL, "defects": ("hole",)})
    other = FabricFolder(**{**SMALL, "defects": ("hole",), "seed": 1})

    def overtake(*arguments):
        monkeypatch.undo()
        few.ensure(root)
        return render_fabric(*arguments)

    monkeypatch.setattr(FabricFolder, "render", staticmethod(overtake))
    few.ensure(root)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    before = files_of(root)
    root.rename(tmp_path / "first")
    monkeypatch.setattr(FabricFolder, "render", staticmethod(overtake))
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        other.ensure(root)
    assert files_of(root) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 1}, "num_train is 1; expected at least 2"),
        ({"num_test_good": 1}, "num_test_good is 1; expected at least 2"),
        ({"num_per_defect": 0}, "num_per_defect is 0; expected at least 1"),
        ({"num_per_defect": 1, "defects": ("hole",)}, "num_per_defect is 1 with a single defect"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": (256, 32)}, r"image_size is \(256, 32\); expected .* at least 64"),
        ({"image_size": (256,)}, r"image_size is \(256,\)"),
        ({"defects": ()}, r"defects is \[\]"),
        ({"defects": ("hole", "hole")}, "each once"),
        ({"defects": ("hole", "pilling")}, f"pilling.*{', '.join(DEFECTS)}"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FabricFolder(**arguments)
