"""Full precision for transport: float32 at least, whatever the input's type and whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which autocast leaves operations on this tensor's device alone.

    Where autocast is off already the context does nothing, so that a traced graph carries no trace of it.
    """
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor as float32, or as float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
