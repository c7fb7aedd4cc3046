"""The samples of an image file on the scale of its format, and what is wrong with a file that has none."""

import math
import os
import stat
import struct
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

MIN_SIDE = 16  # pixels; less than one patch of any backbone
SIXTEEN_BIT_MAX = 65535
EIGHT_BIT_MAX = 255
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
UNREADABLE = (*DECODE_ERRORS, Image.DecompressionBombError)
# Whatever a file is called, Pillow looks at what it holds, and starts other programs for some kinds (EPS): these only.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
FOREIGN = {b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"8BPS": "PSD", b"<svg": "SVG"}
FOREIGN |= {b"\x89HDF": "HDF5", b"\0\0\1\0": "ICO", b"\xd7\xcd\xc6\x9a": "WMF", b"DDS ": "DDS", b"BUFR": "BUFR"}
FOREIGN |= {b"GRIB": "GRIB", b"icns": "ICNS", b"\0\0\1\xba": "MPEG", b"qoif": "QOI", b"SIMPLE": "FITS"}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


class Samples(NamedTuple):
    """The samples of an image, not yet scaled."""

    values: np.ndarray  # (H, W, 3) of uint8, or (H, W) or (H, W, 3) of a deeper type
    full: int  # the value that stands for 1, on the scale of the format, whatever part of it the image uses


def read_samples(path: str | Path, max_pixels: int | None = None) -> Samples:
    """Read an image without losing depth, on a scale that depends on its format and never on its content.

    8-bit files of any kind come as RGB, as Anomalib reads them: an alpha channel is dropped, a palette expanded, one
    channel repeated to three, an orientation tag ignored. 16-bit files are on the scale of 65535. Float files are taken
    as [0, 1] if their greatest value is at most 1, else as [0, 255].

    Raises:
        ImportError: If the file has several 16-bit channels, and OpenCV (PNG) or tifffile (TIFF) is not installed.
        Exception: One of `UNREADABLE` if the file cannot be read or has over `max_pixels`; see `read_problem`.
    """
    with Image.open(path, formats=FORMATS) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            msg = f"{image.width} x {image.height} pixels, expected at most {max_pixels / 1e6:g} million"
            raise Image.DecompressionBombError(msg)
        sample = sample_format(image)
        if sample == "8":
            return Samples(np.asarray(image.convert("RGB")), EIGHT_BIT_MAX)
        values = _color_samples(path, image.format) if sample == "16 color" else np.asarray(image)
    if values.dtype.kind == "f":
        return Samples(values, 1 if values.max() <= 1 else EIGHT_BIT_MAX)
    return Samples(values, SIXTEEN_BIT_MAX)


def sample_format(image: Image.Image) -> str:
    """Tell how an opened, not yet loaded image stores a sample.

    ``"float"``, ``"16"`` (one channel of 16 or 32 bits), ``"16 color"`` (PNG and TIFF with several 16-bit channels,
    which PIL cuts to 8), or ``"8"`` for everything that Anomalib's 8-bit reading gets right.
    """
    if image.mode == "F":
        return "float"
    if image.mode.startswith("I"):
        return "16"
    if image.mode in {"RGB", "RGBA", "LA"}:
        if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) == 16:
            return "16 color"
        if image.format == "PNG" and any(";16" in str(tile.args) for tile in image.tile):
            return "16 color"
    return "8"


def file_problem(path: str | Path) -> str | None:
    """Say why there is nothing to decode at a path, as the end of a sentence that begins with it; None: there is."""
    try:
        status = os.stat(path)
    except PermissionError:
        return "may not be read (no permission); change its permissions"
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return "does not exist; restore it or correct the path"
    if stat.S_ISDIR(status.st_mode):
        return "is a folder, not a file; remove it or rename it"
    if not stat.S_ISREG(status.st_mode):
        return "is a pipe or a device, not a file; remove it"
    if status.st_size == 0:
        return "is empty (0 bytes); restore it or remove it"
    return None


def size_problem(width: int, height: int) -> str | None:
    """Say that an image is too small for any model, as the end of a sentence that begins with its name."""
    if min(width, height) < MIN_SIDE:
        return f"is tiny, {width} x {height} pixels; expected at least {MIN_SIDE} on each side: remove it"
    return None


def read_problem(path: str | Path, error: BaseException) -> str:
    """Put one of the exceptions `UNREADABLE` into words, as the end of a sentence that begins with the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(path)
    if isinstance(error, PermissionError):
        return "may not be read (no permission); change its permissions"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than are read ({error}); cut it into tiles"
    return f"is cut off or damaged ({' '.join(str(error).split())}); restore it or remove it"


def out_of_scale(values: np.ndarray) -> str | None:
    """Say what is wrong with the values of a 16-bit or float image, as the end of a sentence; None: nothing."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not (math.isfinite(low) and math.isfinite(high)):
            return "holds NaN or infinite values; replace them"
        limit, scale = EIGHT_BIT_MAX, "float values in [0, 1] or [0, 255]"
    else:
        limit, scale = SIXTEEN_BIT_MAX, "integers from 0 to 65535"
    if low < 0 or high > limit:
        return f"holds values from {low:g} to {high:g}; expected {scale}: save it on that scale"
    return None


def _color_samples(path: str | Path, file_format: str | None) -> np.ndarray:
    """Read several 16-bit channels as (H, W, 3) in the order red, green, blue."""
    if file_format == "TIFF":
        tifffile = _module("tifffile", "tifffile", "a TIFF with several 16-bit channels")
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            values = page.asarray()
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                values = np.moveaxis(values, 0, -1)
        return np.repeat(values[..., :1], 3, axis=-1) if values.shape[-1] == 2 else values[..., :3]
    cv2 = _module("cv2", "opencv-python-headless", "a PNG with several 16-bit channels")
    try:
        values = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(str(error)) from error
    if values is None or values.dtype != np.uint16:
        raise ValueError("OpenCV does not read its 16-bit channels")
    return values[..., 2::-1]  # blue, green, red, and perhaps alpha


def _module(name: str, package: str, what: str) -> ModuleType:
    """Import what only few files need."""
    try:
        return import_module(name)
    except ImportError as error:
        msg = f"{what} needs the package {name}, which is not installed: pip install {package}"
        raise ImportError(msg) from error


def _unidentified(path: str | Path) -> str:
    """Say what a file is that is none of `FORMATS`, as far as its first bytes tell."""
    with open(path, "rb") as file:
        head = file.read(256)
    if head[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return (
            "is a TIFF of a kind that Pillow, and so Anomalib, cannot read (several float channels, 64 bits, unusual "
            "compression or damage); save it with 8 or 16 bits"
        )
    kind = next((kind for start, kind in FOREIGN.items() if head.startswith(start)), BRANDS.get(head[8:12]))
    if kind is not None:
        return f"is a file of kind {kind}, which is not read, whatever its name says; save it as PNG"
    text = "text, " if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head) else ""
    return f"is {text}not an image, whatever its name says; replace it by the image or remove it"
