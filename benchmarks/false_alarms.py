"""False alarms on real good images that neither the training nor the threshold has seen.

    python benchmarks/false_alarms.py --data ../shared/data --weights ../shared/weights

Each seed parts the good images of a set in two ways. `shuffled`: a third each to train on, to take the threshold from,
and to count false alarms on; the promise holds for such images. `as the set is parted`: half of train/good each to
train on and to take the threshold from, test/good to count on; these come from other parts, or another day, and show
what the promise is worth there. `in sample` counts with the threshold that the training images themselves give.
Features are extracted once per set. The table is printed, and written to OUT/SET.md.
"""

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from real_data import BACKBONES, SETS, register_same_padding


def features(backbone: str, size: int, files: list[Path], weights: Path) -> tuple[dict, object]:
    """Embed images: values and grid by source; and the untrained model."""
    from anomalib_ot import OTPrototypes
    from anomalib_ot.integration.data.deep_images import read_image_deep
    from anomalib_ot.integration.models.backbone import fill_weights

    network, file, layers = BACKBONES[backbone]
    parts = {"evaluator": False, "visualizer": False, "post_processor": False}
    host = OTPrototypes(backbone=network, layers=layers, image_size=(size, size), **parts).eval()
    fill_weights(host.model.feature_extractor, weights / file, 0, pre_trained=True)
    blocks: dict = {}
    for path in files:
        with torch.inference_mode():
            image = host.pre_processor.transform(read_image_deep(path)[None])
            for source, (embeddings, grid) in host.model.embed(image).items():
                blocks.setdefault(source, []).append(embeddings.half())
                blocks["grid", source] = grid
    return {key: torch.cat(some) if isinstance(some, list) else some for key, some in blocks.items()}, host.model


def scores(known: dict, model: object, size: int, train: torch.Tensor, seed: int) -> torch.Tensor:
    """Fit to the images `train`, and return the score of every image."""
    from anomalib_ot.anomaly.model import PrototypesModel
    from anomalib_ot.anomaly.training_patches import Patches

    fitted = PrototypesModel(torch.nn.Identity(), [bank.member for bank in model.banks], score=model.score)
    grids = {source: known["grid", source] for source in fitted.sources}
    patches = {source: Patches(known[source][train], grid) for source, grid in grids.items()}
    fitted.fit(patches, (size, size), seed)
    found = []
    for some in torch.arange(len(known[fitted.sources[0]])).split(4):
        embedded = {source: (known[source][some].float(), grid) for source, grid in grids.items()}
        with torch.inference_mode():
            found.append(fitted._local(embedded, (size, size)).pred_score)
    return torch.cat(found)


def parted(number: int, test: int, seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Part `number` images, of which the last `test` are test/good: to train on, for the threshold, to count on."""
    draw = torch.Generator().manual_seed(seed)
    mixed, kept = torch.randperm(number, generator=draw), torch.randperm(number - test, generator=draw)
    half = (number - test) // 2
    return {
        "shuffled": mixed.tensor_split(3),
        "as the set is parted": (kept[:half], kept[half:], torch.arange(number - test, number)),
    }


def rows(name: str, args: argparse.Namespace) -> list[str]:
    """Measure one set: a row of the table for each way to part it and each rate."""
    from anomalib_ot.anomaly.false_alarms import good_threshold

    train, test = (sorted((args.data / name / part / "good").iterdir()) for part in ("train", "test"))
    known, model = features(args.backbone, args.size, [*train, *test], args.weights)
    alarms: dict = {}
    for seed in args.seeds:
        for way, (fit, held, fresh) in parted(len(train) + len(test), len(test), seed).items():
            found = scores(known, model, args.size, fit, seed)
            for rate in args.rates:
                threshold = good_threshold(found[held].tolist(), rate)
                own = good_threshold(found[fit].tolist(), rate)
                counts = [(found[fresh] > value).double().mean().item() for value in (threshold.value, own.value)]
                alarms.setdefault((way, rate), []).append((*counts, threshold, len(fit), len(fresh)))
            print(name, way, seed, flush=True)
    lines = []
    for (way, rate), some in alarms.items():
        held_out, in_sample = zip(*((one[0], one[1]) for one in some), strict=True)
        promise, fit, fresh = some[0][2:]
        lines.append(
            f"| {name} | {way} | {fit}, {promise.count}, {fresh} | {rate:g} | {promise.rate:.3f} | "
            f"{statistics.mean(held_out):.3f} ({min(held_out):.3f} to {max(held_out):.3f}) | "
            f"{promise.interval[0]:.3f} to {promise.interval[1]:.3f} | {statistics.mean(in_sample):.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--backbone", default="resnet18", choices=list(BACKBONES))
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, pixels")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("results/false_alarms"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    register_same_padding()
    args.out.mkdir(parents=True, exist_ok=True)
    head = "| set | parted | images to train, for the threshold, to count | rate asked for | rate to expect | "
    head += f"false alarms: mean of {len(args.seeds)} seeds (range) | 95 % interval of one threshold | in sample |"
    lines = [head, "|---" * 8 + "|"]
    for name in args.sets:
        found = rows(name, args)
        (args.out / f"{name.replace('/', '_')}.md").write_text("\n".join([*lines[:2], *found]) + "\n")
        lines += found
    print("\n".join(lines))


if __name__ == "__main__":
    main()
