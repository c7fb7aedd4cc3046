"""Augmentations of images with boxes: torchvision transforms that never leave a box beside its object."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

TRIES = 32  # windows drawn for each crop; the one that cuts least is taken


def seen_parts(boxes: Tensor, windows: Tensor) -> Tensor:
    """Say how much of each box (G, 4) each window (N, 4) shows: `|box ∩ window| / (min(w, W) min(h, H))`, (N, G).

    The measure is what a window of that size (W, H) can show of a box (w, h) at most: a defect that is longer than the
    window counts as wholly seen where it fills the window from side to side.

    >>> long_scratch = torch.tensor([[0.0, 4.0, 100.0, 6.0]])
    >>> seen_parts(long_scratch, torch.tensor([[10.0, 0.0, 20.0, 10.0], [10.0, 5.0, 20.0, 15.0]])).flatten()
    tensor([1.0000, 0.5000])
    """
    boxes, windows = boxes[None].double(), windows[:, None].double()
    shown = (torch.minimum(boxes[..., 2:], windows[..., 2:]) - torch.maximum(boxes[..., :2], windows[..., :2])).clamp(0)
    possible = torch.minimum(boxes[..., 2:] - boxes[..., :2], windows[..., 2:] - windows[..., :2])
    return (shown.prod(-1) / possible.clamp(min=1e-12).prod(-1)).clamp(max=1).float()


def keep_boxes(sample: Any, keep: Tensor) -> Any:
    """Keep those boxes (G,) of a sample, and their `labels`: an image, or a nest of lists and dictionaries."""
    if isinstance(sample, tv_tensors.BoundingBoxes):
        return tv_tensors.wrap(sample[keep], like=sample)
    if isinstance(sample, Mapping):
        return {k: v[keep] if k == "labels" and v is not None else keep_boxes(v, keep) for k, v in sample.items()}
    if isinstance(sample, list | tuple):
        return type(sample)(keep_boxes(part, keep) for part in sample)
    return sample


def _parts_of(sample: Any) -> list[Tensor]:
    """List the tensors of a nest."""
    if isinstance(sample, Mapping):
        sample = list(sample.values())
    if isinstance(sample, list | tuple):
        return [part for entry in sample for part in _parts_of(entry)]
    return [sample] if isinstance(sample, Tensor) else []


def _boxes_of(sample: Any) -> Tensor:
    """Find the boxes (G, 4) of a sample; none are (0, 4)."""
    found = [part for part in _parts_of(sample) if isinstance(part, tv_tensors.BoundingBoxes)]
    if len(found) > 1 or (found and found[0].format != tv_tensors.BoundingBoxFormat.XYXY):
        msg = f"the sample has {len(found)} sets of boxes, {[b.format.value for b in found]}; expected one, in XYXY"
        raise ValueError(msg)
    return found[0].as_subclass(Tensor) if found else torch.zeros(0, 4)


def _size_of(sample: Any) -> tuple[int, int]:
    """Read the height and width of a sample's image."""
    parts = _parts_of(sample)
    if not parts:
        raise TypeError(
            f"the sample is {type(sample).__name__}; expected an image as a tensor: put ToImage() before this transform"
        )
    # As torchvision itself takes it: an explicit image, or else the first tensor.
    image = next((part for part in parts if isinstance(part, tv_tensors.Image)), parts[0])
    return int(image.shape[-2]), int(image.shape[-1])


class BoxSafeCrop(v2.Transform):
    """Cut a window of a fixed size out of an image, with as few boxes cut by its border as can be.

    Of 32 random windows the one is taken that cuts least, mostly none at all. With probability `focus` they are drawn
    so that they show one box, chosen at random, as far as it fits. A box that is cut all the same is clipped to the
    window if at least `min_part` of what the window could show of it is left (see `seen_parts`); else it is dropped,
    and its stump stays in the picture without a label. Where the image is smaller than the window, it lies at a random
    place in it, amid its own mean color.

    Args:
        size: Height and width of the window, pixels.
        min_part: The least part of a cut box that stays labeled, in (0, 1].
        focus: Probability to look at a box, in [0, 1]; has no meaning for images without boxes.

    Raises:
        ValueError: If an argument is out of range.

    >>> boxes = tv_tensors.BoundingBoxes([[10, 10, 14, 14]], format="XYXY", canvas_size=(40, 40))
    >>> image, boxes = BoxSafeCrop((8, 8), focus=1.0)(tv_tensors.Image(torch.zeros(3, 40, 40)), boxes)
    >>> image.shape, float((boxes[:, 2:] - boxes[:, :2]).prod())
    (torch.Size([3, 8, 8]), 16.0)
    """

    def __init__(self, size: tuple[int, int], min_part: float = 0.5, focus: float = 0.7) -> None:
        super().__init__()
        if isinstance(size, int) or len(size) != 2 or min(size) < 1:
            raise ValueError(f"size is {size}; expected (height, width), whole numbers of pixels of at least 1")
        if not 0 < min_part <= 1:
            raise ValueError(f"min_part is {min_part}; expected a part of a box, over 0 and at most 1")
        if not 0 <= focus <= 1:
            raise ValueError(f"focus is {focus}; expected a probability from 0 to 1")
        self.size = (int(size[0]), int(size[1]))
        self.min_part = min_part
        self.focus = focus

    def forward(self, *inputs: Any) -> Any:
        """Crop a sample: an image, or an image with boxes and, in a dictionary, `labels`."""
        sample = inputs if len(inputs) > 1 else inputs[0]
        boxes = _boxes_of(sample)
        top, left = self._window(_size_of(sample), boxes)
        window = torch.tensor([[left, top, left + self.size[1], top + self.size[0]]])
        sample = keep_boxes(sample, seen_parts(boxes, window)[0] >= self.min_part)
        return _Window(top, left, *self.size)(sample)

    def _window(self, image_size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        """Choose the window's first row and column; negative where the image is smaller than the window."""
        focus = None
        if len(boxes) and torch.rand(()) < self.focus:
            focus = boxes[torch.randint(len(boxes), ())]
        starts = []
        for axis, (length, cut) in enumerate(zip(image_size, self.size, strict=True)):
            low, high = min(0, length - cut), max(0, length - cut)
            if focus is not None and length > cut:
                first, last = float(focus[1 - axis]), float(focus[3 - axis])
                ends = sorted((-int(-(last - cut) // 1), int(first // 1)))  # rounded inwards
                low, high = (min(max(end, low), high) for end in ends)
            starts.append(torch.randint(low, high + 1, (TRIES,)))
        tops, lefts = starts
        if not len(boxes):
            return int(tops[0]), int(lefts[0])
        windows = torch.stack([lefts, tops, lefts + self.size[1], tops + self.size[0]], dim=1)
        parts = seen_parts(boxes, windows)
        best = int(torch.minimum(parts, 1 - parts).sum(dim=1).argmin())  # nothing is lost at 0 nor at 1
        return int(tops[best]), int(lefts[best])


class _Window(v2.Transform):
    """Cut out one given window, padded with the image's mean color where it reaches over the border."""

    def __init__(self, top: int, left: int, height: int, width: int) -> None:
        super().__init__()
        self.place = (top, left, height, width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad and crop one part of a sample."""
        top, left, height, width = self.place
        rows, columns = F.get_size(inpt)
        padding = [max(-left, 0), max(-top, 0), max(left + width - columns, 0), max(top + height - rows, 0)]
        if any(padding):
            is_image = isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.BoundingBoxes | tv_tensors.Mask)
            fill = inpt.float().mean(dim=(-2, -1)).flatten().tolist() if is_image else 0
            inpt = F.pad(inpt, padding, fill=fill)
        return F.crop(inpt, top + padding[1], left + padding[0], height, width)


class DefectAugmentation(v2.Transform):
    """Vary images of defects and their boxes: mirror them, scale them, relight them, and crop them with care.

    The output has one size, whatever the input: `crop_size`, or the input's own.

    Args:
        crop_size: Height and width of the output, pixels; None: those of the input.
        flip: Whether to mirror left-right and top-bottom, each with probability 1/2.
        scale: Least and greatest factor of magnification, above 0; the default suits cameras at a fixed distance.
        brightness: Greatest relative change of brightness, in [0, 1].
        contrast: Greatest relative change of contrast, in [0, 1].
        min_part: Least part of a cut box that stays labeled, see `BoxSafeCrop`.
        focus: Probability that a crop shows a box, see `BoxSafeCrop`.

    Raises:
        ValueError: If an argument is out of range.

    >>> DefectAugmentation(crop_size=(32, 48))(torch.rand(3, 64, 64)).shape
    torch.Size([3, 32, 48])
    """

    def __init__(
        self,
        crop_size: tuple[int, int] | None = None,
        flip: bool = True,
        scale: tuple[float, float] = (0.9, 1.1),
        brightness: float = 0.1,
        contrast: float = 0.1,
        min_part: float = 0.5,
        focus: float = 0.7,
    ) -> None:
        super().__init__()
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            msg = f"scale is {scale}; expected the least and the greatest factor, both above 0, such as (0.9, 1.1)"
            raise ValueError(msg)
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a relative change from 0 to 1")
        BoxSafeCrop(crop_size or (1, 1), min_part, focus)  # checks the arguments now, not in the first batch
        self.crop_size = None if crop_size is None else (int(crop_size[0]), int(crop_size[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.min_part = min_part
        self.focus = focus
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
        self.first = v2.Compose([*flips, v2.ColorJitter(brightness=brightness, contrast=contrast)])

    def forward(self, *inputs: Any) -> Any:
        """Augment a sample: an image, or an image with boxes and, in a dictionary, `labels`."""
        sample = self.first(inputs if len(inputs) > 1 else inputs[0])
        height, width = _size_of(sample)
        factor = float(torch.empty(()).uniform_(*self.scale))
        scaled = (max(1, round(factor * height)), max(1, round(factor * width)))
        if scaled != (height, width):
            sample = v2.Resize(scaled, antialias=True)(sample)
        return BoxSafeCrop(self.crop_size or (height, width), self.min_part, self.focus)(sample)
