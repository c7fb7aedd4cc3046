"""Ways to find prototypes, in one table: k-means, k-center, order p with nearest or entropic assignment; the members.

    python benchmarks/prototype_rows.py --data ../shared/data --weights ../shared/weights

Everything but the prototypes is the same: backbone, layers, members, number of prototypes, score. Features of a set are
extracted once, and each row is fitted to them with each seed. Results go to OUT/rows.jsonl as they come; rows that are
there already are not repeated. At the end image and pixel AUROC are printed, mean over the seeds, and the CPU seconds
of the fit.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from real_data import BACKBONES, SETS, folder, record, recorded, register_same_padding

# What a row changes in every member of the default.
ROWS = {
    "default (order 2, nearest)": {},
    "k-means": {"start": "k-means", "passes": 0},
    "k-center": {"passes": 0},
    "order 4, nearest": {"order": 4.0, "passes": 4},
    "order 2, entropic, free masses": {"assignment": "transport", "rho": 0.0, "epsilon": 0.02},
    "order 2, entropic, relaxed shares": {"assignment": "transport", "rho": 0.05, "epsilon": 0.02},
    "without position (alpha 0)": {"alpha": 0.0},
    "position without radii (position_quantile 0)": {"position_quantile": 0.0},
    "members without calibration": {"calibrate": False},
    "without the cosine member": {"without": "cosine"},
    "without the Euclidean members": {"without": "euclidean"},
    "without the whitened members": {"without": "whitened"},
}


def features(backbone: str, name: str, data: Path, weights: Path) -> dict:
    """Embed the training and test images of one set: patches per source, labels and masks."""
    from anomalib_ot import OTPrototypes
    from anomalib_ot.anomaly.training_patches import Patches
    from anomalib_ot.integration.models.backbone import fill_weights

    network, file, layers = BACKBONES[backbone]
    size = SETS[name]
    parts = {"evaluator": False, "visualizer": False, "post_processor": False}
    host = OTPrototypes(
        backbone=network,
        layers=layers,
        image_size=(size, size),
        **parts,
    )
    fill_weights(host.model.feature_extractor, weights / file, 0, pre_trained=True)
    host.model.eval()
    datamodule = folder(data / name, name)
    datamodule.setup()
    has_masks = (data / name / "ground_truth").is_dir()
    found = {"size": (size, size), "layers": layers, "masks": [], "labels": []}
    for part, loader in (("train", datamodule.train_dataloader()), ("test", datamodule.test_dataloader())):
        blocks: dict = {}
        for batch in loader:
            images, masks = host.pre_processor.transform(batch.image, batch.gt_mask)
            with torch.inference_mode():
                for source, (embeddings, grid) in host.model.embed(images).items():
                    blocks.setdefault(source, []).append(embeddings.half())
                    found.setdefault("grids", {})[source] = grid
            if part == "test":
                found["labels"].append(batch.gt_label)
                found["masks"].append(masks.bool() if has_masks else None)
        found[part] = {source: torch.cat(some) for source, some in blocks.items()}
    found["train"] = {source: Patches(some, found["grids"][source]) for source, some in found["train"].items()}
    found["labels"] = torch.cat(found["labels"])
    found["masks"] = torch.cat(found["masks"]) if has_masks else None
    return found


def fit_and_score(known: dict, row: str, seed: int) -> dict:
    """Fit one row to the features and measure it."""
    from sklearn.metrics import roc_auc_score

    from anomalib_ot.anomaly.members import make_members
    from anomalib_ot.anomaly.model import PrototypesModel

    options = dict(ROWS[row])
    left_out = options.pop("without", None)
    members = [one for one in make_members("default", known["layers"]) if one.feature_cost != left_out]
    if options.get("start") == "k-means":  # as many as the default finds, which comes first
        counts = known["counts", seed]
        members = [replace(one, num_prototypes=counts[one.layers, one.feature_cost]) for one in members]
    members = make_members("default", known["layers"], [one.as_dict() for one in members], **options)
    model = PrototypesModel(torch.nn.Identity(), members, score="max")
    began = time.process_time()
    model.fit(known["train"], known["size"], seed)
    seconds = time.process_time() - began
    if not ROWS[row]:
        known["counts", seed] = {(b.member.layers, b.member.feature_cost): b.num_prototypes for b in model.banks}
    maps, images = [], torch.arange(len(known["labels"]))
    model.embed = lambda some: {
        source: (values[some].float(), known["grids"][source]) for source, values in known["test"].items()
    }
    for some in images.split(16):
        with torch.inference_mode():
            maps.append(model._local(model.embed(some), known["size"]).anomaly_map)
    maps = torch.cat(maps)
    pixel = None if known["masks"] is None else roc_auc_score(known["masks"].flatten(), maps.flatten())
    return {
        "image_AUROC": float(roc_auc_score(known["labels"], maps.flatten(1).amax(1))),
        "pixel_AUROC": pixel if pixel is None else float(pixel),
        "fit_cpu_s": seconds,
        "prototypes": [bank.num_prototypes for bank in model.banks],
    }


def table(runs: list[dict]) -> str:
    """Lay out image / pixel AUROC per set, mean over the seeds, and their mean over the sets."""
    names = list(dict.fromkeys(run["set"] for run in runs))
    lines = [
        f"| backbone | row | {' | '.join(names)} | mean image | seeds | fit CPU s |",
        "|---" * (len(names) + 5) + "|",
    ]
    for backbone, row in dict.fromkeys((run["backbone"], run["row"]) for run in runs):
        mine = [run for run in runs if (run["backbone"], run["row"]) == (backbone, row)]
        cells, images = [], []
        for name in names:
            some = [run for run in mine if run["set"] == name]
            if not some:
                cells.append("-")
                continue
            images.append(statistics.mean(run["image_AUROC"] for run in some))
            pixels = [run["pixel_AUROC"] for run in some if run["pixel_AUROC"] is not None]
            cells.append(f"{images[-1]:.3f}" + (f" / {statistics.mean(pixels):.3f}" if pixels else ""))
        mean = f"{statistics.mean(images):.4f}" if len(images) == len(names) else "-"
        seeds = len({run["seed"] for run in mine})
        seconds = statistics.mean(run["fit_cpu_s"] for run in mine)
        lines.append(f"| {backbone} | {row} | {' | '.join(cells)} | {mean} | {seeds} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--backbones", nargs="+", default=["resnet18"], choices=list(BACKBONES))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/prototype_rows"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    register_same_padding()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "rows.jsonl"
    runs = recorded(log)
    done = {(run["backbone"], run["set"], run["row"], run["seed"]) for run in runs}
    for backbone in args.backbones:
        for name in args.sets:
            left = [(s, r) for s in args.seeds for r in args.rows if (backbone, name, r, s) not in done]
            known = features(backbone, name, args.data, args.weights) if left else {}
            for seed, row in left:
                if ROWS[row].get("start") == "k-means" and ("counts", seed) not in known:
                    fit_and_score(known, next(iter(ROWS)), seed)
                run = {"backbone": backbone, "set": name, "row": row, "seed": seed, **fit_and_score(known, row, seed)}
                print(json.dumps(run), flush=True)
                runs.append(run)
                record(run, log)
    text = table(runs)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
