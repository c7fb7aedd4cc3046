"""How much memory a piece of work takes, for the scripts beside this file. Linux only."""

import threading
from pathlib import Path


def anonymous_memory() -> int:
    """Return the bytes of memory that this process holds, without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def added_at_peak(run: object) -> int:
    """Call and return the bytes of anonymous memory that this adds at its peak, sampled every 2 ms."""
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(peak[0] - before, 0)
