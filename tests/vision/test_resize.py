"""The antialiased resize is the host's own, to rounding, and stays it in an exported graph of any input size."""

import openvino
import pytest
import torch
from torchvision.transforms.v2 import Resize

from anomalib_ot.vision.resize import AntialiasResize, resize_weights

PAIRS = [
    ((1, 1), (4, 6)),
    ((2, 2), (7, 5)),
    ((1, 9), (3, 3)),
    ((9, 1), (3, 3)),
    ((16, 16), (16, 16)),
    ((31, 47), (32, 48)),
    ((100, 37), (20, 64)),
    ((37, 100), (64, 20)),
    ((700, 900), (3, 2)),
    ((1100, 13), (1, 1)),
    ((64, 48), (63, 47)),
]


def images(size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_equals_torchvision(before, after):
    x = images(before)
    torch.testing.assert_close(AntialiasResize(after)(x), Resize(after, antialias=True)(x), rtol=0, atol=3e-6)


def test_is_not_the_resize_without_antialias():
    x = images((64, 64))
    assert (AntialiasResize((8, 8))(x) - Resize((8, 8), antialias=False)(x)).abs().max() > 0.1


def test_height_is_the_first_number():
    x = torch.zeros(1, 1, 4, 4)
    x[:, :, 0] = 1  # the upper row
    y = AntialiasResize((4, 8))(x)
    assert y.shape == (1, 1, 4, 8)
    assert (y[0, 0, 0] == 1).all()
    assert (y[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (1000, 3), (7, 7), (3, 1000)], ids=str)
def test_weights_are_means(sizes):
    weights = resize_weights(*sizes)
    assert weights.shape == sizes[::-1]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(sizes[1]))


def test_leading_dimensions_and_types():
    x = images((20, 30))
    resize = AntialiasResize((8, 9))
    torch.testing.assert_close(resize(x[0]), resize(x)[0], rtol=0, atol=1e-6)
    for dtype, atol in ((torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        y = resize(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), resize(x), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_pixels_alone(dtype):
    # torchvision's resize does not round under autocast; its twin in the exported graph must not either.
    x = images((50, 40))
    with torch.autocast("cpu", dtype):
        y = AntialiasResize((16, 16))(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, Resize((16, 16), antialias=True)(x), rtol=0, atol=3e-6)


def test_an_image_alone_and_in_a_batch():
    x = images((45, 33), batch=4)
    resize = AntialiasResize((16, 24))
    torch.testing.assert_close(resize(x[2:3]), resize(x)[2:3], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_exports_with_any_height_and_width(tmp_path):
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    resize = AntialiasResize((24, 16)).eval()
    program = torch.onnx.export(resize, (images((40, 50)),), dynamo=True, dynamic_shapes=(dims,), verbose=False)
    program.save(tmp_path / "resize.onnx")
    core = openvino.Core()
    model = core.read_model(tmp_path / "resize.onnx")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size, batch in (((40, 50), 2), ((2, 2), 1), ((24, 16), 1), ((300, 211), 3), ((11, 640), 1)):
        x = images(size, batch)
        exported = torch.from_numpy(compiled(x.numpy())[0])
        torch.testing.assert_close(exported, Resize((24, 16), antialias=True)(x), rtol=0, atol=3e-6)
