"""Why a part is bad, in numbers: the share of each cause, and which patches belong elsewhere."""

from typing import NamedTuple

import numpy as np

TOP_SHARE = 0.01  # of the pixels, where no pixel is predicted defective
NORMAL_QUANTILE = 0.25  # of a map's pixels: a defect may cover most of a part
BOW = 0.12  # how far the middle of an arrow leaves the straight line, in lengths
LEAST_SHARE = 0.5  # of the strongest patch
LEAST_DISPLACEMENT = 2.0  # of a patch from its prototype, in patches
SIDE_BY_SIDE = 0.5  # least distance between the middle parts of two arrows, in patches
ONE_THING = 0.15  # arrows that start and end this near to each other, in sides of the part, tell of one thing


class CauseShares(NamedTuple):
    """How much of the anomaly each cause explains, in percent; the three sum to 100."""

    feature: int
    position: int
    missing: int = 0

    def words(self) -> list[str]:
        """Say the causes in words, the greatest first; one without a share is left out.

        >>> CauseShares(20, 0, 80).words()
        ['missing 80 %', 'looks wrong 20 %']
        """
        named = [(self.feature, "looks wrong"), (self.position, "wrong place"), (self.missing, "missing")]
        return [f"{word} {share} %" for share, word in sorted(named, reverse=True) if share > 0]


class Arrow(NamedTuple):
    """From where a patch is to where such a patch belongs, in fractions of the image's height (y) and width (x)."""

    from_y: float
    from_x: float
    to_y: float
    to_x: float
    strength: float


def normal_level(values: np.ndarray) -> float:
    """Return the lower quartile of a map (H, W): normal surroundings are not at 0, their looks vary too."""
    return float(np.quantile(values, NORMAL_QUANTILE))


def cause_shares(
    anomaly_map: np.ndarray,
    feature_map: np.ndarray,
    position_map: np.ndarray,
    pred_mask: np.ndarray | None = None,
    missing_map: np.ndarray | None = None,
) -> CauseShares | None:
    """Share the anomaly between its causes, inside the predicted mask or else in the top 1 % of the pixels.

    The share of map m is Σ (m − n_m)⁺ over the sum of the same of all maps, with n_m the normal level of the map: what
    normal surroundings have too is the cause of nothing.

    Args:
        anomaly_map: (H, W), ranks the pixels where no mask is predicted.
        feature_map: (H, W), >= 0.
        position_map: (H, W), >= 0.
        pred_mask: (H, W) bool; without one, or with an empty one, the top 1 % (at least one pixel) counts.
        missing_map: (H, W), >= 0; None where the model has none.

    Returns:
        Whole percents that sum to 100, or None if no cause rises above its normal level there.

    Example:
        >>> feature_map, position_map = np.full((4, 4), 0.4), np.zeros((4, 4))
        >>> feature_map[0, 0], position_map[0, 0] = 0.5, 0.3
        >>> cause_shares(feature_map + position_map, feature_map, position_map)
        CauseShares(feature=25, position=75, missing=0)
    """
    if pred_mask is not None and pred_mask.any():
        region = pred_mask.astype(bool)
    else:
        count = max(1, round(TOP_SHARE * anomaly_map.size))
        region = anomaly_map >= np.partition(anomaly_map.ravel(), -count)[-count]
    maps = (feature_map, position_map) if missing_map is None else (feature_map, position_map, missing_map)
    found = [float((values[region] - normal_level(values)).clip(min=0).sum()) for values in maps]
    if not sum(found) > 0:
        return None
    feature, _, *rest = (100 * part / sum(found) for part in found)
    missing = round(rest[0]) if rest else 0
    percent = min(round(feature), 100 - missing)
    return CauseShares(percent, 100 - missing - percent, missing)


def arrows(
    position_map: np.ndarray,
    matched_position: np.ndarray,
    *,
    max_arrows: int = 8,
    min_strength: float = 0.25,
    spacing: float = 3.0,
) -> list[Arrow]:
    """Choose the few most misplaced patches and point each to where it belongs.

    A patch counts if it is a local maximum of the position map (mean over the patch), strong enough, and matched to a
    prototype far enough away. Patches are taken strongest first; one is left out if it starts too near to another, if
    it belongs to the same thing as another (near, and sent to the same place), or if its arrow would run over
    another's. Two swapped parts both keep their arrows: the arrows bow apart.

    Args:
        position_map: (H, W) part of the anomaly map that is due to place, >= 0, H >= h and W >= w.
        matched_position: (2, h, w) y and x of each patch's prototype in [0, 1]; 0 is the center of the first row or
            column of the patch grid, 1 that of the last.
        max_arrows: Most arrows to return.
        min_strength: Least strength in units of the map; 0.25 is half of the threshold of a normalized map.
        spacing: Least distance between the starts of two arrows, in patches.

    Returns:
        Arrows, strongest first.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> matched = np.stack(np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5), indexing="ij"))
        >>> matched[:, 0, 0] = 1.0, 0.5  # the patch in the top left corner belongs in the middle of the last row
        >>> position_map = np.zeros((5, 5)); position_map[0, 0] = 0.8
        >>> [tuple(round(float(value), 6) for value in arrow) for arrow in arrows(position_map, matched)]
        [(0.1, 0.1, 0.9, 0.5, 0.8)]
    """
    if matched_position.ndim != 3 or matched_position.shape[0] != 2:
        raise ValueError(f"matched_position has shape {matched_position.shape}; expected (2, h, w), y before x.")
    grid = np.array(matched_position.shape[1:])
    if position_map.ndim != 2 or (position_map.shape < grid).any():
        msg = f"position_map has shape {position_map.shape}; expected (H, W), at least the patch grid {tuple(grid)}."
        raise ValueError(msg)
    strengths = _patch_means(position_map, grid)
    least = max(min_strength, LEAST_SHARE * strengths.max())
    rows, columns = np.nonzero(_local_maxima(strengths) & (strengths >= least))
    chosen: list[Arrow] = []
    taken: list[np.ndarray] = []
    for index in np.argsort(-strengths[rows, columns], kind="stable"):
        if len(chosen) == max_arrows:
            break
        row, column = rows[index], columns[index]
        start = np.array([row, column], dtype=float)
        end = matched_position[:, row, column].clip(0, 1) * (grid - 1)
        line = bowed_line(start, end)
        if np.linalg.norm(end - start) < LEAST_DISPLACEMENT:
            continue
        if any(_one_thing(line, other, grid) or not _apart(line, other, spacing) for other in taken):
            continue
        ends = [*(start + 0.5) / grid, *(end + 0.5) / grid]
        chosen.append(Arrow(*map(float, ends), strength=float(strengths[row, column])))
        taken.append(line)
    return chosen


def bowed_line(start: np.ndarray, end: np.ndarray, points: int = 25, bow: float = BOW) -> np.ndarray:
    """Return `points` (y, x) of an arc that always bows to the same side, so that swapped ends bow apart.

    `bow` is how far the middle leaves the straight line, in lengths.
    """
    along = np.linspace(0, 1, points)[:, None]
    side = np.array([-(end - start)[1], (end - start)[0]])
    return start + along * (end - start) + 4 * bow * along * (1 - along) * side


def _patch_means(position_map: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Mean of the map over each patch; patches may differ by a pixel where the sizes do not divide."""
    rows, columns = (np.arange(cells) * pixels // cells for cells, pixels in zip(grid, position_map.shape, strict=True))
    sums = np.add.reduceat(np.add.reduceat(position_map.astype(float), rows, axis=0), columns, axis=1)
    heights, widths = (np.diff([*edges, size]) for edges, size in zip((rows, columns), position_map.shape, strict=True))
    return sums / np.outer(heights, widths)


def _local_maxima(strengths: np.ndarray) -> np.ndarray:
    """Where a patch is at least as strong as each of its eight neighbors."""
    padded = np.pad(strengths, 1, constant_values=-np.inf)
    return strengths >= np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).max(axis=(2, 3))


def _apart(line: np.ndarray, other: np.ndarray, spacing: float) -> bool:
    """Whether two arrows start far enough from each other and their middle parts do not touch."""
    if np.linalg.norm(line[0] - other[0]) < spacing:
        return False
    inner = slice(len(line) // 5, len(line) - len(line) // 5)
    gaps = np.linalg.norm(line[inner, None] - other[None, inner], axis=-1)
    return bool(gaps.min() >= SIDE_BY_SIDE)


def _one_thing(line: np.ndarray, other: np.ndarray, grid: np.ndarray) -> bool:
    """Whether two arrows start near to each other and end near to each other, in sides of the patch grid."""
    return all(bool(np.linalg.norm((line[end] - other[end]) / grid) < ONE_THING) for end in (0, -1))
