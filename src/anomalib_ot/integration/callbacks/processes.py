"""What several processes know together."""

from typing import Any

from torch import distributed as dist


def from_all(own: Any) -> list[Any]:
    """Gather an object that can be pickled from all processes, in their order; there may be one only."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered
