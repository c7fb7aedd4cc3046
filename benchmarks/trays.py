"""Faults of counts, kinds and places: AUROC on the embedded trays of parts, per kind of fault.

    python benchmarks/trays.py --weights ../shared/weights         # ResNet-18
    python benchmarks/trays.py --backbones filter_bank             # no weights

48 complete trays for training; 40 complete ones and 20 of each kind of fault for the test. Default arguments and the
transport score. Another seed is another kit: other kinds of parts, colors and places.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from real_data import BACKBONES, register_same_padding
from sklearn.metrics import roc_auc_score

from anomalib_ot.synthetic.tray import DEFECTS

FILTERS = {"backbone": "filter_bank", "layers": ["scale1", "scale2", "scale3"]}


def measure(backbone: str, weights: Path | None, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Train on one kit; per kind of fault the image AUROC of each score, and the AUROC of its images' pixels."""
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes, SyntheticTray

    arguments = FILTERS
    if backbone != "filter_bank":
        network, file, layers = BACKBONES[backbone]
        arguments = {"backbone": network, "layers": layers, "backbone_weights": str(weights / file)}
    model = OTPrototypes(seed=seed, evaluator=False, visualizer=False, post_processor=False, **arguments)
    data = SyntheticTray(num_test_good=40, num_per_defect=20, seed=seed, val_split_mode="same_as_test")
    quiet = {"logger": False, "limit_val_batches": 0, "enable_progress_bar": False, "enable_model_summary": False}
    Engine(default_root_dir=folder, accelerator="cpu", **quiet).fit(model=model, datamodule=data)
    data.setup("test")
    model.eval()
    scores: dict[str, list[float]] = {"combined": [], "map": [], "transport": [], "position": []}
    kinds, maps, masks = [], [], []
    for batch in data.test_dataloader():
        with torch.inference_mode():
            found = model.model(model.pre_processor.transform(batch.image, None)[0])
        scores["combined"] += found.pred_score.tolist()
        scores["map"] += found.anomaly_map.flatten(1).amax(1).tolist()
        scores["transport"] += found.transport_score.tolist()
        scores["position"] += found.position_map.flatten(1).amax(1).tolist()
        kinds += [Path(path).parent.name for path in batch.image_path]
        maps += list(found.anomaly_map.flatten(1).half())
        masks += list(batch.gt_mask.flatten(1).bool())
    figures = {}
    for defect in DEFECTS:
        chosen = [index for index, kind in enumerate(kinds) if kind in ("good", defect)]
        truth = [kinds[index] == defect for index in chosen]
        figures[defect] = {
            name: float(roc_auc_score(truth, [values[index] for index in chosen])) for name, values in scores.items()
        }
        faulty = [index for index in chosen if kinds[index] == defect]
        pixels = torch.cat([masks[index] for index in faulty]), torch.cat([maps[index] for index in faulty])
        figures[defect]["pixels"] = float(roc_auc_score(*pixels))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder that holds the checkpoints")
    parser.add_argument("--backbones", nargs="+", default=["resnet18"], choices=["filter_bank", *BACKBONES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.weights is None and args.backbones != ["filter_bank"]:
        parser.error("--weights is missing; only the filter bank does without")
    warnings.filterwarnings("ignore")
    register_same_padding()
    for backbone in args.backbones:
        runs = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(backbone, args.weights, seed, Path(folder)))
            print(json.dumps({"backbone": backbone, "seed": seed, **runs[-1]}), flush=True)
        for defect in DEFECTS:
            means = {name: round(statistics.mean(run[defect][name] for run in runs), 4) for name in runs[0][defect]}
            print(f"{backbone}, {defect}, mean of {len(runs)} seeds: {means}")


if __name__ == "__main__":
    main()
