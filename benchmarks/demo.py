"""The first run: train on good fabric, test, explain, export, and check that the exported model says the same.

    python benchmarks/demo.py --out results/demo

Then the same model on trays of parts, whose faults are those of counts, kinds and places: figures and a sheet.

Needs no download: the images are drawn, and the features come from a bank of filters that has no weights. It goes
through Anomalib's own Engine all the way. Exit code 0: done, the exported model agrees; 1: it does not agree; 2: the
arguments are wrong.
"""

import argparse
import contextlib
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MARK = "made_by_demo.txt"
OWN = ("metrics.json", "contact_sheet.png", "tray_sheet.png", "pictures", "model")
TOLERANCE = 1e-3
ORDER = ("misplaced_motif", "missing_motif", "hole", "stain", "broken_yarn", "coarse_yarn")
SHOWN = (*ORDER[:-1], "good")  # on the contact sheet; one of the two yarns is enough
TRAY_ORDER = ("missing", "extra", "swapped", "moved", "damaged")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    options = _parse(arguments)
    console = Console()
    try:
        _prepare(options.out)
    except ValueError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    started = time.perf_counter()
    steps: dict[str, float] = {}
    with _quiet(), tempfile.TemporaryDirectory() as workshop:
        metrics = _run(options, Path(workshop), console, steps)
    metrics["seconds"] = {**steps, "all": round(time.perf_counter() - started, 1)}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _report(console, metrics, options.out)
    agreement = metrics["exported_model"]
    if not agreement["agrees"]:
        console.print(
            f"[red]The exported model does not agree with PyTorch:[/] score differs by up to {agreement['score']:.2g}, "
            f"map by {agreement['map']:.2g} (allowed {TOLERANCE:g}), and {agreement['other_verdicts']} of "
            f"{agreement['images']} verdicts are others.",
            highlight=False,
            soft_wrap=True,
        )
    return 0 if agreement["agrees"] else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, empty, or an earlier demo's")
    parser.add_argument("--num-train", type=int, default=48, help="good images to train on")
    parser.add_argument("--num-test-good", type=int, default=20, help="good images to validate and test with")
    parser.add_argument("--num-per-defect", type=int, default=6, help="images per kind of defect")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="names fabric and tray, the splits and the fits")
    return parser.parse_args(arguments)


def _prepare(out: Path) -> None:
    """Make room in the folder, and touch nothing that the demo has not made."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        msg = f"--out is '{out}', which is no folder; give a new folder"
        raise ValueError(msg)
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        found = min(path.name for path in out.iterdir())
        msg = f"--out is '{out}', which holds other files, such as '{found}'; give a new folder or an earlier demo's"
        raise ValueError(msg)
    for name in OWN:
        old = out / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(
        f"benchmarks/demo.py wrote {', '.join(OWN)} here; its next run writes them anew.\n", encoding="utf-8"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hosts' notes off the terminal; errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _run(options: argparse.Namespace, workshop: Path, console: Console, steps: dict[str, float]) -> dict[str, Any]:
    """Go through all steps; return the figures."""

    @contextlib.contextmanager
    def step(name: str, text: str) -> Iterator[None]:
        start = time.perf_counter()
        with console.status(text + " ..."):
            yield
        steps[name] = round(time.perf_counter() - start, 1)
        console.print(f"{text} [dim]{steps[name]:.1f} s[/]", highlight=False)

    with step("import", "Import PyTorch and Anomalib"):
        from anomalib.engine import Engine
        from lightning.pytorch import seed_everything

        from anomalib_ot import SyntheticFabric, SyntheticTray
        from anomalib_ot.integration.visualization.visualizer import ExplanationVisualizer
    seed_everything(options.seed, verbose=False)
    arguments = {
        "num_train": options.num_train,
        "num_test_good": options.num_test_good,
        "num_per_defect": options.num_per_defect,
        "image_size": (options.image_size, options.image_size),
        "seed": options.seed,
    }
    datamodule = SyntheticFabric(**arguments)
    model = _model(
        options, {"smoothing": 2.0}, visualizer=ExplanationVisualizer(options.out / "pictures")
    )  # thin yarns

    def engine() -> Engine:
        """Set up a new one: the second must not remember the first one's pictures."""
        return Engine(
            accelerator="cpu",
            devices=1,
            default_root_dir=workshop,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    with step("draw", "Draw the fabric, or find it in the cache"):
        datamodule.prepare_data()
    first = engine()
    with step("train", f"Train on {options.num_train} good images, find thresholds on the validation images"):
        first.fit(model, datamodule=datamodule)
        checkpoint = first.best_model_path
    with step("test", "Test, and draw a picture of each test image"):
        (tested,) = first.test(model, datamodule=datamodule, verbose=False)
    with step("predict", "Predict the validation and test images"):
        model.visualizer = None
        halves = _predict(engine(), model, datamodule)
    with step("export", "Export to OpenVINO"):
        quiet = {"verbose": False}
        exported = first.export(model, "openvino", export_root=workshop / "export", onnx_kwargs=quiet)
        _keep(exported, checkpoint, options.out / "model")
    with step("compare", "Run the exported model on the test images"):
        agreement = _compare(options.out / "model" / "model.xml", halves["test"])
    _draw_sheet(halves["test"], model.post_processor, SHOWN, options.out / "contact_sheet.png")

    trays = SyntheticTray(**arguments)
    # Parts at any angle look more different than cloth, and faults may be small: more prototypes, and the maximum.
    tray_model = _model(options, {"score": "max"}, num_prototypes=512, visualizer=False)
    with step("tray_draw", "Draw the trays, or find them in the cache"):
        trays.prepare_data()
    with step("tray_train", f"Train on {options.num_train} complete trays"):
        engine().fit(tray_model, datamodule=trays)
    with step("tray_predict", "Predict the validation and test trays"):
        tray_halves = _predict(engine(), tray_model, trays)
    _draw_sheet(tray_halves["test"], tray_model.post_processor, (*TRAY_ORDER, "good"), options.out / "tray_sheet.png")
    return {
        "images": {"train": options.num_train, **{name: len(items) for name, items in halves.items()}},
        **{name: round(float(value), 4) for name, value in tested.items()},
        "per_defect": _per_defect([*halves["validation"], *halves["test"]], ORDER),
        "exported_model": agreement,
        "tray": {
            "images": {"train": options.num_train, **{name: len(items) for name, items in tray_halves.items()}},
            "per_defect": _per_defect([*tray_halves["validation"], *tray_halves["test"]], TRAY_ORDER),
        },
    }


def _model(options: argparse.Namespace, advanced: dict[str, Any], **arguments: Any) -> Any:
    """Set up the model without weights that both data sets get."""
    from anomalib_ot import OTPrototypes

    return OTPrototypes(
        backbone="filter_bank",
        layers=["scale1", "scale2", "scale3"],
        image_size=(options.image_size, options.image_size),
        seed=options.seed,
        advanced={"transport_score": True, **advanced},
        **arguments,
    )


def _predict(engine: Any, model: Any, datamodule: Any) -> dict[str, list[Any]]:
    """Predict the validation and the test images, item by item."""
    loaders = {"validation": datamodule.val_dataloader(), "test": datamodule.test_dataloader()}
    predicted = engine.predict(model, dataloaders=list(loaders.values()))
    return {
        name: [item for batch in batches for item in batch] for name, batches in zip(loaders, predicted, strict=True)
    }


def _keep(exported: Path, checkpoint: str, folder: Path) -> None:
    """Put the exported model and the checkpoint into one folder."""
    folder.mkdir()
    for path in exported.parent.iterdir():
        shutil.copy(path, folder / path.name)
    shutil.copy(checkpoint, folder / "model.ckpt")


def _compare(path: Path, items: list[Any]) -> dict[str, Any]:
    """Run the exported model on the image files and compare with what PyTorch said of the same files."""
    import numpy as np
    import openvino
    from PIL import Image

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    score = anomaly_map = 0.0
    other_verdicts, seconds = 0, 0.0
    for item in items:
        with Image.open(item.image_path) as file:
            pixels = np.asarray(file.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
        start = time.perf_counter()
        outputs = compiled(pixels)
        seconds += time.perf_counter() - start
        score = max(score, abs(float(outputs["pred_score"][0]) - float(item.pred_score)))
        gap = np.abs(outputs["anomaly_map"][0, 0] - item.anomaly_map.numpy()).max()
        anomaly_map = max(anomaly_map, float(gap))
        other_verdicts += bool(outputs["pred_label"][0]) != bool(item.pred_label)
    return {
        "agrees": score <= TOLERANCE and anomaly_map <= TOLERANCE and other_verdicts == 0,
        "images": len(items),
        "score": score,
        "map": anomaly_map,
        "other_verdicts": other_verdicts,
        "tolerance": TOLERANCE,
        "milliseconds_per_image": round(1000 * seconds / len(items), 1),
    }


def _per_defect(items: list[Any], order: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUROC of each kind of defect against good images, by several scores, and of the pixels of its images."""
    import torch
    from sklearn.metrics import roc_auc_score

    from anomalib_ot.anomaly.scoring import image_score

    kinds = [Path(item.image_path).parent.name for item in items]
    maps = torch.stack([item.anomaly_map for item in items])[:, None]
    scores = {
        "score": [float(item.pred_score) for item in items],
        "map_alone": image_score(maps, "mean_top1").tolist(),
        "transport_score": [float(item.transport_score) for item in items],
        "position_map": [float(item.position_map.max()) for item in items],
    }
    figures = {}
    for defect in sorted(set(kinds) - {"good"}, key=order.index):
        chosen = [index for index, kind in enumerate(kinds) if kind in ("good", defect)]
        truth = [kinds[index] == defect for index in chosen]
        figures[defect] = {"images": sum(truth)}
        for name, values in scores.items():
            figures[defect][name] = round(float(roc_auc_score(truth, [values[index] for index in chosen])), 4)
        of_kind = [item for item, kind in zip(items, kinds, strict=True) if kind == defect]
        pixels = (
            torch.stack([getattr(item, name) for item in of_kind]).flatten() for name in ("gt_mask", "anomaly_map")
        )
        figures[defect]["pixels"] = round(float(roc_auc_score(*pixels)), 4)
    return figures


def _draw_sheet(items: list[Any], post_processor: Any, shown: Sequence[str], path: Path) -> None:
    """One row per kind: the test image with the median score of its kind, so that none is picked by its looks."""
    from anomalib_ot.integration.visualization.contact_sheet import contact_sheet
    from anomalib_ot.integration.visualization.visualizer import explanation_of

    rows = []
    for kind in shown:
        ranked = sorted(
            (item for item in items if Path(item.image_path).parent.name == kind),
            key=lambda item: float(item.pred_score),
        )
        if ranked:
            explanation = explanation_of(
                ranked[len(ranked) // 2],
                float(post_processor.normalized_image_threshold),
                transport_threshold=post_processor.transport_threshold,
            )
            rows.append((kind.replace("_", " "), explanation))
    contact_sheet(rows).save(path)


def _report(console: Console, metrics: dict[str, Any], out: Path) -> None:
    """Say what was done, how well, and where it lies."""
    images, agreement = metrics["images"], metrics["exported_model"]
    title = f"{images['test']} test images, trained on {images['train']} good ones"
    console.print(_table(title, metrics["per_defect"], metrics))
    console.print(
        f"F1 of images {metrics['image_F1Score']:.3f}, of pixels {metrics['pixel_F1Score']:.3f}. Single kinds are "
        f"counted over all {images['validation'] + images['test']} validation and test images.\n"
        f"OpenVINO against PyTorch on {agreement['images']} files: score within {agreement['score']:.1e}, map within "
        f"{agreement['map']:.1e}, {agreement['images'] - agreement['other_verdicts']} verdicts the same; "
        f"{agreement['milliseconds_per_image']:.0f} ms per image.",
        highlight=False,
        soft_wrap=True,
    )
    trays = metrics["tray"]["images"]
    title = f"Trays of parts: {trays['validation'] + trays['test']} images, trained on {trays['train']} complete ones"
    console.print(_table(title, metrics["tray"]["per_defect"]))
    console.print(
        f"Look at {out / 'contact_sheet.png'} and {out / 'tray_sheet.png'}, then at {out / 'pictures'}. The model is "
        f"in {out / 'model'}, all figures are in {out / 'metrics.json'}. {metrics['seconds']['all']:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, per_defect: dict[str, dict[str, float]], metrics: dict[str, Any] | None = None) -> Table:
    """Show AUROC per kind of defect, below those of all images where they were measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("AUROC")
    for name in ("score", "map alone", "transport score", "position map", "pixels"):
        table.add_column(name, justify="right")
    if metrics is not None:
        table.add_row(
            "all defects",
            f"{metrics['image_AUROC']:.3f}",
            "",
            "",
            "",
            f"{metrics['pixel_AUROC']:.3f}",
            end_section=True,
        )
    for defect, figures in per_defect.items():
        values = [figures[name] for name in ("score", "map_alone", "transport_score", "position_map", "pixels")]
        table.add_row(f"{defect} ({figures['images']})", *(f"{value:.3f}" for value in values))
    return table


if __name__ == "__main__":
    sys.exit(main())
