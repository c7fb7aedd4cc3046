"""Image files of every kind: bad ones are named, deep ones are read right, the rest exactly as Anomalib reads it."""

import logging
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_ot.integration.checks import images
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images
from anomalib_ot.integration.data.datamodule_checks import check_datamodule
from anomalib_ot.integration.data.deep_images import check_augmentations, read_image_deep, restore_deep_images
from anomalib_ot.integration.data.mask_regions import read_mask
from anomalib_ot.integration.data.near_duplicates import image_hashes
from anomalib_ot.integration.data.records import image_sizes

HEIGHT, WIDTH = 24, 20
GRAY16 = np.random.default_rng(0).integers(17219, 40606, (HEIGHT, WIDTH), dtype=np.uint16)
COLOR16 = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
COLOR8 = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def write_png(path, samples, color_type):
    """A 16-bit PNG of any color type, written chunk by chunk: the independent witness of the readers."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    gamma = chunk(b"gAMA", struct.pack(">I", 30000))
    body = chunk(b"IHDR", header) + gamma + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def expected16(samples):
    samples = np.repeat(samples[..., None], 3, axis=-1) if samples.ndim == 2 else samples[..., :3]
    return torch.from_numpy(samples.astype(np.float32) / 65535).permute(2, 0, 1)


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def good(tmp_path):
    Image.fromarray(COLOR8[..., :3]).save(tmp_path / "good.png")
    return tmp_path / "good.png"


# Eight bits: exactly the host


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("a.png", ["RGB", "RGBA", "L", "LA", "P", "1"]),
        ("a.jpg", ["RGB", "L", "CMYK"]),
        ("a.tiff", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]),
        ("a.bmp", ["RGB", "RGBA", "L", "P", "1"]),
        ("a.webp", ["RGB", "RGBA"]),
    ],
)
def test_eight_bits_are_read_as_anomalib_reads_them(tmp_path, name, modes):
    for mode in modes:
        path = tmp_path / f"{mode}_{name}"
        image = Image.fromarray(COLOR8)
        (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(path)
        ours = read_image_deep(path)
        assert type(ours) is torch.Tensor
        assert ours.dtype == torch.float32
        assert torch.equal(ours, read_image(path, as_tensor=True).as_subclass(torch.Tensor))
        assert check_images([path], "images").deep == frozenset()


# Sixteen bits


def test_anomalib_saturates_sixteen_bits(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), GRAY16)
    assert read_image(tmp_path / "a.png", as_tensor=True).min() == 1  # when this fails, the host has learnt it
    assert torch.equal(read_image_deep(tmp_path / "a.png"), expected16(GRAY16))


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "big_endian.tif", "gray.pgm"])
def test_gray_sixteen_bits(tmp_path, name):
    path = tmp_path / name
    if name == "big_endian.tif":
        tifffile.imwrite(path, GRAY16, byteorder=">")
    else:
        cv2.imwrite(str(path), GRAY16)
    assert torch.equal(read_image_deep(path), expected16(GRAY16))
    report = check_images([path], "images")
    assert report.deep == {str(path)}


def test_twelve_bits_in_sixteen_keep_the_fixed_scale(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), GRAY16 // 16)
    assert torch.equal(read_image_deep(tmp_path / "a.png"), expected16(GRAY16 // 16))


@pytest.mark.parametrize(("channels", "color_type"), [(3, 2), (4, 6), (2, 4)])
def test_color_png_of_sixteen_bits(tmp_path, channels, color_type):
    path = tmp_path / "a.png"
    samples = COLOR16[..., :channels]
    write_png(path, samples, color_type)
    assert torch.equal(read_image_deep(path), expected16(samples[..., 0] if channels == 2 else samples))
    report = check_images([path], "images")
    assert report.deep == {str(path)}
    assert bool(report.alpha) == (channels != 3)


@pytest.mark.parametrize(
    "options",
    [{}, {"byteorder": ">"}, {"compression": "zlib", "predictor": True}, {"planarconfig": "separate"}, {"pages": 2}],
    ids=str,
)
def test_color_tiff_of_sixteen_bits(tmp_path, options):
    path = tmp_path / "a.tif"
    samples = COLOR16[..., :3]
    stored = np.moveaxis(samples, -1, 0) if "planarconfig" in options else samples
    with tifffile.TiffWriter(path, byteorder=options.get("byteorder")) as writer:
        for page in range(options.get("pages", 1)):
            keep = {key: value for key, value in options.items() if key not in {"byteorder", "pages"}}
            writer.write(stored - page, photometric="rgb", **keep)
    assert torch.equal(read_image_deep(path), expected16(samples))
    assert check_images([path], "images").deep == {str(path)}


def test_tiff_of_sixteen_bits_with_alpha(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, COLOR16, photometric="rgb", extrasamples=["unassalpha"])
    assert torch.equal(read_image_deep(path), expected16(COLOR16))
    assert check_images([path], "images").alpha == (str(path),)


# Float and 32-bit integers


@pytest.mark.parametrize("scale", [1, 255])
def test_float_tiff(tmp_path, scale):
    values = (GRAY16 / 65535 * scale).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert torch.equal(read_image_deep(tmp_path / "a.tif"), torch.from_numpy(values / scale).expand(3, -1, -1))
    assert check_images([tmp_path / "a.tif"], "images").deep == {str(tmp_path / "a.tif")}


@pytest.mark.parametrize("bad", [-1.0, 256.0, float("nan"), float("inf")])
def test_float_tiff_off_its_scale(tmp_path, bad):
    values = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    values[3, 4] = bad
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values)
    for message in (error_of(read_image_deep, path), error_of(check_images, [path], "test images")):
        assert str(path) in message
        assert "save it on that scale" in message or "NaN or infinite" in message


def test_float_images_of_two_scales(tmp_path):
    values = (GRAY16 / 65535).astype(np.float32)
    for name, scale in (("unit", 1), ("byte", 200), ("black", 0)):
        tifffile.imwrite(tmp_path / f"{name}.tif", values * np.float32(scale))
    check_images([tmp_path / "unit.tif", tmp_path / "black.tif"], "images")
    message = error_of(check_images, sorted(tmp_path.iterdir()), "images")
    assert f"{tmp_path / 'unit.tif'} lies in [0, 1]" in message
    assert f"{tmp_path / 'byte.tif'} reaches" in message


def test_integers_of_32_bits(tmp_path):
    tifffile.imwrite(tmp_path / "fits.tif", GRAY16.astype(np.int32))
    assert torch.equal(read_image_deep(tmp_path / "fits.tif"), expected16(GRAY16))
    tifffile.imwrite(tmp_path / "large.tif", GRAY16.astype(np.int32) * 2)
    assert "expected integers from 0 to 65535" in error_of(check_images, [tmp_path / "large.tif"], "images")


# Bad files


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    Image.fromarray(np.kron(COLOR8[..., :3], np.ones((4, 4, 1), np.uint8))).save(path)
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "corrupt":
        path.write_bytes(content[:60] + b"\x55" * 200 + content[260:])
    elif kind == "text":
        path.write_text("seam 12, roll 7: replaced by a note")
    elif kind == "tiny":
        Image.fromarray(COLOR8[:15, :, :3]).save(path)
    return path


KINDS = {
    "missing": "does not exist",
    "folder": "is a folder, not a file",
    "empty": "is empty (0 bytes)",
    "truncated": "is cut off or damaged",
    "corrupt": "is cut off or damaged",
    "text": "is text, not an image",
    "tiny": "is tiny, 20 x 15 pixels",
}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_file_is_named_with_its_cure(tmp_path, good, kind):
    path = damaged(tmp_path, kind)
    message = error_of(check_images, [good, path], "training images")
    assert message.startswith(f"training images: {path} {KINDS[kind]}")
    assert any(cure in message for cure in ("restore it", "replace it", "remove it"))
    assert "more of the" not in message


def test_truncated_jpeg(tmp_path):
    Image.fromarray(np.kron(COLOR8[..., :3], np.ones((8, 8, 1), np.uint8))).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    for message in (error_of(check_images, [tmp_path / "a.jpg"], "x"), error_of(read_image_deep, tmp_path / "a.jpg")):
        assert str(tmp_path / "a.jpg") in message


def test_tiff_that_pillow_cannot_open(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", COLOR16[..., :3].astype(np.float32), photometric="rgb")
    assert "save it with 8 or 16 bits" in error_of(check_images, [tmp_path / "a.tif"], "images")


def test_the_first_bad_file_and_the_number_of_others(tmp_path, good):
    paths = [good, *(damaged(tmp_path, kind) for kind in ("text", "empty", "truncated"))]
    message = error_of(check_images, paths, "test images")
    assert "text.png" in message
    assert "(2 more of the 4 files are bad too, next " in message


def test_report_sorts_the_modes_and_says_so_once(tmp_path, good, caplog):
    caplog.set_level(logging.INFO)
    paths = {mode: tmp_path / f"{mode}.png" for mode in ("RGBA", "LA", "L", "P")}
    for mode, path in paths.items():
        Image.fromarray(COLOR8).convert("RGB").convert(mode).save(path)
    for _ in range(2):
        report = check_images([good, *paths.values(), good], "training images")
    assert report.count == 5
    assert set(report.alpha) == {str(paths["RGBA"]), str(paths["LA"])}
    assert [record.getMessage().count("alpha channel") for record in caplog.records] == [1]


def test_photographs_turned_by_exif_are_counted(tmp_path, caplog):
    paths = []
    for number, orientation in enumerate((None, 1, 3, 6)):
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        paths.append(tmp_path / f"{number}.jpg")
        Image.new("RGB", (40, 30)).save(paths[-1], exif=exif)
    Image.new("RGB", (40, 30)).save(tmp_path / "odd.jpg", exif=b"Exif\0\0damaged")
    report = check_images([*paths, tmp_path / "odd.jpg"], "data toy")
    assert report.turned == (str(paths[2]), str(paths[3]))
    assert f"data toy: 2 of 5 are turned by EXIF orientation (first {paths[2]})" in caplog.text


def test_files_are_decoded_once_until_they_change(tmp_path, good, monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "_decode", lambda name, decode=images._decode: decoded.append(name) or decode(name))
    for _ in range(3):
        check_images([good], "images")
    assert decoded == [str(good)]
    good.write_bytes(b"")
    error_of(check_images, [good], "images")
    Image.fromarray(COLOR8).save(good)
    os.utime(good, ns=(1, 1))
    check_images([good], "images")
    assert len(decoded) == 3


# Putting deep images back


@pytest.fixture
def mixed(tmp_path):
    """A folder with 8-bit and 16-bit images of several sizes."""
    (tmp_path / "good").mkdir()
    for index in range(3):
        Image.fromarray(np.roll(COLOR8[..., :3], index, axis=0)).save(tmp_path / "good" / f"eight{index}.png")
        cv2.imwrite(str(tmp_path / "good" / f"sixteen{index}.png"), GRAY16[: HEIGHT - index])
    datamodule = Folder(name="mixed", root=tmp_path, normal_dir="good", num_workers=0, train_batch_size=8, seed=0)
    datamodule.setup("fit")
    datamodule.train_data.augmentations = Resize((16, 18), antialias=True)
    return datamodule


def test_restored_batch(mixed):
    data = mixed.train_data
    batch = ImageBatch.collate([data[index] for index in range(len(data))])
    deep = check_images(batch.image_path, "images").deep
    restored = restore_deep_images(batch.image, batch.image_path, deep, data.augmentations)
    assert restored.shape == batch.image.shape
    kinds = set()
    for path, host, ours in zip(batch.image_path, batch.image, restored, strict=True):
        kinds.add(path in deep)
        if path in deep:
            assert host.min() > 0.999
            assert torch.equal(ours, data.augmentations(read_image_deep(path)))
            assert ours.max() < 0.7
        else:
            assert torch.equal(ours, host)
    assert kinds == {True, False}
    assert restored is not batch.image
    assert batch.image.max() > 0.999  # the loader's batch itself stays as it came

    everything = restore_deep_images(batch.image, batch.image_path, set(batch.image_path), data.augmentations)
    assert torch.equal(everything, restored)  # reading 8-bit files again gives the host's batch, bit for bit


def test_without_deep_paths_the_batch_itself_comes_back():
    batch = torch.rand(2, 3, 8, 8)

    def never(_):
        raise AssertionError("resize was called")

    assert restore_deep_images(batch, ["a.png", "b.png"], frozenset(), never) is batch
    assert restore_deep_images(batch, ["a.png", "b.png"], {"other.png"}, never) is batch


def test_size_that_does_not_fit_the_batch(mixed):
    path = sorted(str(path) for path in mixed.train_data.samples.image_path if "sixteen" in path)[0]
    message = error_of(restore_deep_images, torch.zeros(1, 3, 64, 64), [path], {path}, None)
    assert path in message
    assert "(64, 64)" in message


def test_augmentations_of_deep_images(mixed):
    paths = list(mixed.train_data.samples.image_path)
    deep = check_images(paths, "images").deep
    mixed.train_augmentations = Compose([Resize(16), Compose([RandomHorizontalFlip()])])
    message = error_of(check_augmentations, mixed, deep)
    assert "--data.train_augmentations holds RandomHorizontalFlip" in message
    assert min(deep) in message
    check_augmentations(mixed, frozenset())
    check_augmentations(mixed, {"an image of another subset.png"})
    mixed.train_augmentations = Compose([Resize(16)])
    check_augmentations(mixed, deep)
    mixed.val_split_mode = "synthetic"
    assert "synthetic anomalies cannot be made from 16-bit" in error_of(check_augmentations, mixed, deep)


# Programs under the name of an image


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize("reader", [check_images, image_sizes, image_hashes, read_mask, check_datamodule])
def test_no_reader_starts_a_program(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *words: pytest.fail("Ghostscript was started"))
    names = [tmp_path / "good" / f"{number}.png" for number in range(3)]
    names += [tmp_path / "bad/0.png", tmp_path / "masks/0.png"]
    for path in names:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(COLOR8[..., :3]).save(path)
    bad = names[4] if reader in (read_mask, check_datamodule) else names[0]
    bad.write_bytes(PROGRAM)
    if reader is check_datamodule:
        data = Folder("set", root=tmp_path, normal_dir="good", abnormal_dir="bad", mask_dir="masks", seed=0)
        said = error_of(reader, data, "fit")
    elif reader is check_images:
        said = error_of(reader, names[:3], "images")
    else:
        said = error_of(reader, bad if reader is read_mask else [str(path) for path in names[:3]])
    assert str(bad) in said
    assert "EPS" in said or "cannot be read" in said
