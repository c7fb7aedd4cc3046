"""What lets a model without trainable weights train on several processes."""

from torch import Tensor, nn, zeros

__all__ = ["GradientAnchor"]


class GradientAnchor(nn.Module):
    """A parameter that nothing uses and no checkpoint holds.

    `DistributedDataParallel` refuses a module none of whose parameters asks for a gradient. OTPrototypes has no
    gradients to share between processes: it gathers embeddings.

    >>> GradientAnchor().state_dict()
    OrderedDict()
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(zeros(1))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        del destination, prefix, keep_vars

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        del state_dict, prefix, args
