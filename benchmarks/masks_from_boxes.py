"""Masks for detections that are only boxes: how well do they cover the true masks of magnetic tiles?

    python benchmarks/masks_from_boxes.py --data ../shared/data --weights ../shared/weights

Detections are simulated: each connected part of a true mask is an object, found by several boxes around its true box
with independent Gaussian jitter, scored by their overlap with noise. Real duplicates err together, so that merging
helps them less. Two maps of each image: the anomaly map of OTPrototypes, trained on good images alone, and how far a
pixel's gray is from the image's median, which costs nothing. IoU of masks in pixels of the file, mean over objects;
`--maps gray` needs seconds and no weights.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pseudo_boxes import SPECK, make_task, table
from real_data import BACKBONES, register_same_padding
from scipy import ndimage
from torch import Tensor

from anomalib_ot.postprocess.box_masks import aggregate_box_masks, aggregate_map_masks
from anomalib_ot.postprocess.mask_refinement import RefinedRegions, refine_regions
from anomalib_ot.vision.boxes import pairwise_iou

KINDS = ("blowhole", "break", "crack", "fray")
GRAY_BLUR = 1.5  # pixels


def objects_of(mask_path: Path) -> tuple[Tensor, Tensor]:
    """Return the masks (G, H, W) and boxes (G, 4) of the parts of a mask, without strokes of the pen."""
    parts, count = ndimage.label(np.asarray(Image.open(mask_path).convert("L")) > 127, np.ones((3, 3)))
    masks = torch.from_numpy(parts == np.arange(1, count + 1)[:, None, None])
    areas = masks.sum((1, 2))
    masks = masks[areas >= min(SPECK, int(areas.max()))]
    places = [ndimage.find_objects(mask.numpy().astype(np.uint8))[0] for mask in masks]
    return masks, torch.tensor([(x.start, y.start, x.stop, y.stop) for y, x in places], dtype=torch.float32)


def detections(boxes: Tensor, size: tuple[int, int], args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Jitter each box several times: boxes (G * M, 4), of one object after the other, and their scores."""
    generator = torch.Generator().manual_seed(seed)
    true = boxes.repeat_interleave(args.members, 0)
    sides = (true[:, 2:] - true[:, :2]).repeat(1, 2)
    found = true + args.jitter * sides * torch.randn(true.shape, generator=generator)
    found = torch.minimum(found.clamp(min=0), torch.tensor([size[1], size[0]] * 2))
    found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 2)
    overlap = pairwise_iou(found, boxes)[
        torch.arange(len(found)), torch.arange(len(boxes)).repeat_interleave(args.members)
    ]
    return found, (overlap + 0.1 * torch.randn(len(overlap), generator=generator)).clamp(0.01, 0.99)


def ways(
    boxes: Tensor, scores: Tensor, true: Tensor, map_: Tensor | None, size: tuple[int, int], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Make masks (G, H, W) of the objects in several ways."""
    count, kwargs = len(true), {"mask_size": args.mask_size}
    owner = torch.eye(count).repeat_interleave(args.members, 0)
    best = owner.mul(scores[:, None]).argmax(0)
    single = F.one_hot(best, len(boxes)).T.float()
    mean = owner / args.members
    plan = torch.cat([0.9 * owner, torch.full((len(boxes), 1), 0.1)], 1)
    inputs = (plan[None], boxes[None], scores[None], (mean.T @ boxes)[None])
    if map_ is None:
        drawn = {
            "true box": RefinedRegions(torch.eye(count)[None], true[None], torch.ones(1, count, 2, 2)),
            "best box": RefinedRegions(single[None], boxes[best][None], torch.ones(1, count, 2, 2)),
            "mean of soft boxes": of_weights(mean, boxes, lambda *parts: aggregate_box_masks(*parts, **kwargs)),
            **{f"refined soft boxes, h {h}": refine_regions(*inputs, entropy=h, **kwargs) for h in args.entropies},
        }
    else:
        from_map = lambda *parts: aggregate_map_masks(*parts, map_[None, None], **kwargs)  # noqa: E731
        drawn = {
            "in the true box": of_weights(torch.eye(count), true, from_map),
            "in the best box": of_weights(single, boxes, from_map),
            "mean of members": of_weights(mean, boxes, from_map),
            **{
                f"refined, h {h}": refine_regions(*inputs, map_[None, None], entropy=h, **kwargs)
                for h in args.entropies
            },
        }
    return {name: regions.in_image(size)[0] for name, regions in drawn.items()}


def of_weights(weights: Tensor, boxes: Tensor, draw) -> RefinedRegions:
    frame = (weights.T @ boxes)[None]
    return RefinedRegions(weights[None], frame, draw(weights[None], boxes[None], frame))


def gray_map(path: Path) -> Tensor:
    gray = np.asarray(Image.open(path).convert("L"), dtype=np.float32)
    return torch.from_numpy(ndimage.gaussian_filter(np.abs(gray - np.median(gray)), GRAY_BLUR))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds magnetic_tile")
    parser.add_argument("--weights", type=Path, help="folder that holds the checkpoints")
    parser.add_argument("--maps", nargs="+", default=["gray", "prototypes"], choices=["gray", "prototypes"])
    parser.add_argument("--backbone", default="resnet18", choices=list(BACKBONES))
    parser.add_argument("--image_size", type=int, default=256, help="side that images are resized to for OTPrototypes")
    parser.add_argument("--members", type=int, default=6, help="boxes per object")
    parser.add_argument("--jitter", type=float, default=0.1, help="their standard deviation, in sides of the true box")
    parser.add_argument("--entropies", type=float, nargs="+", default=[0.6, 1.4], help="of the weights, nats")
    parser.add_argument("--mask_size", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path("results/masks_from_boxes"))
    args = parser.parse_args()
    root = args.data / "magnetic_tile"
    if not root.is_dir():
        parser.error(f"{root}: no such folder")
    if "prototypes" in args.maps and args.weights is None:
        parser.error("--weights: needed for the maps of OTPrototypes; --maps gray does without")
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    trained = {}
    if "prototypes" in args.maps:
        register_same_padding()
        task = make_task(root, KINDS, args)
        trained = {sample.path.resolve(): sample.anomaly_map for sample in task.learn + task.report}
    overlaps: dict[str, dict[str, list[Tensor]]] = {}
    for kind in KINDS:
        for number, path in enumerate(sorted((root / "test" / kind).glob("*.*"))):
            masks, true = objects_of(root / "ground_truth" / kind / f"{path.stem}.png")
            size = tuple(masks.shape[1:])
            boxes, scores = detections(true, size, args, seed=1000 * KINDS.index(kind) + number)
            maps = {"": None, "gray: ": gray_map(path)}
            if trained:
                small = trained[path.resolve()][None]
                maps["prototypes: "] = F.interpolate(small, size=size, mode="bilinear", antialias=True)[0, 0]
            for prefix, map_ in maps.items():
                if prefix and prefix[:-2] not in args.maps:
                    continue
                for name, found in ways(boxes, scores, true, map_, size, args).items():
                    iou = (found & masks).sum((1, 2)) / (found | masks).sum((1, 2))
                    overlaps.setdefault(prefix + name, {}).setdefault(kind, []).append(iou)
    rows = []
    for name, by_kind in overlaps.items():
        pooled = {kind: torch.cat(values) for kind, values in by_kind.items()}
        columns = {f"{kind} ({len(values)})": float(values.mean()) for kind, values in pooled.items()}
        every = torch.cat(list(pooled.values()))
        rows.append(
            {"mask": name, **columns, "all": float(every.mean()), "all > .5": float((every > 0.5).float().mean())}
        )
    text = table(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
