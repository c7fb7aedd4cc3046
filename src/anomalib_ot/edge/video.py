"""Frames of a video file or a camera, read by OpenCV, which nothing else here needs."""

import queue
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from types import ModuleType

from anomalib_ot.edge.frames import Frame
from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.polling import polled

__all__ = ["camera_frames", "video_frames"]

RETRY = 1.0  # seconds
AHEAD = 8  # frames that wait in memory; a camera that is faster than the inspection waits, or drops some itself


def video_frames(path: str) -> Iterator[Frame]:
    """Read a video file; frames are called ``path#000000`` and so on.

    Args:
        path: The file.

    Yields:
        Frames in RGB order. Where the file ends before the number of frames that it claims, one with that problem.

    Raises:
        InspectError: If OpenCV is not installed, or does not read the file.
    """
    cv2 = _opencv(f"the video {path}")
    capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        msg = f"the video {path} cannot be read by OpenCV; is it whole? Convert it to MP4 (H.264) or to images"
        raise InspectError(msg)
    return _read_video(cv2, capture, path)


def _read_video(cv2: ModuleType, capture, path: str) -> Iterator[Frame]:
    claimed, number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
    try:
        while True:
            is_read, image = capture.read()
            if not is_read:
                break
            yield Frame(f"{path}#{number:06d}", cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            number += 1
        if number < claimed:
            problem = f"cannot be read: the video ends after {number} of {claimed} frames; it is cut off or damaged"
            yield Frame(f"{path}#{number:06d}", None, problem)
    finally:
        capture.release()


def camera_frames(index: int, stop: threading.Event, stalled_after: float | None = None) -> Iterator[Frame | None]:
    """Read a camera until told to stop; frames are called ``camera0@`` and the time in UTC.

    A thread reads, so that a camera that waits for its trigger, or hangs, holds up neither what is on its way nor the
    wish to stop. A camera that is lost gives one broken frame, and is opened again every second until it is back.

    Args:
        index: Number of the camera.
        stop: Set by whoever wants no more frames.
        stalled_after: Seconds without a frame after which there is one broken frame; None: a trigger may take long.

    Returns:
        Frames in RGB order, and None while there is none.

    Raises:
        InspectError: If OpenCV is not installed, or there is no such camera at the start.
    """
    cv2 = _opencv(f"camera {index}")
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        msg = f"camera {index} cannot be opened; is it connected, and used by no other program? Cameras count from 0"
        raise InspectError(msg)
    frames: queue.Queue[Frame | BaseException] = queue.Queue(maxsize=AHEAD)

    def read() -> None:
        try:
            for frame in _read_camera(cv2, capture, index, stop):
                frames.put(frame)
        except BaseException as error:
            frames.put(error)

    threading.Thread(target=read, daemon=True).start()  # a daemon: who hangs in a driver cannot be waited for
    return _watch_camera(frames, index, stop, stalled_after)


def _watch_camera(
    frames: "queue.Queue[Frame | BaseException]", index: int, stop: threading.Event, stalled_after: float | None
) -> Iterator[Frame | None]:
    last, is_told = time.monotonic(), False
    for frame in polled(frames):
        if stop.is_set():
            return
        if isinstance(frame, BaseException):
            raise frame
        if frame is not None:
            last, is_told = time.monotonic(), False
        elif stalled_after is not None and not is_told and time.monotonic() - last >= stalled_after:
            is_told = True
            problem = f"has no image: camera {index} has given none for {stalled_after:g} s; it is waited for"
            yield Frame(_camera_name(index), None, problem)
        yield frame


def _camera_name(index: int) -> str:
    return f"camera{index}@{datetime.now(timezone.utc).isoformat(timespec='microseconds')}"


def _read_camera(cv2: ModuleType, capture, index: int, stop: threading.Event) -> Iterator[Frame]:
    is_lost = False
    try:
        while not stop.is_set():
            is_read, image = capture.read()
            name, taken = _camera_name(index), time.perf_counter()
            if is_read:
                is_lost = False
                yield Frame(name, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), taken=taken)
                continue
            if not is_lost:
                problem = f"has no image: camera {index} gives none; it is tried again every second"
                yield Frame(name, None, problem, taken)
            is_lost = True
            capture.release()
            stop.wait(RETRY)
            capture = cv2.VideoCapture(index)
    finally:
        capture.release()


def _opencv(what: str) -> ModuleType:
    try:
        return import_module("cv2")
    except ImportError as error:
        msg = f"{what} needs OpenCV, which is not installed: pip install opencv-python-headless, or save images instead"
        raise InspectError(msg) from error
