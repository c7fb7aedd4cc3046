"""OTPrototypes from 1, 2, 4 and 8 good images, as they are and turned or mirrored besides, beside Anomalib's Patchcore.

    python benchmarks/few_shot.py --data ../shared/data --weights ../shared/weights

ResNet-18, the sets and image sizes of `real_data.py`, all of their test images. Which good images are taken is drawn by
seed, and the first of eight are those of one, two and four. The backbone sees every image once; what it says is
kept in OUT and replayed to each model. Results go to OUT/runs.jsonl as they come; runs that are there already are not
repeated.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from PIL import Image
from real_data import BACKBONES, SETS, record, recorded
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize

SHOTS, SEEDS = (1, 2, 4, 8), (0, 1, 2)
# Each version as (quarter turns, mirrored).
VERSIONS = {
    "as they are": [(0, False)],
    "half turn": [(0, False), (2, False)],
    "mirrored": [(0, False), (2, False), (0, True), (2, True)],
    "turned and mirrored": [(turns, mirrored) for mirrored in (False, True) for turns in range(4)],
}
BATCH = 16


class Replay(nn.Module):
    """Says of images what a network has said before; an "image" holds its number in every pixel."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        numbers = images[:, 0, 0, 0].long()
        return {name: values[numbers] for name, values in self.features.items()}


def numbered(numbers: list[int], size: int) -> Tensor:
    """Stand-ins of images, for `Replay`."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(-1, 3, size, size)


class Seen:
    """What the backbone says of the test images of a set, and of good ones, turned and mirrored."""

    def __init__(self, root: Path, size: int, weights: Path, kept: Path) -> None:
        from anomalib_ot.integration.models.backbone import build_extractor, fill_weights
        from anomalib_ot.vision.backbone import normalization

        backbone, file, self.layers = BACKBONES["resnet18"]
        self.size = size
        network = build_extractor(backbone, self.layers).eval()
        fill_weights(network, weights / file, 0)
        mean, std = (list(values) for values in normalization(backbone))
        self.files = sorted((root / "train" / "good").iterdir())
        tests = sorted(path for path in (root / "test").rglob("*") if path.is_file())
        self.labels = [int(path.parent.name != "good") for path in tests]
        self.chosen = {}
        for seed in SEEDS:
            order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed))
            self.chosen[seed] = order[: max(SHOTS)]
        wanted = [(path, version) for path in tests for version in VERSIONS["as they are"]]
        good = sorted({int(number) for numbers in self.chosen.values() for number in numbers})
        wanted += [(self.files[number], version) for number in good for version in VERSIONS["turned and mirrored"]]
        self.tests = list(range(len(tests)))
        self.number = {key: place for place, key in enumerate(wanted)}
        parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        kept.mkdir(exist_ok=True)
        for start in range(0, len(wanted), BATCH):
            file = kept / f"{start:04}.pt"
            if not file.exists():
                images = torch.stack([self._image(*key, mean, std) for key in wanted[start : start + BATCH]])
                with torch.inference_mode():
                    torch.save({layer: values.clone() for layer, values in network(images).items()}, file)
            for layer, values in torch.load(file).items():
                parts[layer].append(values)
        self.features = Replay({layer: torch.cat(values) for layer, values in parts.items()})

    def _image(self, path: Path, version: tuple[int, bool], mean: list[float], std: list[float]) -> Tensor:
        with Image.open(path) as file:
            image = pil_to_tensor(file.convert("RGB")) / 255
        image = normalize(resize(image, [self.size, self.size], antialias=True), mean, std)
        return torch.rot90(image.flip(-1) if version[1] else image, version[0], (1, 2))

    def references(self, seed: int, shots: int, versions: str) -> list[int]:
        """Numbers of the good images of a run, in all their versions."""
        files = [self.files[int(number)] for number in self.chosen[seed][:shots]]
        return [self.number[file, version] for file in files for version in VERSIONS[versions]]

    def auroc(self, model: nn.Module) -> float:
        """Image AUROC of a fitted model."""
        scores = []
        with torch.inference_mode():
            for start in range(0, len(self.tests), BATCH):
                scores.append(model(numbered(self.tests[start : start + BATCH], self.size)).pred_score.flatten())
        return float(roc_auc_score(self.labels, torch.cat(scores).numpy()))


def run_prototypes(seen: Seen, numbers: list[int]) -> float:
    """Fit OTPrototypes, its default, to images and test it."""
    from anomalib_ot.anomaly.members import make_members
    from anomalib_ot.anomaly.model import PrototypesModel
    from anomalib_ot.anomaly.training_patches import Patches

    members = make_members("default", seen.layers)
    model = PrototypesModel(seen.features, members, score="max", transport_score=True).eval()
    with torch.no_grad():
        found = model.embed(numbered(numbers, seen.size))
        model.fit({source: Patches(*values) for source, values in found.items()}, (seen.size, seen.size), 0)
    return seen.auroc(model)


def run_patchcore(seen: Seen, numbers: list[int]) -> float:
    """Fit Anomalib's Patchcore to the same images and test it."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(0)
    model = PatchcoreModel(layers=seen.layers, backbone="resnet18", pre_trained=False)
    model.feature_extractor = seen.features
    model.train()(numbered(numbers, seen.size))
    model.subsample_embedding(0.1)
    return seen.auroc(model.eval())


def table(runs: list[dict]) -> str:
    """Lay runs out as Markdown: the means over seeds, and the mean over sets."""
    sets = [name for name in SETS if any(run["set"] == name for run in runs)]
    lines = [f"| good images | model | {' | '.join(sets)} | mean |", "|---|---|" + "---|" * (len(sets) + 1)]
    for shots in SHOTS:
        for model in dict.fromkeys(run["model"] for run in runs):
            means = []
            for name in sets:
                own = [run["auroc"] for run in runs if (run["set"], run["model"], run["shots"]) == (name, model, shots)]
                means.append(sum(own) / len(own) if own else float("nan"))
            cells = " | ".join(f"{value:.3f}" for value in [*means, sum(means) / len(means)])
            lines.append(f"| {shots} | {model} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--out", type=Path, default=Path("results/few_shot"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    runs = recorded(log)
    keys = ("set", "model", "shots", "seed")
    done = {tuple(run[key] for key in keys) for run in runs}
    start = time.process_time()
    models = [(f"OTPrototypes, {versions}", versions) for versions in args.versions] + [("Patchcore", "as they are")]
    for name in args.sets:
        seen = None
        for seed in SEEDS:
            for shots in SHOTS:
                for model, versions in models:
                    if (name, model, shots, seed) in done:
                        continue
                    seen = seen or Seen(args.data / name, SETS[name], args.weights, args.out / name.replace("/", "_"))
                    fit = run_patchcore if model == "Patchcore" else run_prototypes
                    value = fit(seen, seen.references(seed, shots, versions))
                    runs.append({"set": name, "model": model, "shots": shots, "seed": seed, "auroc": value})
                    record(runs[-1], log)
                    spent = time.process_time() - start
                    print(f"{spent:.0f} s: {name}, {shots} images, seed {seed}, {model}: {value:.3f}", flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
