"""Anomalib's image item and batch with room for an explanation: how much each cause adds to each pixel's anomaly.

The anomaly map is the sum of two causes, feature ("looks wrong") and position ("is in the wrong place"). The classes
here keep that sum true. Anomalib's post-processor rescales `anomaly_map` alone; whenever `anomaly_map` is set, the two
parts follow it, each pixel keeping its ratio of causes.
"""

# ruff: noqa: RUF009  a FieldDescriptor as default is how Anomalib declares a checked field

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.data.dataclasses.generic import FieldDescriptor
from torchvision.tv_tensors import Mask

__all__ = ["ExplainedBatch", "ExplainedItem", "NumpyExplainedBatch", "NumpyExplainedItem", "split_by_cause"]

SUM_TOLERANCE = 1e-3  # relative; room for maps that were computed in half precision


def split_by_cause(
    anomaly_map: torch.Tensor, feature_map: torch.Tensor, position_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an anomaly map into two causes in the ratio of two given maps.

    feature = anomaly · feature_map / (feature_map + position_map), position = anomaly − feature.

    Args:
        anomaly_map: The map to split, >= 0, any shape.
        feature_map: Weight of the feature cause, >= 0, same shape.
        position_map: Weight of the position cause, >= 0, same shape.

    Returns:
        The two parts; their float32 sum is `anomaly_map`, bit for bit. Where both weights are 0 each cause gets half.

    Example:
        >>> split_by_cause(torch.tensor([0.5, 0.4]), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
        (tensor([0.3750, 0.2000]), tensor([0.1250, 0.2000]))
    """
    total = feature_map + position_map
    share = torch.where(total > 0, feature_map / total, 0.5)
    # The larger part first: the difference of two floats within a factor of two of each other is exact (Sterbenz).
    larger = anomaly_map * torch.maximum(share, 1 - share)
    smaller = anomaly_map - larger
    looks = share >= 0.5
    return torch.where(looks, larger, smaller), torch.where(looks, smaller, larger)


# Keyword-only, so that these fields may stand after Anomalib's `image` although Anomalib's class must come first among
# the bases: Python lets `adopt` change the class of an existing batch only to a class whose first base is its own.
@dataclass(kw_only=True)
class _ExplanationFields:
    """The four extra fields and their checks, for items and batches, torch and numpy."""

    feature_map: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_feature_map")
    position_map: FieldDescriptor[torch.Tensor | np.ndarray | None] = FieldDescriptor("validate_position_map")
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
            msg = f"{name} has shape {tuple(value.shape)}; {cls.__name__} expects {expected}."
            raise ValueError(msg)
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
            msg = f"transport_score has shape {tuple(value.shape)}; {cls.__name__} expects {expected}."
            raise ValueError(msg)
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
            msg = f"{missing} is None while the other cause is given; give both maps or neither."
            raise ValueError(msg)
        if self.batched:
            for field in fields(_ExplanationFields):
                value = getattr(self, field.name)
                if value is not None and len(value) != len(self.image):
                    msg = f"{field.name} holds {len(value)} entries; the batch has {len(self.image)} images."
                    raise ValueError(msg)
        self._follow_anomaly_map()

    def __setattr__(self, name: str, value: object) -> None:
        """Set a field; the two causes follow a new anomaly map."""
        super().__setattr__(name, value)
        if name == "anomaly_map":
            self._follow_anomaly_map()

    def _follow_anomaly_map(self) -> None:
        """Rescale both causes, pixel by pixel, so that they sum to the anomaly map."""
        present = self.__dict__  # while __init__ or adopt runs, some fields are not there yet
        parts = [present.get("anomaly_map"), present.get("feature_map"), present.get("position_map")]
        if any(part is None for part in parts):
            return
        shapes = [tuple(part.shape) for part in parts]
        if len(set(shapes)) != 1:
            msg = (
                f"anomaly_map, feature_map and position_map have shapes {shapes}; expected one shape. "
                "To change the map size, set feature_map and position_map to None first."
            )
            raise ValueError(msg)
        if isinstance(parts[0], torch.Tensor) and not torch.equal(parts[1] + parts[2], parts[0]):
            feature_map, position_map = split_by_cause(*(part.as_subclass(torch.Tensor) for part in parts))
            present.update(feature_map=Mask(feature_map), position_map=Mask(position_map))


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
    """One image with its explanation; `feature_map + position_map == anomaly_map` holds at all times."""

    numpy_class: ClassVar[type] = NumpyExplainedItem


@dataclass
class ExplainedBatch(ImageBatch, _ExplanationFields):
    """A batch of images with their explanations; `feature_map + position_map == anomaly_map` holds at all times.

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
        """Turn an `ImageBatch` into an `ExplainedBatch` in place, and set its predictions.

        In place, because Anomalib's evaluator and visualizer read the batch that the trainer holds, not what the test
        step returns; and `ImageBatch.update` drops the fields that it does not know.

        Args:
            batch: The batch that the trainer passed to the step; an `ExplainedBatch` keeps the fields not named here.
            predictions: Fields of this class by name.

        Returns:
            `batch` itself. On an error it is left as it was.

        Raises:
            TypeError: If `batch` is of another class, or a prediction is not a field.
            ValueError: If a shape is wrong, or the two causes do not sum to the anomaly map.
        """
        if type(batch) not in (ImageBatch, cls):
            msg = (
                f"batch is a {type(batch).__name__}; expected {cls.__name__} or ImageBatch; models of "
                "different kinds need an Engine each"
            )
            raise TypeError(msg)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(predictions) - set(known))
        if unknown:
            msg = f"predictions {unknown} are no fields of {cls.__name__}; it has {known}."
            raise TypeError(msg)
        values = {**{name: getattr(batch, name, None) for name in known}, **predictions}
        if "feature_map" in predictions or "position_map" in predictions:
            cls._check_sum(values["anomaly_map"], values["feature_map"], values["position_map"])
        adopted = cls(**values)  # all checks run here, before the batch is touched
        batch.__class__ = cls
        batch.__dict__.update(adopted.__dict__)
        return batch

    @classmethod
    def _check_sum(cls, *parts: torch.Tensor | None) -> None:
        """Refuse causes that are not parts of the anomaly map; rescaling would hide the mistake."""
        if any(part is None for part in parts):
            return
        names = ("anomaly_map", "feature_map", "position_map")
        whole, feature, position = (cls._validate_map(*pair) for pair in zip(names, parts, strict=True))
        if whole.shape == feature.shape == position.shape:
            gap = (feature + position - whole).abs().max().item()
            if not gap <= SUM_TOLERANCE * max(whole.abs().max().item(), 1e-12):
                msg = f"feature_map + position_map differs from anomaly_map by up to {gap:.3g}; give parts of one map."
                raise ValueError(msg)
