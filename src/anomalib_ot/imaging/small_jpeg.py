"""Pictures of bounded size for a page that many of them go into."""

import io

from PIL import Image

SIDE, MOST_BYTES, QUALITIES = 320, 40_000, (85, 70, 50, 30, 10)


def small_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB image as a JPEG of at most 40,000 bytes, as good as it can be.

    >>> len(small_jpeg(Image.new("RGB", (SIDE, SIDE)))) < MOST_BYTES
    True
    """
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MOST_BYTES:
            break
    return file.getvalue()
