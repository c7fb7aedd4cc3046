"""Anomalib's image item and batch with room for an explanation: how much each cause adds to each pixel's anomaly.

The anomaly map is the sum of up to three causes: feature ("looks wrong"), position ("is in the wrong place") and, with
a transport score, missing ("is not there"). The classes here keep that sum true. Anomalib's post-processor rescales
`anomaly_map` alone; whenever `anomaly_map` is set, the parts follow it, each pixel keeping its ratio of causes.
"""

# ruff: noqa: RUF009  a FieldDescriptor as default is how Anomalib declares a checked field

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.data.dataclasses.generic import FieldDescriptor
from torchvision.tv_tensors import Mask

CAUSES = ("feature_map", "position_map", "missing_map")

SUM_TOLERANCE = 1e-3  # relative; room for maps that were computed in half precision


def split_by_cause(
    anomaly_map: torch.Tensor,
    feature_map: torch.Tensor,
    position_map: torch.Tensor,
    missing_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Split an anomaly map into its causes in the ratio of two or three given maps, >= 0, of its shape.

    feature = anomaly · feature_map / (feature_map + position_map), position = anomaly − feature; with a third map, what
    is missing is split off first.

    Returns:
        The two or three parts; their float32 sum, from the left, is `anomaly_map`, bit for bit. Where the weights are 0
        feature and position get half each.

    Example:
        >>> split_by_cause(torch.tensor([0.5, 0.4]), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
        (tensor([0.3750, 0.2000]), tensor([0.1250, 0.2000]))
    """
    if missing_map is not None:
        there, missing = _split(anomaly_map, feature_map + position_map, missing_map, neither=1.0)
        return *_split(there, feature_map, position_map), missing
    return _split(anomaly_map, feature_map, position_map)


def _split(
    whole: torch.Tensor, first: torch.Tensor, second: torch.Tensor, neither: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split into two parts whose sum is exact; `neither` is the share of the first where both weights are 0."""
    total = first + second
    share = torch.where(total > 0, first / total, neither)
    # The larger part first: the difference of two floats within a factor of two of each other is exact (Sterbenz).
    larger = whole * torch.maximum(share, 1 - share)
    smaller = whole - larger
    leads = share >= 0.5
    return torch.where(leads, larger, smaller), torch.where(leads, smaller, larger)


# Keyword-only, so that these fields may stand after Anomalib's `image` although Anomalib's class must come first among
# the bases: Python lets `adopt` change the class of an existing batch only to a class whose first base is its own.
@dataclass(kw_only=True)
class _ExplanationFields:
    """The extra fields and their checks, for items and batches, torch and numpy."""

    feature_map: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_feature_map")
    position_map: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_position_map")
    missing_map: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_missing_map")
    matched_position: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_matched_position")
    transport_score: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_transport_score")
    roi: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_roi")

    array_class: ClassVar[type] = torch.Tensor
    batched: ClassVar[bool] = False

    @classmethod
    def _float32(cls, name: str, value: object) -> torch.Tensor | np.ndarray:
        """Return the value in float32, or say which field is of the wrong kind."""
        if cls.array_class is np.ndarray and isinstance(value, np.floating):
            value = np.asarray(value)  # indexing a numpy vector gives a scalar, not an array
        if not isinstance(value, cls.array_class):
            msg = f"{name} is a {type(value).__name__}; {cls.__name__} expects a {cls.array_class.__name__} or None."
            raise TypeError(msg)
        floating = value.is_floating_point() if isinstance(value, torch.Tensor) else value.dtype.kind == "f"
        if not floating:
            msg = f"{name} has dtype {value.dtype}; expected a floating type: convert it with .float() first."
            raise TypeError(msg)
        return value.to(torch.float32) if isinstance(value, torch.Tensor) else value.astype(np.float32)

    @classmethod
    def _validate_map(cls, name: str, value: object) -> torch.Tensor | np.ndarray | None:
        """Bring a map to Anomalib's shape for anomaly maps: (H, W) in an item, (B, H, W) in a batch."""
        if value is None:
            return None
        value = cls._float32(name, value)
        axis = int(cls.batched)
        if value.ndim == axis + 3 and value.shape[axis] == 1:
            value = value.squeeze(axis)
        if value.ndim != axis + 2:
            expected = "(B, 1, H, W) or (B, H, W)" if cls.batched else "(1, H, W) or (H, W)"
            raise ValueError(f"{name} has shape {tuple(value.shape)}; {cls.__name__} expects {expected}.")
        return Mask(value) if isinstance(value, torch.Tensor) else value

    @classmethod
    def validate_feature_map(cls, feature_map: object) -> torch.Tensor | np.ndarray | None:
        """Check the part of the anomaly map that is due to appearance."""
        return cls._validate_map("feature_map", feature_map)

    @classmethod
    def validate_position_map(cls, position_map: object) -> torch.Tensor | np.ndarray | None:
        """Check the part of the anomaly map that is due to place."""
        return cls._validate_map("position_map", position_map)

    @classmethod
    def validate_missing_map(cls, missing_map: object) -> torch.Tensor | np.ndarray | None:
        """Check the part of the anomaly map that is due to what is not there."""
        return cls._validate_map("missing_map", missing_map)

    @classmethod
    def validate_matched_position(cls, matched_position: object) -> torch.Tensor | np.ndarray | None:
        """Check the (y, x) in [0, 1] of each patch's prototype: (2, h, w) in an item, (B, 2, h, w) in a batch."""
        if matched_position is None:
            return None
        value = cls._float32("matched_position", matched_position)
        axis = int(cls.batched)
        if value.ndim != axis + 3 or value.shape[axis] != 2:
            expected = "(B, 2, h, w)" if cls.batched else "(2, h, w)"
            msg = f"matched_position has shape {tuple(value.shape)}; {cls.__name__} expects {expected}, y before x."
            raise ValueError(msg)
        return value

    @classmethod
    def validate_transport_score(cls, transport_score: object) -> torch.Tensor | np.ndarray | None:
        """Check the transport score: a scalar in an item, (B,) in a batch."""
        if transport_score is None:
            return None
        value = cls._float32("transport_score", transport_score)
        if value.ndim != int(cls.batched):
            expected = "(B,)" if cls.batched else "()"
            raise ValueError(f"transport_score has shape {tuple(value.shape)}; {cls.__name__} expects {expected}.")
        return value

    @classmethod
    def validate_roi(cls, roi: object) -> torch.Tensor | np.ndarray | None:
        """Check which pixels count: bool, (H, W) in an item, (B, H, W) in a batch; None: all."""
        if roi is None:
            return None
        if not isinstance(roi, cls.array_class) or roi.ndim != int(cls.batched) + 2 or "bool" not in str(roi.dtype):
            expected = "(B, H, W)" if cls.batched else "(H, W)"
            msg = f"roi is {type(roi).__name__} {getattr(roi, 'shape', '')}; {cls.__name__} expects bool {expected}."
            raise TypeError(msg)
        return roi

    def __post_init__(self) -> None:
        """Check the fields against each other; Anomalib calls this after `update` too."""
        if (self.feature_map is None) != (self.position_map is None):
            missing = "feature_map" if self.feature_map is None else "position_map"
            raise ValueError(f"{missing} is None while the other cause is given; give both maps or neither.")
        if self.missing_map is not None and self.feature_map is None:
            msg = "missing_map is given without feature_map and position_map; give all three causes or none."
            raise ValueError(msg)
        if self.batched:
            for field in fields(_ExplanationFields):
                value = getattr(self, field.name)
                if value is not None and len(value) != len(self.image):
                    msg = f"{field.name} holds {len(value)} entries; the batch has {len(self.image)} images."
                    raise ValueError(msg)
        self._follow_anomaly_map()

    def __setattr__(self, name: str, value: object) -> None:
        """Set a field; the causes follow a new anomaly map."""
        super().__setattr__(name, value)
        if name == "anomaly_map":
            self._follow_anomaly_map()

    def _follow_anomaly_map(self) -> None:
        """Rescale the causes, pixel by pixel, so that they sum to the anomaly map."""
        present = self.__dict__  # while __init__ or adopt runs, some fields are not there yet
        whole, feature_map, position_map, missing_map = (present.get(name) for name in ("anomaly_map", *CAUSES))
        if whole is None or feature_map is None or position_map is None:
            return
        parts = [part for part in (feature_map, position_map, missing_map) if part is not None]
        shapes = [tuple(part.shape) for part in (whole, *parts)]
        if len(set(shapes)) != 1:
            raise ValueError(
                f"anomaly_map and {', '.join(CAUSES[: len(parts)])} have shapes {shapes}; expected one shape. "
                "To change the map size, set the causes to None first, missing_map before the others."
            )
        if isinstance(whole, torch.Tensor) and not torch.equal(sum(parts[1:], parts[0]), whole):
            plain = (part.as_subclass(torch.Tensor) for part in (whole, *parts))
            split = split_by_cause(*plain)
            present.update({name: Mask(part) for name, part in zip(CAUSES, split, strict=False)})


@dataclass
class NumpyExplainedItem(NumpyImageItem, _ExplanationFields):
    """One image with its explanation, as numpy arrays."""

    array_class: ClassVar[type] = np.ndarray


@dataclass
class NumpyExplainedBatch(NumpyImageBatch, _ExplanationFields):
    """A batch of images with their explanations, as numpy arrays."""

    item_class: ClassVar[type] = NumpyExplainedItem
    array_class: ClassVar[type] = np.ndarray
    batched: ClassVar[bool] = True


@dataclass
class ExplainedItem(ImageItem, _ExplanationFields):
    """One image with its explanation; `feature_map + position_map + missing_map == anomaly_map` at all times."""

    numpy_class: ClassVar[type] = NumpyExplainedItem


@dataclass
class ExplainedBatch(ImageBatch, _ExplanationFields):
    """A batch of images with their explanations; the causes sum to `anomaly_map` at all times.

    Example:
        >>> batch = ImageBatch(image=torch.zeros(1, 3, 2, 2))
        >>> part = torch.full((1, 1, 2, 2), 0.25)
        >>> _ = ExplainedBatch.adopt(batch, anomaly_map=2 * part, feature_map=part, position_map=part)
        >>> batch.anomaly_map = torch.ones(1, 2, 2)
        >>> batch.position_map[0, 0].tolist()
        [0.5, 0.5]
    """

    item_class: ClassVar[type] = ExplainedItem
    numpy_class: ClassVar[type] = NumpyExplainedBatch
    batched: ClassVar[bool] = True

    @classmethod
    def adopt(cls, batch: ImageBatch, **predictions: torch.Tensor | None) -> "ExplainedBatch":
        """Turn an `ImageBatch` into an `ExplainedBatch` in place, set its predictions by name, and return it.

        In place, because Anomalib's evaluator and visualizer read the batch that the trainer holds, not what the test
        step returns; and `ImageBatch.update` drops the fields that it does not know. On an error the batch is left as
        it was.

        Raises:
            TypeError: If `batch` is of another class, or a prediction is not a field.
            ValueError: If a shape is wrong, or the causes do not sum to the anomaly map.
        """
        if type(batch) not in (ImageBatch, cls):
            raise TypeError(
                f"batch is a {type(batch).__name__}; expected {cls.__name__} or ImageBatch; models of "
                "different kinds need an Engine each"
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(predictions) - set(known))
        if unknown:
            raise TypeError(f"predictions {unknown} are no fields of {cls.__name__}; it has {known}.")
        values = {**{name: getattr(batch, name, None) for name in known}, **predictions}
        if not set(CAUSES).isdisjoint(predictions):
            cls._check_sum(**{name: values[name] for name in ("anomaly_map", *CAUSES)})
        adopted = cls(**values)  # all checks run here, before the batch is touched
        batch.__class__ = cls
        batch.__dict__.update(adopted.__dict__)
        return batch

    @classmethod
    def _check_sum(cls, **parts: torch.Tensor | None) -> None:
        """Refuse causes that are not parts of the anomaly map; rescaling would hide the mistake."""
        given = {name: cls._validate_map(name, part) for name, part in parts.items() if part is not None}
        if not {"anomaly_map", "feature_map", "position_map"} <= set(given):
            return
        whole = given.pop("anomaly_map")
        if all(part.shape == whole.shape for part in given.values()):
            gap = (sum(given.values()) - whole).abs().max().item()
            if not gap <= SUM_TOLERANCE * max(whole.abs().max().item(), 1e-12):
                msg = f"{' + '.join(given)} differs from anomaly_map by up to {gap:.3g}; give parts of one map."
                raise ValueError(msg)
