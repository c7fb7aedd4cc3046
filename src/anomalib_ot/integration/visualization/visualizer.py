"""The callback that writes one explained picture per tested image."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_ot.imaging.samples import sample_format
from anomalib_ot.integration.data.batches import CAUSES
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.visualization.anomaly_figure import explain_picture
from anomalib_ot.integration.visualization.header import Verdict
from anomalib_ot.integration.visualization.writer import PictureWriter

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Correlation between the file and what the network saw: resizing alone leaves at least .98 on fabric, tiles, cells,
# PCBs and steel; cutting off a border of 16 pixels in 256 leaves at most .88.
SAME_VIEW = 0.95
# A deep image whose brightest pixels, but for a few hot ones, stay below this is brightened for the eye.
DIM, WHITE = 0.5, 0.001


class ExplanationVisualizer(PictureWriter):
    """Write a picture of each tested or predicted image: is it bad, where, and why.

    Models whose batches have no `feature_map` and `position_map` get two panels, the image and its anomaly map. The
    pictures are always PNG, named by `PictureNames`, below `output_dir`.

    Args:
        output_dir: Folder to write to; None: `images` in the trainer's root folder.
        panel_size: Side in pixels of a square with the area of one panel, >= 32.
        max_arrows: Most arrows to misplaced patches per picture, >= 0.
    """

    def __init__(self, output_dir: str | Path | None = None, panel_size: int = 320, max_arrows: int = 8) -> None:
        super().__init__(output_dir)
        self.panel_size = panel_size
        self.max_arrows = max_arrows

    def visualize(
        self,
        item: ImageItem,
        threshold: float | None = 0.5,
        name: str | None = None,
        transport_threshold: float | None = None,
    ) -> Image.Image:
        """Draw an `ExplainedItem`, or any `ImageItem`.

        Args:
            item: The item.
            threshold: The score above which a part is defective; None: not known, and then the verdict is not.
            name: File name to print; None: the last two parts of the item's path.
            transport_threshold: The transport score above which a part is defective whatever its map; None: not known.
        """
        explanation = explanation_of(item, threshold, name, transport_threshold)
        return explain_picture(**explanation, panel_size=self.panel_size, max_arrows=self.max_arrows)

    def picture(self, item: ImageItem, name: str | None, pl_module: "AnomalibModule") -> Image.Image:
        """Draw an item with the thresholds of its model."""
        # The host compares scores with this value, 1 - sensitivity, whether they are normalized or not.
        post_processor = getattr(pl_module, "post_processor", None)
        threshold = float(getattr(post_processor, "normalized_image_threshold", 0.5))
        if not getattr(post_processor, "has_image_threshold", True):
            threshold = None
        return self.visualize(item, threshold, name, getattr(post_processor, "transport_threshold", None))


def explanation_of(
    item: ImageItem, threshold: float | None = 0.5, name: str | None = None, transport_threshold: float | None = None
) -> dict[str, Any]:
    """Collect the arguments of `explain_picture` but for the sizes; see `ExplanationVisualizer.visualize`."""
    image, note = shown_image(item)
    transport_score = getattr(item, "transport_score", None)
    verdict = replace(
        item_verdict(item, threshold, name),
        transport_score=None if transport_score is None else float(transport_score),
        transport_threshold=transport_threshold,
    )
    maps = ("anomaly_map", *CAUSES, "matched_position", "pred_mask", "gt_mask", "roi")
    found = {field: getattr(item, field, None) for field in maps}
    arrays = {field: None if values is None else values.detach().cpu().numpy() for field, values in found.items()}
    return {"image": image, **arrays, "verdict": verdict, "image_note": note}


def item_verdict(item: ImageItem, threshold: float | None, name: str | None) -> Verdict:
    """Return what is known of an item as a whole; `name` None: the last two parts of its path."""
    if name is None:
        name = "/".join(Path(item.image_path).parts[-2:]) if item.image_path else ""
    return Verdict(
        score=None if item.pred_score is None else float(item.pred_score),
        defect=None if item.pred_label is None else bool(item.pred_label),
        truth=None if item.gt_label is None else bool(item.gt_label),
        threshold=threshold,
        name=name,
    )


def shown_image(item: ImageItem) -> tuple[Image.Image, str]:
    """Return the RGB image to draw on, and a note in plain words if it is not the original file, else "".

    The original file is sharper and has the true aspect ratio, but maps fit on it only if the network saw all of it:
    where the two correlate less than a resize explains (crop, pad, rotation), the network's view is shown instead.
    Files of 16 bits or floats are shown on the scale on which the network gets them, and a dim one brightened.
    """
    if item.image_path is not None and Path(item.image_path).is_file():
        original, note = _visible(item.image_path)
        if _same_view(original, item.image):
            return original, note
        return _network_view(item.image), "as the network saw it: not the whole file"
    return _network_view(item.image), "as the network saw it: no file"


def _visible(path: str) -> tuple[Image.Image, str]:
    """Read a file to be looked at: 12 bits stored in 16 would be black. 8-bit images are shown as they are."""
    pixels = read_image_deep(path)
    with Image.open(path) as file:
        deep = sample_format(file) != "8"
    bright = float(np.quantile(pixels.amax(0).numpy(), 1 - WHITE)) if deep else 1.0
    if bright >= DIM or bright == 0:
        return _to_image(pixels), ""
    return _to_image(pixels / bright), f"shown {1 / bright:.3g} times as bright as stored"


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """Turn (3, H, W) in [0, 1] into an image; larger values become white."""
    return Image.fromarray((pixels.movedim(0, -1).numpy().clip(0, 1) * 255).round().astype(np.uint8))


def _same_view(original: Image.Image, image: torch.Tensor) -> bool:
    """Whether the tensor, normalized or not, shows the whole file."""
    seen = image.detach().cpu().double().flatten(1).numpy()
    size = (image.shape[-1], image.shape[-2])
    whole = np.asarray(original.resize(size, Image.Resampling.BILINEAR), dtype=float).reshape(-1, 3).T
    seen, whole = (values - values.mean(axis=1, keepdims=True) for values in (seen, whole))
    spread = np.sqrt((seen**2).sum(axis=1) * (whole**2).sum(axis=1))
    if (spread < 1e-6 * seen.shape[1]).all():
        return True  # a plain surface fits on itself anywhere
    channels = spread > 0
    return bool(np.mean((seen * whole).sum(axis=1)[channels] / spread[channels]) >= SAME_VIEW)


def _network_view(image: torch.Tensor) -> Image.Image:
    """Turn the network's input into an image; values outside [0, 1] mean that ImageNet statistics were applied."""
    pixels = image.detach().cpu().float().permute(1, 2, 0).numpy()
    if pixels.min() < 0 or pixels.max() > 1:
        pixels = pixels * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def map_array(values: torch.Tensor | None) -> np.ndarray | None:
    """Bring a map (..., H, W) of one image to numpy, as (H, W), bool or float32; None stays None."""
    if values is None:
        return None
    values = values.detach().cpu()
    array = (values if values.dtype == torch.bool else values.float()).numpy()
    return array.reshape(array.shape[-2:])
