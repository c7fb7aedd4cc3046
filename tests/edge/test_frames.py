"""A frame on the line is what the training would have read."""

import io

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from anomalib_ot.edge.frames import FrameError, network_input, read_pixels
from anomalib_ot.imaging import samples
from anomalib_ot.integration.data.deep_images import read_image_deep

COLOR = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (24, 20, 4), dtype=np.uint16)


def turned(path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees; Anomalib's reading does not
    Image.fromarray(COLOR[..., :3]).save(path, exif=exif)


WRITERS = {
    "rgb.png": lambda path: Image.fromarray(COLOR[..., :3]).save(path),
    "photo.jpg": lambda path: Image.fromarray(COLOR[..., :3]).save(path),
    "rgba.png": lambda path: Image.fromarray(COLOR).save(path),
    "gray.png": lambda path: Image.fromarray(COLOR[..., 0]).save(path),
    "gray_alpha.png": lambda path: Image.fromarray(COLOR[..., :2], "LA").save(path),
    "palette.png": lambda path: Image.fromarray(COLOR[..., :3]).convert("P").save(path),
    "bits.png": lambda path: Image.fromarray(COLOR[..., 0] > 99).save(path),
    "turned.jpg": turned,
    "gray16.png": lambda path: Image.fromarray(DEEP[..., 0]).save(path),
    "gray16.tif": lambda path: Image.fromarray(DEEP[..., 0]).save(path),
    "color16.png": lambda path: cv2.imwrite(str(path), DEEP[..., :3]),
    "color16.tif": lambda path: tifffile.imwrite(path, DEEP[..., :3], photometric="rgb"),
    "unit.tif": lambda path: Image.fromarray(DEEP[..., 0] / np.float32(65535)).save(path),
    "byte.tif": lambda path: Image.fromarray(COLOR[..., 0].astype(np.float32)).save(path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_are_read_as_in_training(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    found = network_input(read_pixels(path), None)
    expected = read_image_deep(path).numpy()[None]
    assert found.dtype == np.float32
    assert expected.std() > 0.05 or name == "bits.png"
    np.testing.assert_array_equal(found, expected)


def test_an_array_is_what_a_file_of_it_is(tmp_path):
    for values in (COLOR, COLOR[..., :3], COLOR[..., 0], COLOR[..., :1], DEEP[..., 0]):
        Image.fromarray(values.squeeze()).save(tmp_path / "x.png")
        expected = network_input(read_pixels(tmp_path / "x.png"), None)
        np.testing.assert_array_equal(network_input(read_pixels(values), None), expected)


@pytest.mark.parametrize("values", [COLOR[..., 0], COLOR[..., :3], DEEP[..., :3]], ids=["gray", "color", "deep"])
@pytest.mark.parametrize("size", [(16, 16), (31, 47)], ids=str)
def test_resize_is_that_of_the_training(values, size):
    pixels = read_pixels(values)
    whole = torch.from_numpy(network_input(pixels, None))
    expected = resize(whole, list(size), antialias=True).numpy()
    np.testing.assert_allclose(network_input(pixels, size), expected, atol=2e-6)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((20, 20), np.float32),
        np.zeros((20, 20, 2), np.uint8),
        np.zeros(400, np.uint8),
        np.zeros((4, 20), np.uint8),
    ],
    ids=["float", "two channels", "flat", "tiny"],
)
def test_arrays_that_are_no_frames(values):
    with pytest.raises(FrameError, match=r"uint8 or uint16|is tiny, 20 x 4"):
        read_pixels(values)


def test_without_opencv_a_deep_color_png_is_named(tmp_path, monkeypatch):
    WRITERS["color16.png"](tmp_path / "x.png")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(samples, "import_module", missing)
    with pytest.raises(FrameError, match=r"needs the package cv2.*pip install opencv-python-headless"):
        read_pixels(tmp_path / "x.png")


def test_a_16_bit_frame_is_drawn_on_its_own_scale():
    picture = np.asarray(read_pixels(DEEP[..., 0]).picture())
    np.testing.assert_allclose(picture[..., 1], DEEP[..., 0] / 257, atol=0.51)


def test_every_cut_of_a_file_is_a_frame_error(tmp_path):
    path = tmp_path / "cut.png"
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(COLOR[..., :3]).save(buffer, kind)
        whole = buffer.getvalue()
        refused = 0
        for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            try:
                read_pixels(path)  # the last bytes of a file are not always pixels
            except FrameError:
                refused += 1
        assert refused > 20, kind
