"""Which weights a backbone gets: two arguments say it, alike in all models; and the spelling of version 0.1."""

import pytest
import torch
from anomalib.models import get_model
from lightning.pytorch import Trainer

import anomalib_ot
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.cli import register_classes
from anomalib_ot.integration.models.backbone import fill_weights

MODELS = ("OTPrototypes", "OTADetector", "SparseMDOD")
DETECTOR = {"class_names": ["spot"]}
NAMES = {
    "OTPrototypes": ("ot_prototypes", "OTPrototypes", "otprototypes", "o_t_prototypes"),
    "OTADetector": ("ota_detector", "OTADetector", "otadetector", "o_t_a_detector"),
    "SparseMDOD": ("sparse_mdod", "SparseMDOD", "sparsemdod", "sparse_m_d_o_d"),
}


def arguments(name, **changes):
    layers = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": (64, 64)}
    return layers | (DETECTOR if name != "OTPrototypes" else {}) | changes


def build(name, **changes):
    return getattr(anomalib_ot, name)(**arguments(name, **changes))


@pytest.mark.parametrize(
    ("name", "spelling"),
    [(name, NAMES[name][0]) for name in MODELS]
    + [pytest.param(name, other, marks=pytest.mark.slow) for name in MODELS for other in NAMES[name][1:]],
)
def test_the_host_builds_models_with_its_own_argument(name, spelling):
    register_classes()
    for given in (spelling, {"class_path": name}):
        model = get_model(given, **arguments(name, pre_trained=False))
        assert type(model) is getattr(anomalib_ot, name)
        assert (model.pre_trained, model.backbone_weights) == (False, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_random_weights_are_those_of_the_seed(name):
    found = []
    for seed in (0, 0, 1):
        model = build(name, pre_trained=False, seed=seed)
        extractor = model.model.feature_extractor
        fill_weights(extractor, model.backbone_weights, model.seed, pre_trained=model.pre_trained)
        found.append(torch.cat([value.flatten() for value in extractor.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone_weights": "random"}, "^backbone_weights is 'random'.*use pre_trained=false"),
        ({"backbone_weights": "random", "pre_trained": False}, "^backbone_weights is 'random'.*use pre_trained=false"),
        ({"backbone_weights": "a.pth", "pre_trained": False}, "^pre_trained is False and .*'a.pth'; expected one of"),
        ({"pre_trained": "a.pth"}, "^pre_trained is 'a.pth'; expected true or false.*goes into backbone_weights$"),
        ({"pre_trained": None}, "^pre_trained is 'None'; expected true or false"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused_in_one_line(name, given, message):
    with pytest.raises(InputError, match=message) as refused:
        build(name, **given)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_version_0_1_load(name, tmp_path):
    saved = build(name, pre_trained=False)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(saved)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["hyper_parameters"].pop("pre_trained") is False
    checkpoint["hyper_parameters"]["backbone_weights"] = "random"
    torch.save(checkpoint, path)
    loaded = type(saved).load_from_checkpoint(path)
    assert (loaded.pre_trained, loaded.backbone_weights) == (False, None)
    assert (loaded.hparams["pre_trained"], loaded.hparams["backbone_weights"]) == (False, None)
    for key, value in saved.state_dict().items():
        assert torch.allclose(loaded.state_dict()[key], value, rtol=0, atol=0, equal_nan=True), key
    with pytest.raises(InputError, match="use pre_trained=false"):  # only while a checkpoint is read
        build(name, backbone_weights="random")
