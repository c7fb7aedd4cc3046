"""Count anomalies: mosaics of nine normal images in any order, and the same with one image swapped for another kind.

    python benchmarks/mosaics.py --data ../shared/data --weights ../shared/weights

Every normal mosaic shows three tiles, three pieces of fabric and three solar cells; in a defective one, one kind is
there twice and another four times. Nothing looks wrong, and no place is wrong: only the amounts are. 60 normal mosaics
for training, 30 and 30 for the test, made in OUT from the training images of the three sets.

Beside the transport score, which compares amounts in closed form, stands a solve: each image's patches are transported
to the kinds, each kind bound to its usual amount the more, the less that varies over the training images (`rho_b`).
"""

import argparse
import json
import random
import statistics
import warnings
from pathlib import Path

import torch
from PIL import Image
from real_data import BACKBONES, folder, register_same_padding
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomalib_ot.ot import sinkhorn

KINDS = ("magnetic_tile", "aitex_fabric/fabric02_twill", "elpv")
CELL, SIZE = 85, 256
EPSILON, TEMPERATURE = 0.05, 0.01  # in units of the typical distance of a patch to its kind; 0.1 and 1 are no better


def make_mosaics(data: Path, root: Path, seed: int, train: int = 60, test: int = 30) -> None:
    """Write one set of mosaics as a folder with train/good, test/good and test/swapped."""
    draw = random.Random(seed)
    images = {kind: sorted((data / kind / "train/good").iterdir()) for kind in KINDS}

    def mosaic(counts: list[int]) -> Image.Image:
        cells = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
        draw.shuffle(cells)
        made = Image.new("RGB", (SIZE, SIZE))
        for place, kind in enumerate(cells):
            part = Image.open(draw.choice(images[kind])).convert("RGB").resize((CELL, CELL))
            made.paste(part, (place % 3 * CELL, place // 3 * CELL))
        return made

    for part, number in (("train/good", train), ("test/good", test), ("test/swapped", test)):
        (root / part).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            counts = [3, 3, 3]
            if part == "test/swapped":
                less, more = draw.sample(range(3), 2)
                counts[less] -= 1
                counts[more] += 1
            mosaic(counts).save(root / part / f"{index:03d}.png")


def prices(model: "PrototypesModel", images: Tensor, known: list[tuple[Tensor, Tensor]]) -> Tensor:  # noqa: F821
    """What usual amounts cost images (B, 3, H, W) beyond the nearest kinds (B, members).

    ``min <P, C> + sum_k rho_k KL((P^T 1)_k | b_k)`` over plans `P` with equal sources, minus ``mean min_k C``.

    Args:
        model: A fitted model.
        images: Normalized images.
        known: Usual amounts `b` (1, K) and relaxations `rho` (1, K) of each counting member.
    """
    embedded, found = model.embed(images), []
    for bank, (usual, rho) in zip(model._counting_banks(), known, strict=True):
        embeddings = embedded[bank.member.layers, bank.member.pooling][0]
        cost = bank.distance(bank.encode(embeddings), bank.kinds) / bank.kind_scale
        images_, patches, kinds = cost.shape
        sources = torch.full((images_, patches), 1 / patches)
        targets = usual.expand(images_, kinds)
        relaxed = {"rho_a": torch.inf, "rho_b": rho.expand(images_, kinds)}
        solved = sinkhorn(cost, sources, targets, epsilon=EPSILON, **relaxed, max_iters=100, tolerance=0.0)
        amounts = solved.plan.sum(1)
        bound = amounts * (amounts / usual).clamp(min=1e-12).log() - amounts + usual
        found.append(solved.value - cost.min(-1).values.mean(1) + (rho * bound).sum(1))
    return torch.stack(found, 1)


def usual_amounts(model: "PrototypesModel", batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:  # noqa: F821
    """Mean amounts (1, K) of each counting member, and relaxations by their variance: a quadratic bound, in KL."""
    amounts = zip(*([kinds.mean(1) for kinds in model._kinds(model.embed(images))] for images in batches), strict=True)
    known = []
    for of_member in amounts:
        every = torch.cat(of_member)
        usual = every.mean(0, keepdim=True).clamp(min=1e-6)
        usual = usual / usual.sum()
        known.append((usual, TEMPERATURE * usual / every.var(0).clamp(min=1e-8)))
    return known


def measure(root: Path, backbone: str, weights: Path, seed: int) -> dict:
    """Train on a set of mosaics; AUROC of the map's score, of the transport score, of the solve, and combined."""
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes

    network, file, layers = BACKBONES[backbone]
    model = OTPrototypes(
        backbone=network,
        layers=layers,
        backbone_weights=str(weights / file),
        image_size=(SIZE, SIZE),
        seed=seed,
        evaluator=False,
        visualizer=False,
        post_processor=False,
    )
    datamodule = folder(root, root.name)
    engine = Engine(default_root_dir=root / "run", accelerator="cpu", logger=False, limit_val_batches=0)
    engine.fit(model=model, datamodule=datamodule)
    datamodule.setup("test")
    model.eval()
    maps, transport, both, solved, labels = [], [], [], [], []
    with torch.inference_mode():
        normal = [model.pre_processor.transform(batch.image, None)[0] for batch in datamodule.train_dataloader()]
        known = usual_amounts(model.model, normal)
        usual = torch.cat([prices(model.model, images, known) for images in normal])
    center, spread = usual.median(0).values, usual.quantile(0.95, 0) - usual.median(0).values
    for batch in datamodule.test_dataloader():
        with torch.inference_mode():
            images = model.pre_processor.transform(batch.image, None)[0]
            found = model.model(images)
            solved.append(((prices(model.model, images, known) - center) / spread).sum(1))
        maps.append(found.anomaly_map.flatten(1).amax(1))
        transport.append(found.transport_score)
        both.append(found.pred_score)
        labels.append(batch.gt_label)
    truth = torch.cat(labels)
    scores = {"map": maps, "transport": transport, "solved": solved, "combined": both}
    return {name: float(roc_auc_score(truth, torch.cat(values))) for name, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--backbones", nargs="+", default=["resnet18"], choices=list(BACKBONES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/mosaics"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    register_same_padding()
    for backbone in args.backbones:
        runs = []
        for seed in args.seeds:
            root = args.out.resolve() / f"mosaics{seed}"
            if not root.is_dir():
                make_mosaics(args.data, root, seed)
            runs.append(measure(root, backbone, args.weights, seed))
            print(json.dumps({"backbone": backbone, "seed": seed, **runs[-1]}), flush=True)
        means = {name: round(statistics.mean(run[name] for run in runs), 4) for name in runs[0]}
        print(f"{backbone}, mean of {len(runs)} seeds: {means}")


if __name__ == "__main__":
    main()
