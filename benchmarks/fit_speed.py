"""The fit of OTPrototypes against the published procedure done with POT, and against Anomalib's coreset sampling.

    python benchmarks/fit_speed.py --data ../shared/data --weights ../shared/weights

All three get the same features, kept in memory. The published procedure is: four members (two layers, alpha 0 and 0.3),
50 epochs of one dense balanced problem per 64 images, epsilon 0.01, 100 log-domain iterations each, from random
prototypes. Nobody waits for that here: one problem per layer is timed for ten iterations (POT on torch tensors,
float32) and multiplied by the number of iterations, problems and members. It has one grid of prototypes per layer here;
the published 16 take 16 times the time and memory. Coreset sampling is Anomalib's own `KCenterGreedy`, run in full at
the ratio that is named. Peak memory is the anonymous memory that a process of its own adds to what it held before.
"""

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from peak_memory import added_at_peak
from real_data import BACKBONES, SETS, register_same_padding
from torch import Tensor

EPOCHS, BATCH, ITERATIONS, SAMPLED = 50, 64, 100, 10


def features_of(data: Path, weights: Path, name: str, backbone_name: str) -> tuple[dict, int]:
    """Return the training patches of a set per source, and the image size."""
    from anomalib.data.utils.image import read_image

    from anomalib_ot import OTPrototypes
    from anomalib_ot.anomaly.fitting import Patches
    from anomalib_ot.integration.models.backbone import fill_weights

    register_same_padding()
    backbone, file, layers = BACKBONES[backbone_name]
    size = SETS[name]
    model = OTPrototypes(
        backbone=backbone, layers=layers, image_size=(size, size), backbone_weights=str(weights / file)
    )
    fill_weights(model.model.feature_extractor, str(weights / file), 0)
    model.eval()
    found: dict = {}
    for path in sorted((data / name / "train" / "good").iterdir()):
        image = read_image(path, as_tensor=True)[None]
        with torch.no_grad():
            for source, (patches, grid) in model.model.embed(model.pre_processor.transform(image)).items():
                found.setdefault(source, ([], grid))[0].append(patches[0])
    return {source: Patches(torch.stack(some), grid) for source, (some, grid) in found.items()}, size


def fit_ours(patches: dict, size: int) -> None:
    """Fit the default members."""
    from anomalib_ot.anomaly.members import make_members
    from anomalib_ot.anomaly.model import PrototypesModel

    layers = list(dict.fromkeys(layer for names, _ in patches for layer in names))
    PrototypesModel(torch.nn.Identity(), make_members("default", layers)).fit(patches, (size, size), 0)


def a_few(patches: dict) -> dict:
    """Return the patches of two images."""
    return {source: type(known)(known.embeddings[:2], known.grid_size) for source, known in patches.items()}


def published_problem(known: "Patches", grids: int) -> tuple[Tensor, Tensor]:  # noqa: F821
    """Return cost (n, K) of one batch of 64 images against random grids, and the embeddings (n, D)."""
    x = known.embeddings[:BATCH].flatten(0, 1)
    count = grids * known.embeddings.shape[1]
    prototypes = torch.rand(count, x.shape[1], generator=torch.Generator().manual_seed(0))
    cost = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(prototypes, dim=1).T
    cost.neg_().add_(1)
    cost.mul_(0.7 / cost.max())
    position = torch.cdist(known.positions, known.positions.repeat(grids, 1))
    position.mul_(0.3 / position.max())
    cost.view(-1, *position.shape).add_(position)  # in place: only POT's own matrices count
    return cost, x


def published_step(known: "Patches", iterations: int, grids: int = 1) -> None:  # noqa: F821
    """Make one step of the published fit with fewer iterations: cost, plan, barycenters."""
    import ot

    cost, x = published_problem(known, grids)
    a, b = torch.full((len(cost),), 1 / len(cost)), torch.full((cost.shape[1],), 1 / cost.shape[1])
    plan = ot.bregman.sinkhorn_log(a, b, cost, 0.01, numItermax=iterations, stopThr=0, warn=False)
    _ = cost.shape[1] * plan.T @ x


def seconds(run: object) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def coreset(patches: dict, ratio: float) -> None:
    """Sample as Patchcore does: all layers at the finest grid, side by side."""
    from anomalib.models.components import KCenterGreedy

    finest = max(known.grid_size for known in patches.values())
    parts = []
    for known in patches.values():
        maps = known.embeddings.mT.unflatten(2, known.grid_size)
        parts.append(torch.nn.functional.interpolate(maps, size=finest, mode="bilinear").flatten(2).mT.flatten(0, 1))
    KCenterGreedy(embedding=torch.cat(parts, 1), sampling_ratio=ratio).sample_coreset()


def measure(job: dict) -> float:
    """Do one contender's work in this process and return its seconds or MB."""
    patches, size = features_of(Path(job["data"]), Path(job["weights"]), job["set"], job["backbone"])
    if job["what"] == "ours":
        fit_ours(a_few(patches), size)  # whatever is loaded on first use
        return {"s": seconds(lambda: fit_ours(patches, size)), "MB": 0.0}
    if job["what"] == "ours, memory":
        fit_ours(a_few(patches), size)
        return {"s": 0.0, "MB": added_at_peak(lambda: fit_ours(patches, size)) / 1e6}
    if job["what"] == "published":
        total, images = 0.0, len(next(iter(patches.values())).embeddings)
        for known in patches.values():
            spent = seconds(lambda known=known: published_step(known, SAMPLED))
            total += 2 * EPOCHS * math.ceil(images / BATCH) * spent * ITERATIONS / SAMPLED
        return {"s": total, "MB": 0.0}
    if job["what"] == "published, memory":
        return {
            "s": 0.0,
            "MB": added_at_peak(lambda: [published_step(known, 2, job["grids"]) for known in patches.values()]) / 1e6,
        }
    return {"s": seconds(lambda: coreset(patches, job["ratio"])), "MB": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--backbones", nargs="+", default=["resnet18"], choices=list(BACKBONES))
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio; Patchcore's default is 0.1")
    parser.add_argument("--grids", type=int, default=1, help="grids of the published memory; 16 take 12 GB and more")
    parser.add_argument("--only-memory", action="store_true", help="skip all that takes time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    head = (
        "set",
        "backbone",
        "ours s",
        "published s",
        "ratio",
        f"coreset {args.ratio} s",
        "ratio",
        "ours MB",
        "POT MB",
    )
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for backbone in args.backbones:
        for name in args.sets:
            found = {}
            for what in ("ours", "ours, memory", "published", "published, memory", "coreset"):
                job = {"data": str(args.data), "weights": str(args.weights), "set": name, "backbone": backbone}
                job |= {"what": what, "ratio": args.ratio, "grids": args.grids}
                if args.only_memory and "memory" not in what:
                    found[what] = {"s": float("nan"), "MB": 0.0}
                    continue
                command = [sys.executable, __file__, "--worker", json.dumps(job), "--data", ".", "--weights", "."]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[what] = json.loads(output.splitlines()[-1])
            ours, published, sampled = (found[what]["s"] for what in ("ours", "published", "coreset"))
            memory = [found[what]["MB"] for what in ("ours, memory", "published, memory")]
            print(
                f"| {name} | {backbone} | {ours:.1f} | {published:.0f} | {published / ours:.0f}x | {sampled:.1f} "
                f"| {sampled / ours:.1f}x | {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
