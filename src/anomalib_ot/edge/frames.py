"""One frame: from a file or an array to what the graph takes, and the errors of frames and models."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomalib_ot.imaging.samples import (
    EIGHT_BIT_MAX,
    SIXTEEN_BIT_MAX,
    UNREADABLE,
    Samples,
    file_problem,
    out_of_scale,
    read_problem,
    read_samples,
    size_problem,
)

CHANNELS = (1, 3, 4)
MAX_PIXELS = 50_000_000  # more would take gigabytes before the network has seen any; 14 bytes for each on the way there
# Looked up: a third faster than arithmetic. Multiplied as torchvision does, a division differs in the last bit.
UNIT = np.arange(EIGHT_BIT_MAX + 1, dtype=np.float32) * np.float32(1 / EIGHT_BIT_MAX)


class InspectError(ValueError):
    """An invalid model, source or argument; the message is one line that names it and says what to do."""


class FrameError(ValueError):
    """A frame that cannot be inspected; the message is the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Args:
        name: What results call it; unique in a source, and the same when the source is read again.
        image: A file, or an array (H, W), (H, W, 3) or (H, W, 4) in RGB order of uint8 or uint16.
        problem: Why there is no image, as the end of a sentence that begins with the name; None: there is.
        taken: When the camera gave it, as `time.perf_counter` counts; None: when it is asked for.
        retry: Asked when the file cannot be read: whether the source gives it again later; None: it does not.
    """

    name: str
    image: str | os.PathLike | np.ndarray | None
    problem: str | None = None
    taken: float | None = None
    retry: Callable[[], bool] | None = None


class Pixels(Samples):
    """The samples of a frame as read, (H, W) or (H, W, 3), and the value that stands for 1."""

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.values.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.values.shape[0]

    @property
    def bits(self) -> int:
        """Bits of a sample: 8, 16 or 32."""
        kind = self.values.dtype
        return 16 if kind.kind in "iu" and kind.itemsize > 1 else 8 * kind.itemsize

    def unit(self, channel: int) -> np.ndarray:
        """Return a channel of the frame (0 to 2; of a gray one always the same) as (H, W), float32, in [0, 1]."""
        values, full = self
        plane = values if values.ndim == 2 else values[..., channel]
        return UNIT[plane] if plane.dtype == np.uint8 else plane.astype(np.float32) / np.float32(full)

    def picture(self) -> Image.Image:
        """Return the frame as an RGB picture of 8 bits, for eyes."""
        values, full = self
        if values.dtype != np.uint8:
            scaled = values.astype(np.float32) * (EIGHT_BIT_MAX / full)
            values = scaled.round().clip(0, EIGHT_BIT_MAX).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")


def changed_at(image: str | os.PathLike | np.ndarray | None) -> str | None:
    """Return when a file was last changed, in UTC and to the microsecond; None if it is none, or is not there."""
    if image is None or isinstance(image, np.ndarray):
        return None
    try:
        changed = os.stat(image).st_mtime_ns
        moment = datetime.fromtimestamp(changed // 10**9, timezone.utc)
    except (OSError, ValueError, OverflowError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{changed // 1000 % 10**6:06d}Z"


def read_pixels(image: str | os.PathLike | np.ndarray, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Read a frame as the training reads images, see `imaging.samples.read_samples`; a larger file is not decoded.

    Raises:
        FrameError: If it is missing, damaged, no image of a kind that is read, under 16 pixels on a side, has more than
            `max_pixels`, is outside its scale, or an array of another shape or type.
    """
    found = Pixels(*(_of_array(image) if isinstance(image, np.ndarray) else _of_file(Path(image), max_pixels)))
    width, height = found.width, found.height
    problem = size_problem(width, height)
    if problem is None and width * height > max_pixels:
        problem = f"has {width} x {height} pixels; expected at most {max_pixels / 1e6:g} million: cut it into tiles"
    if problem is None and found.values.dtype != np.uint8:
        problem = out_of_scale(found.values)
    if problem:
        raise FrameError(problem)
    return found


def network_input(pixels: Pixels, size: tuple[int, int] | None) -> np.ndarray:
    """Return what the graph takes, (1, 3, H, W), float32, in [0, 1].

    `size` is (height, width) to resize to, bilinear and antialiased as in training; None: the graph takes any.
    """
    made = np.empty((1, 3, *(size or (pixels.height, pixels.width))), dtype=np.float32)
    is_gray = pixels.values.ndim == 2
    for channel in range(3):
        if channel > 0 and is_gray:
            made[0, channel] = made[0, 0]
            continue
        plane = pixels.unit(channel)
        if made.shape[-2:] != plane.shape:
            # One channel at a time as floats: Pillow rounds what has 8 bits to 8 bits again.
            target = Image.fromarray(np.ascontiguousarray(plane))
            plane = np.asarray(target.resize((made.shape[-1], made.shape[-2]), Image.Resampling.BILINEAR))
        made[0, channel] = plane
    return made


def _of_file(path: Path, max_pixels: int) -> Samples:
    problem = file_problem(path)
    if problem:
        raise FrameError(problem)
    try:
        return read_samples(path, max_pixels)
    except ImportError as error:
        raise FrameError(f"cannot be read: {error}") from error
    except UNREADABLE as error:
        raise FrameError(read_problem(path, error)) from error


def _of_array(values: np.ndarray) -> Samples:
    fits = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in CHANNELS)
    if not fits or values.dtype not in (np.uint8, np.uint16):
        expected = "expected (H, W) or (H, W, 3) of uint8 or uint16"
        raise FrameError(f"is an array of shape {values.shape} and type {values.dtype}; {expected}")
    if values.ndim == 3:
        values = values[..., 0] if values.shape[2] == 1 else values[..., :3]
    return Samples(values, EIGHT_BIT_MAX if values.dtype == np.uint8 else SIXTEEN_BIT_MAX)


class Expected(NamedTuple):
    """Width and height in pixels, and bits of a sample; None for any.

    Example:
        >>> Expected.parse("640x480x8")
        Expected(width=640, height=480, bits=8)
    """

    width: int
    height: int
    bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Expected":
        """Read ``640x480`` or ``640x480x8``."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x(8|16|32))?", text)
        if found is None:
            msg = f"expect is '{text}'; expected WIDTHxHEIGHT or WIDTHxHEIGHTxBITS, such as 640x480x8 (bits 8, 16, 32)"
            raise InspectError(msg)
        return cls(int(found[1]), int(found[2]), None if found[3] is None else int(found[3]))

    def problem(self, pixels: Pixels) -> str | None:
        """Say how a frame differs, as the end of a sentence that begins with its name; None: it does not."""
        if (pixels.width, pixels.height) != (self.width, self.height):
            return f"has {pixels.width} x {pixels.height} pixels; expected {self.width} x {self.height}"
        if self.bits is not None and pixels.bits != self.bits:
            return f"has {pixels.bits} bits per sample; expected {self.bits}"
        return None
