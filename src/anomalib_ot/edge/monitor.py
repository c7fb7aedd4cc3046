"""What there is to see of a running inspection: the last frames, how fast, and whether the scores drift."""

import io
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from anomalib_ot.edge.drawing import draw_view
from anomalib_ot.edge.drift import Drift
from anomalib_ot.edge.manifest import Manifest
from anomalib_ot.edge.results import DEFECT, Result, View

HISTORY = 24  # frames on the page
PICTURE_EVERY = 0.5  # seconds; the page looks as often, and more pictures cost the inspection time
PICTURE_SIDES = (480, 960)  # pixels
MAP_SIDE = 512
SPEED_OVER, LATENCIES = 10.0, 500  # seconds; frames
QUALITY = 85


@dataclass
class _Shown:
    """A frame on the page, with its picture once somebody has looked at it."""

    number: int
    result: Result
    is_kept: bool  # whether its picture stays when a newer frame comes
    moment: float
    drawn: bytes | None = None

    def summary(self) -> dict[str, Any]:
        found = self.result
        return {
            "number": self.number,
            "name": found.name,
            "verdict": found.verdict,
            "score": found.score,
            "error": found.error,
            "boxes": None if found.boxes is None else [f"{box.name} {box.score:.2f}" for box in found.boxes[:8]],
            "area": None if found.map is None else found.map.area,
            "causes": None if found.causes is None else found.causes.words(),
            "count_is_anomalous": found.count_is_anomalous,
            "picture": found.view is not None,
        }


class Monitor:
    """Keeps the last results of an inspection, in bounded memory, for whoever looks; used by several threads."""

    def __init__(self, manifest: Manifest, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._manifest = manifest
        self._source = source
        self._clock = clock
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._history: deque[_Shown] = deque(maxlen=HISTORY)
        self._last_defect: _Shown | None = None
        self._counts: Counter[str] = Counter()
        self._moments: deque[float] = deque()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._pictured = {True: -PICTURE_EVERY, False: -PICTURE_EVERY}  # when, by whether it was a defect
        self._drift = Drift(manifest.good_quantiles, manifest.good_count)
        self._ended = ""

    def add(self, result: Result) -> None:
        """Take a result. The last frame and the last defect have their picture, of those before them only some."""
        now, is_defect = self._clock(), result.verdict == DEFECT
        is_kept = result.view is not None and now - self._pictured[is_defect] >= PICTURE_EVERY
        if is_kept:
            self._pictured[is_defect] = now
            result = replace(result, view=_small(result.view))
        with self._lock:
            shown = _Shown(self._counts.total() + 1, result, is_kept, now)
            former = [*list(self._history)[-1:], self._last_defect]
            self._counts[result.verdict] += 1
            self._history.append(shown)
            if is_defect:
                self._last_defect = shown
            for one in former:
                if one is not None and one is not self._last_defect and not one.is_kept:
                    one.result, one.drawn = replace(one.result, view=None), None
            self._moments.append(now)
            self._forget(now)
            if result.error is None:
                self._latencies.append(result.latency_ms)
                self._drift.add(result.score)

    def end(self, reason: str) -> None:
        """Say that no more frames come, and why."""
        with self._lock:
            self._ended = reason

    def state(self) -> dict[str, Any]:
        """Return what the page shows, ready for JSON."""
        now = self._clock()
        with self._lock:
            self._forget(now)
            latencies = list(self._latencies)
            age = now - self._moments[-1] if self._moments else None
            span = min(SPEED_OVER, now - self._moments[0]) if self._moments and age <= SPEED_OVER else 0.0
            made = {
                "model": self._manifest.title,
                "source": self._source,
                "frames": self._counts.total(),
                "counts": dict(self._counts),
                "per_second": len(self._moments) / span if span > 0 else 0.0,
                "age": age,
                "ended": self._ended,
                "history": [shown.summary() for shown in self._history],
                "defect_age": None if self._last_defect is None else now - self._last_defect.moment,
                "last_defect": None if self._last_defect is None else self._last_defect.summary(),
                "drift": asdict(self._drift.report()),
            }
        made["latency_median"], made["latency_95"] = (
            (float(np.quantile(latencies, level)) if latencies else None) for level in (0.5, 0.95)
        )
        return made

    def picture(self, number: int) -> bytes | None:
        """Return the picture of a frame as JPEG, None if it is no longer kept; it is drawn once, whoever asks."""
        with self._drawing:
            with self._lock:
                kept = [*self._history] + ([] if self._last_defect is None else [self._last_defect])
                shown = next((one for one in kept if one.number == number and one.result.view is not None), None)
                result, drawn = (None, None) if shown is None else (shown.result, shown.drawn)
            if result is None or drawn is not None:
                return drawn
            buffer = io.BytesIO()
            draw_view(result, self._manifest.pixel_threshold, PICTURE_SIDES).save(buffer, "JPEG", quality=QUALITY)
            shown.drawn = drawn = buffer.getvalue()
            return drawn

    def _forget(self, now: float) -> None:
        """Drop the moments that speed is no longer counted from, but never the last."""
        while len(self._moments) > 1 and now - self._moments[0] > SPEED_OVER:
            self._moments.popleft()


def _small(view: View) -> View:
    """What the page needs of a view."""
    picture = view.picture.copy()
    picture.thumbnail((PICTURE_SIDES[1], PICTURE_SIDES[1]), Image.Resampling.BOX)
    if view.anomaly_map is None or max(view.anomaly_map.shape) <= MAP_SIDE:
        return View(picture, view.anomaly_map, view.mask, view.roi)
    scale = MAP_SIDE / max(view.anomaly_map.shape)
    size = tuple(max(1, round(scale * side)) for side in reversed(view.anomaly_map.shape))
    values = np.asarray(Image.fromarray(view.anomaly_map).resize(size, Image.Resampling.BOX))
    mask = view.mask
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127
    return View(picture, values, mask, view.roi)
