"""From anomaly maps to boxes: each region grows from a peak, and its box ends where the region falls off steeply."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from anomalib_ot.ranges import Between, Count, Range, Unbounded, Whole, check_fields
from anomalib_ot.vision.detections import Detections, stack_detections

DEFECT = 0
CORNERS_TOUCH = np.ones((3, 3), dtype=bool)
PEAK_WINDOW = 9  # pixels; a peak is the highest pixel of such a square


@dataclass(frozen=True)
class RegionSettings:
    """How boxes are cut out of anomaly maps. Lengths and areas are in pixels of the map.

    Args:
        threshold: Peaks above it start regions, in units of the map; .5 is the pixel threshold of maps that Anomalib
            has normalized.
        extent: How far down a region grows, as a fraction of its peak's height above the background, within (0, 1).
            Smaller values join what is faintly connected: long scratches stay whole, but close neighbors become one.
        edge: Where the box ends, as a fraction of the height of the region near by, `extent` to 1 (excluded). Maps are
            blurred, and peaks of small defects are much wider than the defects; .5 would be their width at half height.
        reach: What "near by" means: the highest pixel at most so far away to each side, >= 0.
        min_area: Smallest area that a region has inside its box's edge, >= 1.
        gap: Boxes are joined if they are at most so far apart both horizontally and vertically, >= 0; at 0 those that
            overlap or touch. Infinite: one box per image.
        max_boxes: Most boxes per image, the best ones, >= 1.
        score: "peak", the highest value of the region, or "mean", the mean inside the edge.

    Raises:
        ValueError: If a setting is out of range.

    >>> RegionSettings(extent=1.5)
    Traceback (most recent call last):
    ...
    ValueError: extent is 1.5; expected a number above 0 and below 1
    """

    threshold: Annotated[float, Range()] = 0.5
    extent: Between = 0.35
    edge: Between = 0.7
    reach: Count = 28
    min_area: Whole = 16
    gap: Unbounded = 0
    max_boxes: Whole = 20
    score: Literal["peak", "mean"] = "peak"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.edge < self.extent:
            raise ValueError(f"edge is {self.edge}; expected a number of at least extent, {self.extent}, and below 1")


def find_regions(anomaly_map: Tensor, settings: RegionSettings | None = None) -> Detections:
    """Find the boxes of the regions of anomaly maps, each image on its own.

    Heights are counted from the background, the median of the image (at most the threshold). A peak, a local maximum
    above the threshold, takes the connected pixels of at least `extent` times its height, unless they meet the region
    of a higher peak: then it is a shoulder of that one. Of a region, the box holds the pixels that are at least `edge`
    times as high as the highest pixel of the region within `reach`. So the threshold decides which regions there are,
    not how large they are; and to stretch or shift a map together with the threshold changes no box.

    Args:
        anomaly_map: Maps (B, 1, H, W), higher is odder, on any scale.
        settings: How to cut; None: the defaults, for normalized maps.

    Returns:
        Boxes in pixels of the map, right and bottom exclusive, in `max_boxes` slots per image, label 0. Scores are in
        units of the map. A constant map has no boxes.

    Raises:
        ValueError: If the maps have another shape, or hold NaN or infinite values.

    >>> anomaly_map = torch.zeros(1, 1, 32, 32)
    >>> anomaly_map[..., 4:10, 20:28] = 0.9
    >>> find_regions(anomaly_map).of_image(0)[0]
    tensor([[20.,  4., 28., 10.]])
    """
    settings = settings or RegionSettings()
    if anomaly_map.ndim != 4 or anomaly_map.shape[1] != 1 or anomaly_map.numel() == 0:
        raise ValueError(f"anomaly_map has the shape {tuple(anomaly_map.shape)}; expected (B, 1, H, W), none of them 0")
    finite = anomaly_map.isfinite().flatten(1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        msg = f"anomaly_map of image {index} holds NaN or infinite values; expected finite ones: look at its input"
        raise ValueError(msg)
    images = []
    for values in anomaly_map.detach().squeeze(1).cpu().double().numpy():
        found = _regions(values, settings)
        boxes = torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4)
        scores = torch.tensor([score for _, score in found], dtype=torch.float32)
        images.append((boxes, scores, torch.full((len(found),), DEFECT)))
    return stack_detections(images, settings.max_boxes).to(anomaly_map.device)


def _regions(values: np.ndarray, settings: RegionSettings) -> list[tuple[list[float], float]]:
    """Find boxes and scores of one map (H, W), in no particular order."""
    if values.min() == values.max():
        return []
    background = min(float(np.median(values)), settings.threshold)
    height = values - background
    found: list[tuple[list[float], float]] = []
    taken = np.zeros(values.shape, dtype=bool)
    for peak in _peaks(height, settings.threshold - background):
        if taken[peak]:
            continue
        parts, _ = ndimage.label(height >= settings.extent * height[peak], CORNERS_TOUCH)
        region = parts == parts[peak]
        is_shoulder = bool((region & taken).any())
        taken |= region
        if is_shoulder:
            continue
        inside = _inside(height, region, settings)
        if inside.sum() < settings.min_area:
            continue
        rows, columns = ndimage.find_objects(inside.astype(np.uint8))[0]
        score = values[inside].max() if settings.score == "peak" else values[inside].mean()
        found.append(([float(side) for side in (columns.start, rows.start, columns.stop, rows.stop)], float(score)))
    return _joined(found, settings.gap)


def _peaks(height: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """List the local maxima above the threshold, highest first; a plateau is one peak."""
    is_peak = (height > threshold) & (height >= ndimage.maximum_filter(height, PEAK_WINDOW))
    plateaus, count = ndimage.label(is_peak, CORNERS_TOUCH)
    peaks = ndimage.maximum_position(height, plateaus, range(1, count + 1))
    return sorted(((int(row), int(column)) for row, column in peaks), key=lambda peak: -height[peak])


def _inside(height: np.ndarray, region: np.ndarray, settings: RegionSettings) -> np.ndarray:
    """Mark the pixels of a region that are high for their surroundings within the region."""
    own = np.where(region, height, 0)
    return region & (own >= settings.edge * ndimage.maximum_filter(own, 2 * settings.reach + 1))


def _joined(found: list[tuple[list[float], float]], gap: float) -> list[tuple[list[float], float]]:
    """Join boxes that are at most `gap` apart until none are; a joined box has the better score."""
    apart: list[tuple[list[float], float]] = []
    for start, best in found:
        box, score = start, best
        while (near := next((other for other in apart if _distance(box, other[0]) <= gap), None)) is not None:
            apart.remove(near)
            corners = list(zip(box, near[0], strict=True))
            box = [min(pair) for pair in corners[:2]] + [max(pair) for pair in corners[2:]]
            score = max(score, near[1])
        apart.append((box, score))
    return apart


def _distance(one: list[float], other: list[float]) -> float:
    """Return the larger of the horizontal and vertical distances of two boxes; negative if they overlap."""
    return max(max(one[axis], other[axis]) - min(one[axis + 2], other[axis + 2]) for axis in (0, 1))
