"""OTPrototypes (default, grids, paper preset) beside Anomalib's Patchcore on real images.

    python benchmarks/real_data.py --data ../shared/data --weights ../shared/weights

With `--defective 0.1` each model is trained twice: on good images, and with so many defective ones among them that they
are a tenth. Both are tested on the other images.

Same backbone, weights, layers, image size and test images for all; every run is a process of its own, so that its
peak memory is its own. Results go to OUT/runs.jsonl as they come; runs that are there already are not repeated. At the
end the table of all runs is printed and written to OUT/table.md.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

SETS = {"magnetic_tile": 224, "aitex_fabric/fabric02_twill": 256, "elpv": 224, "mvtec_screw": 256}
BACKBONES = {
    "resnet18": ("resnet18", "resnet18_imagenet_layer123.safetensors", ("layer2", "layer3")),
    "mobilenetv2": ("mobilenetv2_100_same", "mobilenetv2_100_imagenet.safetensors", ("blocks.2", "blocks.4")),
    "resnet50": ("resnet50", "resnet50_imagenet_layer123.safetensors", ("layer2", "layer3")),
    "lite0": ("tf_efficientnet_lite0", "tf_efficientnet_lite0_imagenet.safetensors", ("blocks.2", "blocks.4")),
}
# With a `preset` the arguments are those of its members. The published 16 grids per layer need a cost matrix of 2.5 GB
# per problem, and 50 passes take hours on 2 cores: one grid and 10 passes are what fits a small machine.
MODELS = {
    "OTPrototypes": {},
    "OTPrototypes, outliers dropped": {"advanced": {"drop_outliers": True}},
    "OTPrototypes, the map alone": {"advanced": {"transport_score": False}},
    "OTPrototypes, preset paper (1 grid, 10 passes)": {"preset": "paper", "num_global": 1, "passes": 10},
    "Patchcore": {},
}


KEYS = ("set", "backbone", "model", "coreset", "seed", "defective", "mixed")


def register_same_padding() -> None:
    """Make timm know MobileNetV2 with the padding that its local weights were trained with."""
    import timm
    from timm.models import register_model

    @register_model
    def mobilenetv2_100_same(pretrained: bool = False, **options: object) -> "torch.nn.Module":  # noqa: F821
        return timm.create_model("mobilenetv2_100", pretrained=pretrained, pad_type="same", **options)


def recorded(log: Path) -> list[dict]:
    """Runs that an earlier call has written to a file, one line of JSON each."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def record(run: dict, log: Path) -> None:
    """Add a run to that file."""
    with log.open("a") as lines:
        lines.write(json.dumps(run) + "\n")


def folder(root: Path, name: str, normal_dir: str | Path = "train/good") -> "Folder":  # noqa: F821
    """One of the sets as a datamodule, validated on its test images; `normal_dir` has the images to train on."""
    from anomalib.data import Folder

    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    has_masks = (root / "ground_truth").is_dir()
    return Folder(
        name=name.replace("/", "_"),
        root=root,
        normal_dir=normal_dir,
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in defects],
        mask_dir=[f"ground_truth/{defect}" for defect in defects] if has_masks else None,
        val_split_mode="same_as_test",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        seed=0,
    )


def parted(root: Path, out: Path, part: float, seed: int, *, mixed: bool) -> Path:
    """Make a folder of links in which defective images, drawn with `seed`, are training images instead of test images.

    They are `part` of all training images there; without `mixed` they are in neither.
    """
    import random

    good = sorted((root / "train/good").iterdir())
    defects = sorted(path for path in (root / "test").glob("*/*") if path.parent.name != "good")
    taken = set(random.Random(seed).sample(defects, round(part / (1 - part) * len(good))))
    shutil.rmtree(out, ignore_errors=True)
    links = {f"train/good/{path.name}": path for path in good}
    links |= {f"train/good/{path.parent.name}_{path.name}": path for path in taken if mixed}
    links |= {str(path.relative_to(root)): path for path in (root / "test").glob("*/*") if path not in taken}
    gone = {(path.parent.name, path.stem) for path in taken}
    masks = (root / "ground_truth").glob("*/*")
    links |= {
        str(path.relative_to(root)): path
        for path in masks
        if (path.parent.name, path.stem.removesuffix("_mask")) not in gone
    }
    for name, path in links.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path.resolve())
    return out


def build_patchcore(
    backbone: str, layers: tuple, weights: Path, size: int, coreset: float, **parts: object
) -> "Patchcore":  # noqa: F821
    """Anomalib's Patchcore with local weights."""
    from anomalib.models import Patchcore

    from anomalib_ot.vision.backbone import load_weights

    model = Patchcore(
        backbone=backbone,
        layers=layers,
        pre_trained=False,
        coreset_sampling_ratio=coreset,
        pre_processor=Patchcore.configure_pre_processor((size, size)),
        **parts,
    )
    extractor = model.model.feature_extractor
    load_weights(extractor.feature_extractor, backbone, extractor.idx, weights)
    return model


def run_one(job: dict) -> dict:
    """Train and test one model on one set; the work of a child process."""
    warnings.filterwarnings("ignore")
    import torch
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes
    from anomalib_ot.anomaly.members import make_members

    register_same_padding()
    torch.manual_seed(job["seed"])
    backbone, file, layers = BACKBONES[job["backbone"]]
    weights = Path(job["weights"]) / file
    root, size = Path(job["data"]) / job["set"], SETS[job["set"]]
    has_masks = (root / "ground_truth").is_dir()
    if job["defective"]:
        links = Path(job["scratch"]) / "links"
        root = parted(root, links, job["defective"], job["seed"], mixed=job["mixed"])
    datamodule = folder(root, job["set"])
    parts = {"evaluator": False, "visualizer": False, "post_processor": False}
    if job["model"] == "Patchcore":
        model = build_patchcore(backbone, layers, weights, size, job["coreset"], **parts)
    else:
        arguments = dict(MODELS[job["model"]])
        if "preset" in arguments:
            preset = arguments.pop("preset")
            members = [member.as_dict() for member in make_members(preset, layers, **arguments)]
            arguments = {"preset": preset, "advanced": {"members": members}}
        model = OTPrototypes(
            backbone=backbone,
            layers=layers,
            backbone_weights=str(weights),
            image_size=(size, size),
            seed=job["seed"],
            **arguments,
            **parts,
        )
    engine = Engine(default_root_dir=job["scratch"], accelerator="cpu", logger=False, limit_val_batches=0)
    start = time.process_time()
    engine.fit(model=model, datamodule=datamodule)
    fit_seconds = time.process_time() - start
    image_auroc, pixel_auroc, peak = raw_auroc(model, datamodule, has_masks)
    if job["model"] == "Patchcore":
        state = model.model.memory_bank.nbytes
    else:
        state = sum(value.nbytes for value in model.model.fitted_state().values())
    return {
        **{key: job[key] for key in KEYS},
        "image_AUROC": image_auroc,
        "pixel_AUROC": pixel_auroc,
        "fit_cpu_s": fit_seconds,
        "state_kB": state / 1e3,
        "peak_MB": peak,
    }


def raw_auroc(model: "AnomalibModule", datamodule: "Folder", has_masks: bool) -> tuple:  # noqa: F821
    """Return image AUROC, pixel AUROC (or None) and peak memory (MB), from the raw scores of the test images.

    Not by the engine's metric: torchmetrics takes scores outside [0, 1] for logits, batch by batch, so that raw scores
    of several batches are mixed up (seen: 0.50 for scores whose AUROC is 0.91).
    """
    import torch
    from sklearn.metrics import roc_auc_score

    datamodule.setup("test")
    model.eval()
    scores, labels, pixels, truth = [], [], [], []
    for batch in datamodule.test_dataloader():
        images, masks = model.pre_processor.transform(batch.image, batch.gt_mask)
        with torch.inference_mode():
            found = model.model(images)
        scores.append(found.pred_score.flatten())
        labels.append(batch.gt_label)
        if has_masks:
            pixels.append(found.anomaly_map.flatten())
            truth.append(masks.flatten().bool())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # before the sorting of millions of pixels
    image = roc_auc_score(torch.cat(labels).numpy(), torch.cat(scores).numpy())
    if not has_masks:
        return float(image), None, peak
    return float(image), float(roc_auc_score(torch.cat(truth).numpy(), torch.cat(pixels).numpy())), peak


def label(run: dict) -> str:
    """Name the model of a run, and what it was trained on."""
    name = f"Patchcore, coreset {run['coreset']}" if run["model"] == "Patchcore" else run["model"]
    if run.get("defective"):
        name += f", {run['defective']:g} of the training images defective" if run["mixed"] else ", on good images"
    return name


def table(runs: list[dict]) -> str:
    """Lay runs out as Markdown, Patchcore's figures beside the ratios to them."""
    lines = [
        "| set | backbone | model | image AUROC | pixel AUROC | fit, CPU s | state kB | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: (run["backbone"], run["set"], run["model"])):
        pixel = "-" if run["pixel_AUROC"] is None else f"{run['pixel_AUROC']:.3f}"
        name = label(run)
        lines.append(
            f"| {run['set']} | {run['backbone']} | {name} | {run['image_AUROC']:.3f} | {pixel} "
            f"| {run['fit_cpu_s']:.1f} | {run['state_kB']:.0f} | {run['peak_MB']:.0f} |"
        )
    lines += ["", "| backbone | model | sets | mean image AUROC | mean pixel AUROC |", "|---|---|---|---|---|"]
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["backbone"], label(run)), []).append(run)
    for (backbone, name), members in sorted(groups.items()):
        pixels = [run["pixel_AUROC"] for run in members if run["pixel_AUROC"] is not None]
        image = sum(run["image_AUROC"] for run in members) / len(members)
        pixel = f"{sum(pixels) / len(pixels):.3f}" if pixels else "-"
        lines.append(f"| {backbone} | {name} | {len(members)} | {image:.3f} | {pixel} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--coreset", type=float, default=0.1, help="Patchcore's coreset ratio; 0.1 is its default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--defective", type=float, default=0.0, help="part of the training images, such as 0.1")
    parser.add_argument("--out", type=Path, default=Path("results/real_data"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        Path(job["answer"]).write_text(json.dumps(run_one(job)))
        return
    if args.data is None or args.weights is None:
        parser.error("--data and --weights are needed: the folder of the sets and the folder of the checkpoints")
    for path in (args.data, args.weights):
        if not path.is_dir():
            parser.error(f"{path}: no such folder")
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    runs = recorded(log)
    done = {tuple(run[key] for key in KEYS) for run in runs}
    jobs = [
        dict(zip(KEYS, (s, b, m, args.coreset, args.seed, args.defective, mixed), strict=True))
        for m in args.models
        for b in args.backbones
        for s in args.sets
        for mixed in ([False, True] if args.defective else [False])
    ]
    for number, job in enumerate(jobs):
        if tuple(job[key] for key in KEYS) in done:
            continue
        print(f"[{number + 1}/{len(jobs)}] {label(job)} on {job['set']} with {job['backbone']}", flush=True)
        answer = args.out / "answer.json"
        answer.unlink(missing_ok=True)
        paths = {"data": args.data, "weights": args.weights, "scratch": args.out / "scratch", "answer": answer}
        job |= {name: str(path.resolve()) for name, path in paths.items()}
        with (args.out / "last_run.log").open("w") as output:
            code = subprocess.run(
                [sys.executable, __file__, "--worker", json.dumps(job)], stdout=output, stderr=output, check=False
            ).returncode
        if code or not answer.exists():
            print(f"  failed with exit code {code}; see {output.name}", flush=True)
            continue
        run = json.loads(answer.read_text())
        runs.append(run)
        record(run, log)
        print("  " + ", ".join(f"{k} {v:.3f}" for k, v in run.items() if isinstance(v, float)), flush=True)
    text = table(runs)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
