"""Threads for the size of a problem: small ones on one, which waits for nobody."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

# Every operation of several threads ends when the last of them does. Beside a busy program that thread may wait for a
# core for milliseconds, many times an iteration; up to this many pairs a second thread gains less than it risks.
MOST_ON_ONE_THREAD = 1 << 23


def is_traced() -> bool:
    """Say whether a graph is being recorded, in which nothing may look at a value."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def threads_for(pairs: Tensor) -> AbstractContextManager:
    """Return a context that works on one thread where a problem is small, and then gives back the number there was.

    The tensor has an element per pair, as the cost (B, N, M) has. On another device than a CPU, in a graph that is
    being recorded, and above `MOST_ON_ONE_THREAD` elements the context does nothing. torch's number of threads belongs
    to the thread that sets it; a thread whose first operation in torch falls into another one's small problem begins
    with one.
    """
    if is_traced() or pairs.device.type != "cpu" or pairs.numel() > MOST_ON_ONE_THREAD:
        return nullcontext()
    return _one_thread() if torch.get_num_threads() > 1 else nullcontext()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
