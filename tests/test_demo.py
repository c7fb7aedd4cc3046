"""The README's first command, run small: what it writes, what it says, and how it ends."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from anomalib_ot import OTPrototypes
from anomalib_ot.integration.data.deep_images import read_image_deep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = ["--num-train", "16", "--num-test-good", "6", "--num-per-defect", "2", "--image-size", "128"]
DEFECTS = {"misplaced_motif", "missing_motif", "hole", "stain", "broken_yarn", "coarse_yarn"}


@pytest.fixture(scope="module")
def demo():
    path = ROOT / "benchmarks" / "demo.py"
    if not path.is_file():
        pytest.skip("this is not a checkout: benchmarks/demo.py is not here")
    spec = importlib.util.spec_from_file_location("demo_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Draw the images of the tests once, and not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "120")
        yield


@pytest.fixture(scope="module")
def finished(demo, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "demo"
    return demo.main(["--out", str(out), *SMALL]), out


def test_it_ends_well_and_the_exported_model_agrees(finished):
    code, out = finished
    assert code == 0
    agreement = json.loads((out / "metrics.json").read_text())["exported_model"]
    assert agreement["agrees"] is True
    assert agreement["images"] == 9  # half of 6 good and 12 defective ones; the other half validates
    assert 0 <= agreement["score"] <= 1e-3
    assert 0 <= agreement["map"] <= 1e-3
    assert agreement["other_verdicts"] == 0
    assert agreement["milliseconds_per_image"] > 0


def test_every_figure_is_there(finished):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["images"] == {"train": 16, "validation": 9, "test": 9}
    for name in ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"):
        assert 0 <= metrics[name] <= 1
    assert set(metrics["per_defect"]) == DEFECTS
    for figures in metrics["per_defect"].values():
        assert figures["images"] == 2
        assert all(0 <= figures[name] <= 1 for name in ("score", "map_alone", "transport_score", "position_map"))
    steps = metrics["seconds"]
    of_fabric = {"import", "draw", "train", "test", "predict", "export", "compare"}
    assert set(steps) == of_fabric | {"tray_draw", "tray_train", "tray_predict", "all"}
    assert steps["all"] >= steps["train"] > 0


def test_every_kind_of_fault_of_the_trays_is_there(finished):
    trays = json.loads((finished[1] / "metrics.json").read_text())["tray"]
    assert trays["images"] == {"train": 16, "validation": 8, "test": 8}  # 6 complete ones and 10 with faults
    assert list(trays["per_defect"]) == ["missing", "extra", "swapped", "moved", "damaged"]
    for figures in trays["per_defect"].values():
        assert figures["images"] == 2
        assert all(0 <= figures[name] <= 1 for name in ("score", "map_alone", "transport_score", "position_map"))
    assert Image.open(finished[1] / "tray_sheet.png").width == 1200


def test_a_misplaced_motif_is_found_by_its_place_and_a_missing_one_by_the_count(finished):
    defects = json.loads((finished[1] / "metrics.json").read_text())["per_defect"]
    assert defects["misplaced_motif"]["position_map"] == 1
    assert defects["missing_motif"]["transport_score"] >= 0.75


def test_pictures_model_and_sheet_are_there_and_can_be_read(finished):
    out = finished[1]
    assert {path.name for path in out.iterdir()} == {
        "metrics.json",
        "contact_sheet.png",
        "tray_sheet.png",
        "pictures",
        "model",
        "made_by_demo.txt",
    }
    pictures = sorted((out / "pictures").rglob("*.png"))
    assert len(pictures) == 9
    assert {path.parent.name for path in pictures} <= DEFECTS | {"good"}
    assert Image.open(pictures[0]).width > 1000
    assert Image.open(out / "contact_sheet.png").width == 1200
    assert {path.name for path in (out / "model").iterdir()} == {
        "model.xml",
        "model.bin",
        "manifest.json",
        "model.ckpt",
    }
    assert OTPrototypes.load_from_checkpoint(out / "model" / "model.ckpt").model.is_fitted


@pytest.mark.parametrize("change", [None, "pred_score", "anomaly_map", "pred_label"])
def test_a_difference_between_the_models_is_found(demo, finished, change):
    path = next((finished[1] / "pictures").rglob("*.png"))  # any picture will do
    model = OTPrototypes.load_from_checkpoint(finished[1] / "model" / "model.ckpt").eval()
    with torch.no_grad():
        out = model(read_image_deep(path)[None])
    values = {name: getattr(out, name).squeeze() for name in ("pred_score", "anomaly_map", "pred_label")}
    if change is not None:
        values[change] = ~values[change] if change == "pred_label" else values[change] + 0.01
    agreement = demo._compare(finished[1] / "model" / "model.xml", [SimpleNamespace(image_path=path, **values)])
    assert agreement["agrees"] is (change is None)
    assert agreement["other_verdicts"] == (change == "pred_label")


def test_a_second_run_renews_the_folder_and_a_model_that_disagrees_ends_with_1(
    demo, finished, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(finished[1], tmp_path / "demo")
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["exported_model"] |= {"agrees": False, "score": 0.5}
    (out / "my_notes.txt").write_text("keep me")
    # All steps but the verdict are those of the first run, which has taken them.
    monkeypatch.setattr(demo, "_run", lambda *_: metrics)
    assert demo.main(["--out", str(out), *SMALL]) == 1
    assert "does not agree with PyTorch: score differs by up to 0.5" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["exported_model"]["agrees"] is False
    assert {path.name for path in out.iterdir()} == {"metrics.json", "made_by_demo.txt", "my_notes.txt"}
    assert (out / "my_notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("kind", ["folder with other files", "file"])
def test_what_the_demo_has_not_made_is_left_alone(demo, tmp_path, capsys, kind):
    out = tmp_path / "thesis"
    if kind == "file":
        out.write_text("all of it")
    else:
        (out / "pictures").mkdir(parents=True)
        (out / "pictures" / "a.png").touch()
    assert demo.main(["--out", str(out)]) == 2
    said = capsys.readouterr().out.replace("\n", "")
    assert "error: --out is" in said
    assert "give a new folder" in said
    assert out.is_file() or (out / "pictures" / "a.png").exists()


def test_wrong_arguments_end_with_2(demo, tmp_path):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--out", str(tmp_path / "x"), "--num-train", "many"])
    assert ended.value.code == 2
    assert not (tmp_path / "x").exists()
