"""Local weights: what is in the file is in the network, all of it, or one clear error says what is not."""

import logging
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_ot.vision.backbone import known_layers, load_weights, normalization, read_weights

WEIGHTS = Path(os.environ.get("ANOMALIB_OT_WEIGHTS", Path(__file__).parents[3] / "shared" / "weights"))


def features_only(backbone, indices):
    return timm.create_model(backbone, features_only=True, exportable=True, out_indices=indices).eval()


def images(size=64, batch=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def full():
    """A whole resnet18 that no default start can be mistaken for: every tensor is random, those of the norms too."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18", pretrained=False).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.05 * torch.rand(value.shape))
    return model


def save(state, path):
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


FORMS = {
    "plain.safetensors": lambda state: state,
    "plain.pth": lambda state: state,
    "wrapped.pt": lambda state: {"state_dict": state, "epoch": 3},
    "parallel.pth": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "ema.ckpt": lambda state: {"state_dict_ema": state},
    "model.bin": lambda state: {"model": state, "arch": "resnet18"},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.slow
def test_every_form_of_checkpoint_loads_exactly(full, name, tmp_path):
    path = save(FORMS[name](full.state_dict()), tmp_path / name)
    network = features_only("resnet18", [1, 2, 3])
    load_weights(network, "resnet18", [1, 2, 3], path)
    for key, value in network.state_dict().items():
        assert torch.equal(value, full.state_dict()[key]), key
    x = images()
    stage = full.maxpool(full.act1(full.bn1(full.conv1(x))))
    for layer, feature in zip((full.layer1, full.layer2, full.layer3), network(x), strict=True):
        stage = layer(stage)
        torch.testing.assert_close(feature, stage)


def test_loading_leaves_the_random_state_alone(full, tmp_path):
    path = save(full.state_dict(), tmp_path / "resnet.pth")
    network = features_only("resnet18", [1])
    before = torch.random.get_rng_state()
    load_weights(network, "resnet18", [1], path)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
def test_half_precision_file_loads(full, tmp_path):
    path = save({name: value.half() for name, value in full.state_dict().items()}, tmp_path / "half.safetensors")
    network = features_only("resnet18", [1])
    load_weights(network, "resnet18", [1], path)
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, full.conv1.weight.half().float())


@pytest.mark.slow
def test_shallow_layers_need_no_deep_weights(full, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    deep = ("layer3", "layer4", "fc")
    state = {name: value for name, value in full.state_dict().items() if not name.startswith(deep)}
    path = save(state, tmp_path / "shallow.pth")
    network = features_only("resnet18", [1, 2])
    load_weights(network, "resnet18", [1, 2], path)
    assert torch.equal(network.state_dict()["layer2.1.bn2.running_var"], full.layer2[1].bn2.running_var)
    assert not caplog.records  # nothing is said of layers that are not used
    with pytest.raises(ValueError, match=r"shallow\.pth.*lacks \d+ tensors.*layer3\.0"):
        load_weights(features_only("resnet18", [1, 3]), "resnet18", [1, 3], path)


@pytest.mark.parametrize(
    "lost",
    ["bn1.running_var"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("conv1.weight", "layer1.0.bn1.weight", "layer2.0.bn1.bias", "layer2.1.bn2.running_mean")
    ],
)
def test_a_single_missing_tensor_is_named(full, lost, tmp_path):
    # Norms start at zeros and ones, the same whatever the seed: they are missed as easily as they are forgotten.
    state = {name: value for name, value in full.state_dict().items() if name != lost}
    path = save(state, tmp_path / "hole.safetensors")
    network = features_only("resnet18", [2])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"hole\.safetensors.*lacks 1 tensors.*{lost.replace('.', '[.]')}"):
        load_weights(network, "resnet18", [2], path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed although the file was refused"


@pytest.mark.parametrize(
    "backbone",
    ["mobilenetv2_100"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("resnet34", "resnet50", "convnext_atto", "vit_tiny_patch16_224")
    ],
)
def test_weights_of_another_model_are_refused(full, backbone, tmp_path):
    path = save(full.state_dict(), tmp_path / "resnet18.pth")
    indices = None if "vit" in backbone else [1, 2]
    network = timm.create_model(backbone) if indices is None else features_only(backbone, indices)
    with pytest.raises(ValueError, match=rf"resnet18\.pth.*{backbone}"):
        load_weights(network, backbone, indices, path)


@pytest.mark.slow
def test_weights_of_a_deeper_sibling_are_refused(tmp_path):
    # resnet34 holds every tensor of resnet18 in the same shape: loading it would be quiet, and wrong.
    path = save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match=r"resnet34\.pth.*resnet18.*layer1\.2\.conv1\.weight"):
        load_weights(features_only("resnet18", [1]), "resnet18", [1], path)


def test_features_only_names_that_differ_from_the_file(tmp_path):
    torch.manual_seed(5)
    full = timm.create_model("convnext_atto", pretrained=False).eval()
    path = save(full.state_dict(), tmp_path / "convnext.safetensors")
    network = features_only("convnext_atto", [0, 2])
    assert not set(network.state_dict()) & set(full.state_dict()), "the names agree: this test needs another model"
    load_weights(network, "convnext_atto", [0, 2], path)
    x = images()
    first = full.stages[0](full.stem(x))
    third = full.stages[2](full.stages[1](first))
    for feature, expected in zip(network(x), (first, third), strict=True):
        torch.testing.assert_close(feature, expected)


@pytest.mark.slow
def test_transformer_weights_load(tmp_path):
    torch.manual_seed(6)
    full = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    path = save(full.state_dict(), tmp_path / "vit.safetensors")
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True).eval()
    load_weights(network, "vit_tiny_patch16_224", None, path)
    x = images(224)
    (feature,), (expected,) = (
        model.forward_intermediates(x, indices=[2], intermediates_only=True) for model in (network, full)
    )
    torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(full, bad, tmp_path):
    state = {name: value.clone() for name, value in full.state_dict().items()}
    state["layer2.0.conv1.weight"].view(-1)[7] = bad
    path = save(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"broken\.safetensors.*'layer2\.0\.conv1\.weight' holds NaN or infinite"):
        read_weights(path)


class Code:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "writer",
    [
        torch.save,
        pytest.param(
            lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)), id="pickle", marks=pytest.mark.slow
        ),
    ],
)
def test_code_in_a_checkpoint_is_not_run(full, writer, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    writer({"state_dict": full.state_dict(), "extra": Code(trace)}, path)
    with pytest.raises(ValueError, match=r"evil\.pth.*cannot be read as a checkpoint of plain tensors"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
@pytest.mark.parametrize("part", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_truncated_file(full, name, part, tmp_path):
    path = save(full.state_dict(), tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"{name}.*cannot be read as a checkpoint"):
        read_weights(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match=rf"{path.name}.*no such file"):
            read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3)], ids=str)
def test_file_without_a_state_dict(content, tmp_path):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"odd\.pth.*expected a state dict"):
        read_weights(path)


def test_layers_are_those_that_features_come_from():
    assert known_layers("convnext_atto") == ["stages.0", "stages.1", "stages.2", "stages.3"]
    assert known_layers("vit_tiny_patch16_224") == [f"blocks.{i}" for i in range(12)]


def test_unknown_backbone_names_near_ones():
    with pytest.raises(ValueError, match=r"backbone='resnet19'.*no model of that name.*resnet18"):
        known_layers("resnet19")


@pytest.mark.parametrize(
    "backbone", ["mobilevit_s", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)]
)
def test_backbones_without_usable_maps_are_refused(backbone):
    # Anomalib takes every name with "vit" for a plain transformer; Swin's maps have their channels last.
    with pytest.raises(ValueError, match=rf"backbone='{backbone}' gives no feature maps.*take a convolutional"):
        known_layers(backbone)


def test_normalization_is_the_models_own():
    assert normalization("resnet18")[0] == pytest.approx((0.485, 0.456, 0.406))
    assert normalization("vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalization("filter_bank")[1] == pytest.approx((0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("backbone", "file"),
    [
        ("resnet18", "resnet18_imagenet_layer123.safetensors"),
        pytest.param("mobilenetv2_100", "mobilenetv2_100_imagenet.safetensors", marks=pytest.mark.slow),
    ],
)
def test_real_weights_equal_timms_own_loading(backbone, file):
    path = WEIGHTS / file
    if not path.is_file():
        pytest.skip("no real weights here: set ANOMALIB_OT_WEIGHTS to a folder that holds them")
    network = features_only(backbone, [1, 2, 3])
    load_weights(network, backbone, [1, 2, 3], path)
    overlay = {"file": str(path)}
    expected = timm.create_model(
        backbone, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(1, 2, 3)
    ).eval()
    for ours, theirs in zip(network(images(96)), expected(images(96)), strict=True):
        assert torch.equal(ours, theirs)
