"""A small picture of one part for reports: the part with its anomaly map or its boxes, as JPEG of bounded size."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from anomalib.data import ImageItem
from PIL import Image, ImageDraw

from anomalib_ot.imaging.box_drawing import class_color
from anomalib_ot.imaging.heat import dim_outside, draw_outline, overlay
from anomalib_ot.imaging.small_jpeg import SIDE, small_jpeg
from anomalib_ot.integration.visualization.visualizer import map_array, shown_image

OUTLINE, DARK = (255, 255, 255), (16, 18, 24)


def thumbnail(
    item: ImageItem, boxes: Sequence[Mapping[str, Any]] | None = None, size: tuple[int, int] | None = None
) -> bytes:
    """Draw an item: its anomaly map over the part, with the predicted defect outlined; or the part with its boxes.

    `boxes` are as in a row of a table, in pixels of the (width, height) `size`. A JPEG of at most 40,000 bytes, 320
    pixels wide or high.
    """
    image, _ = shown_image(item)
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if boxes is not None and size is not None:
        draw = ImageDraw.Draw(image)
        factors = np.array([image.width / size[0], image.height / size[1]] * 2)
        for found in boxes:
            left, top, right, bottom = (factors * found["box"]).round().astype(int).tolist()
            draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=DARK, width=4)
            draw.rectangle((left - 1, top - 1, right, bottom), outline=class_color(found["label"])[0], width=2)
    elif item.anomaly_map is not None:
        roi = map_array(getattr(item, "roi", None))
        image = image if roi is None else dim_outside(image, roi > 0)
        image = overlay(image, map_array(item.anomaly_map))
        if item.pred_mask is not None and bool(item.pred_mask.any()):
            image = draw_outline(image, map_array(item.pred_mask) > 0, OUTLINE)
    return small_jpeg(image)
