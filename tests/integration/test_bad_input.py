"""What users get wrong ends in one line that names the thing and the cure, with a status other than 0 and no files."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from safetensors.torch import load_file, save_file

from anomalib_ot import OTPrototypes
from anomalib_ot.integration.checks.errors import InputError

pytestmark = pytest.mark.slow

PRODUCTS = ("*.ckpt", "*.pt", "*.onnx", "*.xml", "*.bin")
SIZE = (64, 64)


def assert_refused(done, home: Path, *pieces: str, code: int = 1) -> None:
    """Check that a command has failed with one clear line at its end, and has left nothing that looks like a result."""
    assert done.code == code, done.err
    assert done.error.startswith("anomalib-ot: error: "), done.err[-2000:]
    assert done.err.count("anomalib-ot: error: ") == 1
    assert "Traceback" not in done.err
    for piece in pieces:
        assert piece in done.error
    assert not [path for pattern in PRODUCTS for path in (home / "results").rglob(pattern)]


@pytest.fixture
def home(tmp_path):
    """The folder to run in."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def cloth(fabric, tmp_path) -> Path:
    """A folder of one's own: six good images, two with holes, their masks."""
    return copy_of(fabric, tmp_path / "cloth")


@pytest.fixture(scope="module")
def expected(fabric, tmp_path_factory) -> dict[str, float]:
    """The scores of the cloth as it is."""
    home = tmp_path_factory.mktemp("expected")
    return scores(copy_of(fabric, home / "cloth"), home)


def copy_of(fabric: Path, root: Path) -> Path:
    shutil.copytree(fabric / "train/good", root / "good")
    for number, defect in enumerate(("hole", "stain")):
        for folder, source in (("bad", "test"), ("mask", "ground_truth")):
            (root / folder).mkdir(exist_ok=True)
            shutil.copy(fabric / source / defect / "000.png", root / folder / f"{number:03}.png")
    return root


def folder_words(root: Path, **changes: str) -> list[str]:
    data = {"name": "cloth", "root": str(root), "normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "mask"}
    data |= {"num_workers": "0"} | changes
    return ["--data", "Folder", *(word for name, value in data.items() for word in (f"--data.{name}", value))]


# ---- arguments


ARGUMENTS = {
    "alpha": (["--model.advanced.alpha", "1.5"], 1, ["advanced.alpha is 1.5", "from 0 to 1"]),
    "preset": (["--model.preset", "papr"], 2, ["preset is 'papr'", "did you mean 'paper'?", "'default', 'paper'"]),
    "layer": (["--model.layers", "[scale1,layer7]"], 1, ["has no layer 'layer7'", "scale1, scale2, scale3"]),
    "backbone": (["--model.backbone", "resnet188"], 1, ["'resnet188'", "near ones: "]),
    "member": (["--model.advanced.members", "[{alhpa: 0.1}]"], 1, ["members[0]", "'alhpa'", "did you mean 'alpha'?"]),
    "unknown argument": (
        ["--model.num_prototype", "8"],
        2,
        ["--model.num_prototype", "did you mean 'num_prototypes'?"],
    ),
    "moved argument": (["--model.alpha", "0.2"], 2, ["--model.alpha: ", "expected --model.advanced.alpha"]),
    "unknown option": (
        ["--model.advanced.alhpa", "0.2"],
        2,
        ["--model.advanced.alhpa: ", "did you mean 'advanced.alpha'?"],
    ),
    "unknown key": (["--model.advanced", "{alhpa: 0.2}"], 2, ["advanced.alhpa: ", "did you mean 'advanced.alpha'?"]),
    "choice": (["--model.advanced.score", "maxx"], 2, ["--model.advanced.score is 'maxx'", "did you mean 'max'?"]),
    "type": (["--model.advanced.epochs", "many"], 2, ["--model.advanced.epochs is 'many'", "expected"]),
    "optional type": (["--model.advanced.alpha", "low"], 2, ["--model.advanced.alpha is 'low'", "from 0 to 1"]),
    "data argument": (["--data.num_trian", "4"], 2, ["--data.num_trian", "did you mean 'num_train'?"]),
    "data value": (["--data.defects", "[hoel]"], 1, ["defects is ['hoel']", "hole"]),
    "prototypes": (["--model.num_prototypes", "8000"], 1, ["num_prototypes=8000", "1536 training patches", "lower it"]),
    "precision": (["--trainer.precision", "bf16-true"], 1, ["trainer.precision is 'bf16-true'", "'32-true'"]),
}


@pytest.mark.cli
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, anomalib, small_model, small_data, home):
    words, code, pieces = ARGUMENTS[case]
    assert_refused(anomalib("train", *small_model, *small_data, *words, cwd=home), home, *pieces, code=code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["scale1", "scale1"]}, r"layers is \['scale1', 'scale1'\], which names a layer twice"),
        ({"layers": []}, "layers is .*at least one layer"),
        ({"advanced": {"score": "maxx"}}, r"advanced.score is 'maxx'.*did you mean 'max'\?"),
        ({"image_size": [8, 8]}, r"image_size is \[8, 8\]; expected .* at least 32 pixels"),
        ({"image_size": [64]}, r"image_size is \[64\]; expected height and width"),
        ({"advanced": {"smoothing": -1}}, "advanced.smoothing is -1; expected a number from 0 to below 100"),
        ({"advanced": {"num_groups": 1}}, "advanced.num_groups is 1; expected a whole number of at least 2"),
        ({"advanced": {"epochs": 0}}, "advanced.epochs is 0; expected a whole number of at least 1"),
        ({"advanced": {"max_cached_gb": 0}}, "advanced.max_cached_gb is 0; expected a number above 0"),
        ({"num_prototypes": 0}, "num_prototypes is 0; expected a whole number of at least 1"),
        ({"num_prototypes": 4, "advanced": {"num_global": 2}}, "expected one of the two"),
        ({"advanced": {"alpha": True}}, "advanced.alpha is True; expected a number from 0 to 1 or None"),
        ({"advanced": {"alhpa": 1}}, "advanced has the unknown key 'alhpa'; did you mean 'alpha'?"),
        ({"advanced": 3}, "advanced is 3; expected names with values"),
        ({"alpha": 0.2}, "alpha is an argument of OTPrototypes no more; expected it in advanced"),
    ],
    ids=str,
)
def test_arguments_in_python(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        OTPrototypes(**{"backbone": "filter_bank", "layers": ["scale1"]} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.cli
@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--model", "OTPrototype"], ["--model is 'OTPrototype'", "did you mean 'OTPrototypes'?"]),
        (["--model", "anomalib_ot.Prototypes"], ["no attribute 'Prototypes'", "it has", "OTPrototypes"]),
        (["--model", "OTPrototypes", "--data", "Foldr"], ["--data is 'Foldr'", "did you mean 'Folder'?"]),
        (["--model", "OTPrototypes", "--data", "Folder", "--data.name", "x"], ["--data.normal_dir is missing"]),
    ],
    ids=["model", "dotted model", "data", "missing argument"],
)
def test_names(words, pieces, anomalib, home):
    assert_refused(anomalib("train", *words, cwd=home), home, *pieces, code=2)


@pytest.mark.cli
def test_an_unknown_kind_of_export(anomalib, small_model, home):
    done = anomalib("export", *small_model, "--export_type", "tflite", cwd=home)
    assert_refused(done, home, "--export_type is 'tflite'; expected openvino, onnx or torch")


@pytest.mark.cli
def test_the_installed_script_says_the_same(anomalib, small_model, small_data, home):
    words, code, pieces = ARGUMENTS["alpha"]
    assert_refused(anomalib.fresh("train", *small_model, *small_data, *words, cwd=home), home, *pieces, code=code)


@pytest.mark.cli
def test_the_long_form_is_there_for_who_asks(anomalib, small_model, small_data, home):
    for words in (["--model.advanced.alpha", "1.5"], ["--model.advanced.alpha", "low"]):
        done = anomalib("train", *small_model, *small_data, *words, cwd=home, ANOMALIB_OT_TRACEBACK="1")
        assert done.code in {1, 2}
        assert len(done.err.splitlines()) > 8
        assert "anomalib-ot: error" not in done.err


@pytest.mark.cli
def test_other_models_keep_their_messages(anomalib, home):
    done = anomalib("train", "--model", "Padim", "--model.nonsense", "1", cwd=home)
    assert done.code == 2
    assert "anomalib-ot" not in done.err


# ---- data


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    Image.open(path).save(picture)
    path.unlink()
    content = bytearray(picture.read_bytes())
    content[2:200] = bytes(198)
    picture.write_bytes(content)


def shrink(path: Path) -> None:
    Image.new("RGB", (5, 5)).save(path)


FILES = {
    "cut off": (cut, "003.png is cut off"),
    "empty": (lambda path: path.write_bytes(b""), "003.png is empty"),
    "text": (lambda path: path.write_text("no image"), "003.png is text, not an image"),
    "damaged jpeg": (damage, "003.jpg is"),
    "tiny": (shrink, "003.png is tiny, 5 x 5 pixels"),
}


@pytest.mark.cli
@pytest.mark.parametrize("case", FILES)
def test_a_bad_training_image(case, anomalib, small_model, cloth, home):
    spoil, piece = FILES[case]
    spoil(cloth / "good/003.png")
    done = anomalib("train", *small_model, *folder_words(cloth), cwd=home)
    assert_refused(done, home, "data cloth: ", str(cloth / "good"), piece)


@pytest.mark.cli
def test_a_bad_test_image_is_found_before_the_training(anomalib, small_model, cloth, home):
    cut(cloth / "bad/001.png")
    done = anomalib("train", *small_model, *folder_words(cloth, val_split_mode="none"), cwd=home)
    assert_refused(done, home, f"{cloth / 'bad/001.png'} is cut off")


@pytest.mark.cli
@pytest.mark.parametrize(
    ("spoil", "pieces"),
    [
        (lambda root: shutil.rmtree(root), ["--data.normal_dir: ", "good does not exist", "--data.root"]),
        (lambda root: shutil.rmtree(root / "bad"), ["--data.abnormal_dir: ", "bad does not exist"]),
        (lambda root: [path.unlink() for path in (root / "good").iterdir()], ["no image in ", "good"]),
        (
            lambda root: [path.unlink() for path in (root / "good").glob("00[1-9].png")],
            ["1 normal image(s)", "000.png"],
        ),
        (lambda root: (root / "mask/001.png").unlink(), ["no mask for the abnormal image", "bad/001.png"]),
        (
            lambda root: (root / "mask/001.png").rename(root / "mask/one.png"),
            ["no mask for", "bad/001.png", "same stem"],
        ),
    ],
    ids=["root", "folder", "no image", "one image", "no mask", "misnamed mask"],
)
def test_folders(spoil, pieces, anomalib, small_model, cloth, home):
    spoil(cloth)
    assert_refused(anomalib("train", *small_model, *folder_words(cloth), cwd=home), home, *pieces)


@pytest.mark.cli
def test_synthetic_fabric_does_not_touch_a_foreign_folder(anomalib, small_model, cloth, home):
    done = anomalib("train", *small_model, "--data", "SyntheticFabric", "--data.root", cloth, cwd=home)
    assert_refused(done, home, f"root is '{cloth}', which holds other files")


@pytest.mark.cli
@pytest.mark.parametrize(("command", "doing"), [("train", "train on"), ("test", "test on")])
def test_no_data(command, doing, anomalib, small_model, home):
    assert_refused(anomalib(command, *small_model, cwd=home), home, f"no data to {doing}", "--data Folder")


# ---- weights and checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def network(small_data):
    start = ["--model", "OTPrototypes", "--model.image_size", "[64,64]", "--trainer.accelerator", "cpu"]
    return [*start, "--model.num_prototypes", "4", *small_data]


@pytest.mark.cli
def test_weights(anomalib, network, weights, home, tmp_path):
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "other.safetensors")
    expected = {
        "missing.safetensors": ["no such file"],
        "nan.safetensors": ["layer2.0.conv1.weight", "NaN"],
        "cut.safetensors": ["cannot be read"],
        "other.safetensors": ["resnet18"],
    }
    for name, pieces in expected.items():
        done = anomalib("train", *network, "--model.backbone_weights", tmp_path / name, cwd=home)
        assert_refused(done, home, "backbone_weights=", name, *pieces)


@pytest.mark.cli
def test_no_network_is_told_at_once(anomalib, network, home):
    shutil.rmtree(anomalib.hub, ignore_errors=True)
    done = anomalib("train", *network, cwd=home)
    assert_refused(
        done, home, "'resnet18' could not be fetched", "access to the Hugging Face hub", "backbone_weights=PATH"
    )
    assert "Retrying" not in done.err


@pytest.mark.cli
def test_weights_in_the_cache_of_the_hub_need_no_network(anomalib, network, weights, home, request):
    request.addfinalizer(lambda: shutil.rmtree(anomalib.hub))
    repository = anomalib.hub / ("models--" + timm.get_pretrained_cfg("resnet18").hf_hub_id.replace("/", "--"))
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    shutil.copy(weights, snapshot / "model.safetensors")
    done = anomalib("train", *network, cwd=home)
    assert done.code == 0, done.err
    (checkpoint,) = home.rglob("model.ckpt")
    trained = OTPrototypes.load_from_checkpoint(checkpoint).model.feature_extractor.state_dict()
    first = next(value for name, value in trained.items() if name.endswith("layer2.0.conv1.weight"))
    assert torch.equal(first, load_file(weights)["layer2.0.conv1.weight"])


@pytest.mark.cli
@pytest.mark.parametrize(
    ("command", "doing"),
    [(["test"], "test"), (["predict"], "predict"), (["export", "--export_type", "onnx"], "export")],
    ids=["test", "predict", "export"],
)
def test_an_untrained_model(command, doing, anomalib, small_model, small_data, home):
    data = [] if doing == "export" else small_data
    done = anomalib(*command, *small_model, *data, cwd=home)
    assert_refused(done, home, "is not trained", f"nothing to {doing}", "--ckpt_path PATH")


@pytest.mark.cli
@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("test", ("missing", "text", "other", "code")),
        ("predict", ("missing",)),
        ("export", ("missing", "other", "code")),
    ],
)
def test_checkpoints(command, names, anomalib, small_model, small_data, home, tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"weight": torch.ones(1)}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    torch.save({"state_dict": Path}, tmp_path / "code.ckpt")
    pieces = {
        "missing": "missing.ckpt does not exist",
        "text": "text.ckpt is cut off or no checkpoint",
        "other": "of another model, not of OTPrototypes",
        "code": "code.ckpt holds more than tensors and plain data",
    }
    words = ["--export_type", "torch"] if command == "export" else small_data
    for name in names:
        done = anomalib(command, *small_model, *words, "--ckpt_path", tmp_path / f"{name}.ckpt", cwd=home)
        assert_refused(done, home, pieces[name])


# ---- images that are odd but right


def scores(root: Path, home: Path) -> dict[str, float]:
    """Train on a folder and predict it; by name of the image, whatever its format."""
    data = {"normal_dir": "good", "normal_test_dir": "good", "abnormal_dir": "bad", "mask_dir": "mask"}
    datamodule = Folder(name="cloth", root=root, seed=0, num_workers=0, val_split_mode="same_as_test", **data)
    arguments = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": SIZE, "num_prototypes": 8}
    model, engine = OTPrototypes(**arguments), Engine(default_root_dir=home, accelerator="cpu", barebones=True)
    engine.fit(model=model, datamodule=datamodule)
    found = {}
    for batch in engine.predict(model=model, datamodule=datamodule):
        for path, score in zip(batch.image_path, batch.pred_score.tolist(), strict=True):
            found["/".join(Path(path).with_suffix("").parts[-2:])] = score
    assert len(found) == 8
    return found


def convert(root: Path, how, suffix: str = ".png") -> None:
    for path in [*root.glob("good/*.png"), *root.glob("bad/*.png")]:
        content = how(Image.open(path).convert("RGB"))
        path.unlink()
        if isinstance(content, Image.Image):
            content.save(path.with_suffix(suffix))
        else:
            cv2.imwrite(str(path.with_suffix(suffix)), content)


def sixteen_bits(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., ::-1].astype(np.uint16) * 257


def test_sixteen_bits_score_as_eight_do(cloth, home, tmp_path, expected):
    gray, deep_gray = (shutil.copytree(cloth, tmp_path / name) for name in ("gray", "deep_gray"))
    convert(gray, lambda image: image.convert("L"))
    convert(deep_gray, lambda image: np.asarray(image.convert("L")).astype(np.uint16) * 257, ".tiff")
    convert(cloth, sixteen_bits)
    assert scores(cloth, home) == pytest.approx(expected, abs=1e-3)
    expected_gray = scores(gray, home)
    assert scores(deep_gray, home) == pytest.approx(expected_gray, abs=1e-3)
    assert expected_gray != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("how", [lambda image: image.convert("RGBA"), lambda image: image], ids=["RGBA", "BMP"])
def test_other_formats_score_as_rgb_does(how, cloth, home, expected):
    convert(cloth, how, ".png" if how(Image.new("RGB", (1, 1))).mode == "RGBA" else ".bmp")
    assert scores(cloth, home) == expected


def test_gray_and_palette_images_mix_with_others(cloth, home):
    for number, mode in enumerate(("L", "P", "LA", "1")):
        path = cloth / f"good/{number:03}.png"
        Image.open(path).convert(mode).save(path)
    assert len(scores(cloth, home)) == 8


# ---- images to predict


@pytest.mark.parametrize("model", ["OTPrototypes", "OTADetector"])
def test_images_to_predict_that_are_not_there(anomalib, home, small_model, model):
    (home / "boards" / "images").mkdir(parents=True)
    words = small_model if model == "OTPrototypes" else ["--model", model]
    done = anomalib("predict", *words, "--data", "boards/imges", cwd=home)
    assert_refused(done, home, "--data is 'boards/imges', which does not exist", "did you mean 'boards/images'?")


def test_a_folder_to_predict_without_images(anomalib, home):
    (home / "empty").mkdir()
    done = anomalib("predict", "--model", "OTADetector", "--data", "empty", cwd=home)
    assert_refused(done, home, "--data is 'empty'", "Found 0 images", "expected an image, or a folder of images")
