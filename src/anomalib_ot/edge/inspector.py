"""The class behind `anomalib-ot inspect`: frames in, results out, in their order, several at a time."""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from PIL import Image

from anomalib_ot.edge.frames import (
    MAX_PIXELS,
    Expected,
    Frame,
    FrameError,
    InspectError,
    changed_at,
    network_input,
    read_pixels,
)
from anomalib_ot.edge.graph import embedded, file_sha256, first_line, input_size, output_name, read_graph
from anomalib_ot.edge.manifest import Manifest, find_model, read_manifest
from anomalib_ot.edge.results import Result, Stamp, broken, read_outputs

TICK = 0.1  # seconds between two looks whether there is still something to wait for
Image_ = str | os.PathLike | np.ndarray


@dataclass
class _Pending:
    """A frame on its way: with a request that computes, or with a result because there is nothing to compute."""

    name: str
    taken: float
    time: str
    changed: str | None = None
    is_unread: bool = False
    values: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    given: tuple[int, int] = (0, 0)
    picture: Image.Image | None = None
    request: Any = None
    result: Result | None = None


class Inspector:
    """Inspects frames with an exported model; needs OpenVINO, NumPy and Pillow, and nothing of PyTorch.

    Several threads may use one inspector: whoever finds no request free waits for one.

    Args:
        model: ``model.xml``, ``model.onnx``, or the folder of an export.
        device: Device of OpenVINO, such as ``"CPU"``, ``"GPU"`` or ``"AUTO"``.
        requests: Frames in flight at the same time, >= 1; None: twice as many as OpenVINO computes at once. 1 compiles
            for the shortest latency.
        cache: Folder for compiled models, which makes a later start faster; None: no cache.
        threshold: Score above which a frame is defective; None: that of the model.
        expect: What every frame must be, as ``"640x480"`` (width, height) or ``"640x480x8"`` (and bits); None:
            anything.
        views: Whether results keep what there is to draw.
        max_pixels: A frame with more is a broken one; files are not decoded then.

    Raises:
        InspectError: If the model cannot be read, or an argument is invalid.

    Example:
        >>> with Inspector("weights/openvino") as inspector:  # doctest: +SKIP
        ...     inspector.one("bolt_017.png").verdict
        ...     for result in inspector.stream(["bolt_018.png", "bolt_019.png"]):
        ...         print(result.name, result.verdict, result.score)
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        device: str = "CPU",
        requests: int | None = None,
        cache: str | os.PathLike | None = None,
        threshold: float | None = None,
        expect: str | None = None,
        views: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if requests is not None and requests < 1:
            raise InspectError(f"requests is {requests}; expected at least 1, or None for what is best")
        if threshold is not None and not math.isfinite(threshold):
            raise InspectError(f"threshold is {threshold}; expected a number")
        self.path = find_model(model)
        self.threshold = threshold
        self.expected = None if expect is None else Expected.parse(expect)
        self.views = views
        self._max_pixels = max_pixels
        core = openvino.Core()
        if cache is not None:
            core.set_property({"CACHE_DIR": str(made_folder("cache", cache))})
        graph = read_graph(core, self.path)
        names = [output_name(output.names, number) for number, output in enumerate(graph.outputs)]
        self.manifest: Manifest = read_manifest(self.path, names, embedded(graph))
        self._size = input_size(graph, self.manifest, self.path)
        hints = {
            "INFERENCE_PRECISION_HINT": self.manifest.inference_precision,
            "PERFORMANCE_HINT": "LATENCY" if requests == 1 else "THROUGHPUT",
        }
        if device.upper() not in {"CPU", "GPU"}:
            del hints["INFERENCE_PRECISION_HINT"]  # NPU, AUTO and HETERO do not all know it
        try:
            self._compiled = core.compile_model(graph, device, hints)
            best = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        except RuntimeError as error:
            msg = f"device {device!r} does not take the model {self.path} ({first_line(error)}); try device CPU"
            raise InspectError(msg) from error
        self.requests = 2 * best if requests is None else requests
        decides = self.manifest.image_threshold if threshold is None else threshold
        self._stamp = Stamp(self.manifest.title, file_sha256(self.path), self.manifest.sha256, decides)
        self._free = [self._compiled.create_infer_request() for _ in range(self.requests)]
        self._holders: dict[int, int] = {}  # by request, the thread whose stream has it
        self._change = threading.Condition()

    def __enter__(self) -> "Inspector":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model; after that nothing can be inspected. Further calls do nothing."""
        with self._change:
            self._free.clear()
            self._compiled = None
            self._change.notify_all()

    def one(self, image: Image_ | Frame) -> Result:
        """Inspect one frame now: a file, an array (H, W) or (H, W, 3) in RGB of uint8 or uint16, or a `Frame`.

        A frame that cannot be read gives a result with an error.
        """
        if isinstance(image, Frame) and image.retry is not None:
            image = replace(image, retry=lambda: False)  # else the source is to give it again, and there is no result
        return next(self.stream([image]))

    def stream(self, images: Iterable[Image_ | Frame | None]) -> Iterator[Result]:
        """Inspect frames, several at a time; yield a result for each, in their order, with an error where one fails.

        Args:
            images: Files, arrays or frames, read as results are asked for, at most `requests` ahead. None says that
                there is nothing at the moment: what is in flight is finished then.

        Raises:
            InspectError: If the inspector is closed, or other streams of the same thread hold all requests.
        """
        if self._compiled is None:
            raise InspectError("this inspector is closed; make a new one")
        pending: deque[_Pending] = deque()
        try:
            for number, image in enumerate(images):
                if image is None:
                    while pending:
                        yield self._finish(pending)
                    continue
                frame = image if isinstance(image, Frame) else Frame(_name(image, number), image)
                started = self._prepare(frame)
                if started.is_unread and frame.retry is not None and frame.retry():
                    continue
                if started.result is None:
                    while (request := self._take(may_wait=not pending)) is None:
                        yield self._finish(pending)
                    self._start(started, request)
                pending.append(started)
                while pending and self._is_ready(pending[0]):
                    yield self._finish(pending)
            while pending:
                yield self._finish(pending)
        finally:  # whoever stops asking leaves requests behind that still compute
            for left in pending:
                if left.request is not None:
                    left.request.cancel()
                    with suppress(RuntimeError):
                        left.request.wait()
                    self._give(left.request)

    def _take(self, *, may_wait: bool) -> Any:
        """Take a free request; wait for one only if `may_wait`, when nothing of this stream is in flight; else None."""
        me = threading.get_ident()
        with self._change:
            while self._compiled is not None and not self._free:
                if not may_wait:
                    return None
                if all(holder == me for holder in self._holders.values()):
                    msg = "another stream of this inspector is not at its end; finish it, or make a second inspector"
                    raise InspectError(msg)
                self._change.wait(TICK)
            if self._compiled is None:
                raise InspectError("this inspector was closed; make a new one")
            request = self._free.pop()
            self._holders[id(request)] = me
            return request

    def _give(self, request: Any) -> None:
        with self._change:
            self._holders.pop(id(request), None)
            self._free.append(request)
            self._change.notify()

    def _prepare(self, frame: Frame) -> _Pending:
        """Read a frame; whatever is wrong with it becomes its result."""
        taken = time.perf_counter() if frame.taken is None else frame.taken
        made = _Pending(frame.name, taken, _utc(taken), changed_at(frame.image))
        problem = frame.problem
        if problem is None:
            try:
                pixels = read_pixels(frame.image, self._max_pixels)
                if frame.retry is not None and changed_at(frame.image) != made.changed:
                    raise FrameError("was changed while it was read")
                problem = None if self.expected is None else self.expected.problem(pixels)
                if problem is None:
                    made.values = network_input(pixels, self._size)
                    made.size, (height, width) = (pixels.width, pixels.height), made.values.shape[-2:]
                    made.given = (width, height)
                    made.picture = pixels.picture() if self.views else None
            except FrameError as error:
                problem, made.is_unread = str(error), True
            except MemoryError:
                problem = "does not fit into memory; cut it into tiles"
            except Exception as error:
                made.is_unread = True
                problem = f"cannot be read ({type(error).__name__}: {first_line(error)})"
        if problem is not None:
            made.result = broken(frame.name, problem, _since(made.taken))
        return made

    def _start(self, frame: _Pending, request: Any) -> None:
        values, frame.values, frame.request = frame.values, None, request
        try:
            request.start_async({0: values})
        except Exception as error:
            self._fail(frame, error)

    def _fail(self, frame: _Pending, error: Exception) -> None:
        """Make an error of the frame, and its request free."""
        self._give(frame.request)
        frame.request, frame.result = None, broken(frame.name, _failed(error), _since(frame.taken))

    def _is_ready(self, frame: _Pending) -> bool:
        """Whether a frame needs no more waiting; a computation that failed does not."""
        if frame.result is not None:
            return True
        try:
            return frame.request.wait_for(0)
        except RuntimeError as error:
            self._fail(frame, error)
            return True

    def _finish(self, pending: deque[_Pending]) -> Result:
        """Wait for the first of the pending frames, and read what was computed."""
        frame = pending.popleft()
        known = {"time": frame.time, "changed": frame.changed, "stamp": self._stamp}
        if frame.result is not None:
            return replace(frame.result, **known)
        try:
            frame.request.wait()
            names = self.manifest.outputs
            outputs = {name: frame.request.get_output_tensor(i).data for i, name in enumerate(names)}
            keywords = {"picture": frame.picture, "size": frame.size, "given": frame.given}
            made = read_outputs(outputs, self.manifest, name=frame.name, threshold=self.threshold, **keywords)
        except Exception as error:  # whatever a graph gives, its frame has a line and the next one is inspected
            made = broken(frame.name, _failed(error))
        finally:
            self._give(frame.request)
        return replace(made, latency_ms=_since(frame.taken), **known)


def _since(moment: float) -> float:
    return 1000 * (time.perf_counter() - moment)


def _utc(taken: float) -> str:
    """The moment that `time.perf_counter` called so, in UTC."""
    moment = datetime.now(timezone.utc) - timedelta(seconds=time.perf_counter() - taken)
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z"


def _failed(error: Exception) -> str:
    return f"cannot be computed by the model ({first_line(error)})"


def _name(image: Image_, number: int) -> str:
    return f"array {number}" if isinstance(image, np.ndarray) else os.fspath(image)


def made_folder(argument: str, path: str | os.PathLike) -> Path:
    """Make the folder that an argument names, if it is not there; an `InspectError` if that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{argument} is '{folder}', which cannot be made a folder ({error.strerror}); give another"
        raise InspectError(msg) from error
    return folder
