"""What a thread has put into a queue, taken without ever holding up what is on its way."""

import queue
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")
TICK = 0.1  # seconds between two looks at the wish to stop


def polled(items: "queue.Queue[Item]") -> Iterator[Item | None]:
    """Yield items of a queue that another thread fills, without end; None while there is none, every 0.1 s."""
    while True:
        try:
            item = items.get_nowait()
        except queue.Empty:
            yield None
            try:
                item = items.get(timeout=TICK)
            except queue.Empty:
                continue
        yield item
