"""OTPrototypes on large surfaces: tiles from the training to the exports, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from anomalib_ot import OTPrototypes, SyntheticFabric
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.export.runtime import openvino_predict, predict_of_onnx
from anomalib_ot.integration.models.calibrated_checkpoint import UpdatedCheckpoint
from anomalib_ot.integration.models.prototypes_options import as_trained

MODEL = {
    "backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": [96, 160], "tile_size": [64, 64],
    "num_prototypes": 16, "visualizer": False, "advanced": {"tile_overlap": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(
        default_root_dir=tmp_path_factory.mktemp("run"), accelerator="cpu", logger=False, enable_progress_bar=False
    )


@pytest.fixture(scope="module")
def model(engine, fabric):
    data = SyntheticFabric(root=fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64))
    model = OTPrototypes(**MODEL)
    engine.fit(model, datamodule=data)
    return model.eval()


def images(count, seed=0):
    return torch.rand(count, 3, 96, 160, generator=torch.Generator().manual_seed(seed))


def test_a_training_leaves_one_set_of_prototypes_and_thresholds(model):
    assert [bank.num_prototypes for bank in model.model.banks] == [16, 16, 16]
    assert all(bank.member.alpha == 0 for bank in model.model.banks)
    assert model.model.transport_score is None
    assert model.post_processor.has_image_threshold
    out = model(images(2))
    assert out.anomaly_map.shape == (2, 1, 96, 160)


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
@pytest.mark.slow
def test_exports_hold_the_tiles(model, engine, tmp_path, kind):
    path = engine.export(model, export_type=kind, export_root=tmp_path)
    expected = model(images(2, seed=1))
    if kind == "torch":
        found = torch.load(path, weights_only=False)["model"].eval()(images(2, seed=1))._asdict()
    else:
        predict = predict_of_onnx(path)[0] if kind == "onnx" else openvino_predict(path)
        found = predict(images(2, seed=1).numpy())
        parity = json.loads(path.with_name("manifest.json").read_text())["parity"]
        assert max(parity["score"], parity["map"]) <= 1e-3
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(getattr(expected, name)), atol=1e-3)


def test_a_checkpoint_brings_its_tiles_and_takes_in_no_more_images(model, engine, tmp_path):
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = OTPrototypes.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert other.model.tiling == model.model.tiling
    assert torch.equal(other.model(images(1)).anomaly_map, model.model(images(1)).anomaly_map)
    with pytest.raises(InputError, match=r"model\.ckpt sees images in tiles \(tile_size\)"):
        UpdatedCheckpoint(tmp_path / "model.ckpt")


def test_a_checkpoint_with_the_overlap_beside_the_other_arguments_loads(model, engine, tmp_path):
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    arguments = content["hyper_parameters"]
    arguments["tile_overlap"] = arguments["advanced"].pop("tile_overlap")
    torch.save(content, tmp_path / "flat.ckpt")
    other = OTPrototypes.load_from_checkpoint(tmp_path / "flat.ckpt")
    assert other.model.tiling == model.model.tiling
    assert other.hparams["advanced"]["tile_overlap"] == 0.25
    assert "tile_overlap" not in other.hparams
    resumed = OTPrototypes(backbone="filter_bank", layers=["scale1", "scale2"], visualizer=False)
    engine.test(resumed, datamodule=engine.trainer.datamodule, ckpt_path=tmp_path / "flat.ckpt")
    assert resumed.model.tiling == model.model.tiling


def test_a_checkpoint_from_before_there_were_tiles_has_none():
    saved = as_trained({"hyper_parameters": {"preset": "default"}, "state_dict": {"model.banks.0.weight": 1}})
    assert saved["tile_size"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": [200, 64]}, r"tile_size is \[200, 64\]; .* at most those of image_size, \[96, 160\]"),
        ({"tile_size": [16, 64]}, r"tile_size is \[16, 64\]; .* at least 32 pixels each"),
        ({"tile_size": [64]}, r"tile_size is \[64\]; expected height and width"),
        ({"advanced": {"tile_overlap": 1.0}}, r"advanced.tile_overlap is 1.0; expected a number from 0 to 0.9"),
        ({"tile_overlap": 0.3}, r"expected it in advanced: .* --model.advanced.tile_overlap"),
        ({"advanced": {"alpha": 0.3}}, r"alpha is 0.3, and tile_size is given: it needs places"),
        ({"advanced": {"transport_score": True}}, r"transport_score is True, and tile_size is given"),
        ({"preset": "paper", "num_prototypes": None}, r"preset is 'paper', and tile_size is given"),
        (
            {"advanced": {"members": [{"layers": ["scale1"], "alpha": 0.5}]}},
            r"members\[0\].alpha is 0.5, and tile_size is given",
        ),
        ({"roi": [[[0, 0], [1, 0], [1, 1]]]}, r"roi and tile_size are both given"),
    ],
    ids=str,
)
def test_what_tiles_cannot_be_or_tell_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OTPrototypes(**{**MODEL, **changes})
