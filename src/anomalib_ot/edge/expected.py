"""What every frame of a camera must be: its size and, if need be, its depth."""

import re
from typing import NamedTuple

from anomalib_ot.edge.frames import Pixels
from anomalib_ot.edge.inspect_error import InspectError

__all__ = ["Expected"]


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
