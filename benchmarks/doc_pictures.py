"""Make the pictures of the user guide, from data that the package draws itself.

    python benchmarks/doc_pictures.py            # writes docs/pictures/*.png, in about a minute

Those of transport are the ones that notebooks/01_transport.ipynb draws: the notebook is executed and its pictures are
taken. The first picture is the sheet of `make demo` (docs/contact_sheet.png), made small.
"""

import argparse
import base64
import io
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.detection.mixture import Mixture, mixture_terms
from anomalib_ot.synthetic.fabric import render_fabric
from anomalib_ot.synthetic.tray import DEFECTS, render_tray

ROOT = Path(__file__).parents[1]
OF_THE_NOTEBOOK = ("plan", "epsilon", "slack", "patches", "causes", "labels", "duplicates")
COLORS = 128  # of the palette of a picture
WIDTH = 720  # of the first picture, pixels
NARROW = 0.25  # image sides: a prototype whose normal patches all lie so near has a place of its own
SIDE = 128  # of a piece of fabric, pixels
TRAY_SEED, TRAY_INDEX = 2, 0  # a kit of 9 parts, which stay recognizable in a small picture


def save(picture: Image.Image, path: Path, colors: int = COLORS) -> None:
    """Write a picture with a palette, which makes it small."""
    few = picture.convert("RGB").quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def save_figure(figure: plt.Figure, path: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=80)
    save(Image.open(stream), path)


def notebook_pictures(out: Path) -> None:
    """Execute the first notebook and keep its pictures."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_transport.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    for name, content in zip(OF_THE_NOTEBOOK, drawn, strict=True):
        save(Image.open(io.BytesIO(base64.b64decode(content))), out / f"{name}.png")


def layouts(out: Path) -> None:
    """Show where free and local prototypes lie on fabric with a motif; filled: with a place of its own."""
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes, SyntheticFabric

    logging.disable(logging.WARNING)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "limit_val_batches": 0}
    kinds = {
        "free: 32 prototypes": {"num_prototypes": 32},
        "local: a grid that stays in place": {"num_global": 0.5, "structure": "fixed"},
    }
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2))
    with tempfile.TemporaryDirectory() as folder:
        data = SyntheticFabric(
            root=Path(folder) / "fabric",
            num_train=8,
            num_test_good=2,
            num_per_defect=1,
            image_size=(SIDE, SIDE),
            val_split_mode="same_as_test",
        )
        for axis, (name, member) in zip(axes, kinds.items(), strict=True):
            layer = {"layers": ["scale2"], "feature_cost": "cosine"}
            model = OTPrototypes(
                backbone="filter_bank",
                layers=["scale2"],
                advanced={"members": [layer | member]},
                image_size=(SIDE, SIDE),
                evaluator=False,
                visualizer=False,
                post_processor=False,
            )
            Engine(accelerator="cpu", devices=1, default_root_dir=folder, **quiet).fit(model, datamodule=data)
            bank = model.model.banks[0]
            axis.imshow(Image.open(data.root / "train" / "good" / "000.png"), extent=(0, 1, 1, 0))
            axis.imshow(np.ones((1, 1, 3)), extent=(0, 1, 1, 0), alpha=0.5)
            for (y, x), radius in zip(bank.positions.tolist(), bank.position_tolerances.tolist(), strict=True):
                if radius < NARROW:
                    axis.add_patch(plt.Circle((x, y), radius, facecolor="none", edgecolor="tab:red"))
                fill = "tab:red" if radius < NARROW else "none"
                axis.plot(x, y, "o", markerfacecolor=fill, markeredgecolor="tab:red", markersize=6)
            axis.set(title=name, xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    figure.tight_layout()
    save_figure(figure, out / "layouts.png")


def mixture(out: Path) -> None:
    """Show a mixture of four proposals: two have an object each, one doubles another, one is switched off."""
    pieces = [render_fabric(seed=4, index=1, defect=kind, size=(160, 240)) for kind in ("hole", "stain")]
    fabric = np.where(pieces[1].mask[..., None] > 0, pieces[1].image, pieces[0].image)
    truth = torch.tensor(np.stack([piece.boxes[0] for piece in pieces]))
    means = truth[[0, 1, 1, 1]] + torch.tensor([[2.0, -1, 1, 2], [-2, 1, 1, -1], [3, 2, 4, -2], [-90, -20, -80, -30]])
    scales = torch.tensor([[2.0] * 4, [3.0] * 4, [4.0] * 4, [12.0] * 4])
    proposals = Mixture(torch.tensor([[3.0, 3.0, 0.0, -4.0]]), torch.zeros(1, 4, 1), means[None], scales[None])
    weights = proposals.mixture_weights[0]
    terms = mixture_terms(proposals, truth, torch.tensor([0, 0]), torch.tensor([0, 0]))

    palette = ["tab:blue", "tab:red", "tab:orange", "0.45"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True, height_ratios=[1.35, 1])
    top.imshow(fabric, aspect="auto")
    x = torch.arange(0, 240, 0.5)
    total = torch.zeros_like(x)
    for number, color in enumerate(palette):
        left, up, right, down = means[number].tolist()
        label = f"proposal {number}, weight {float(weights[number]):.2f}"
        box = plt.Rectangle((left, up), right - left, down - up, fill=False, edgecolor=color, linewidth=2, label=label)
        top.add_patch(box)
        scale = scales[number, 0]
        density = weights[number] / (torch.pi * scale * (1 + ((x - left) / scale) ** 2))
        bottom.plot(x, density, color=color, linewidth=1.5)
        total += density
    bottom.fill_between(x, total, color="0.88", label="the mixture")
    for number, box in enumerate(truth.tolist()):
        bottom.axvline(box[0], color="black", linestyle="--", label=f"left side of object {number}")
    top.legend(loc="upper center", fontsize=8)
    top.set(xticks=[], yticks=[], title="proposals")
    bottom.legend(loc="upper center", fontsize=8)
    bottom.set(xlabel="left side of a box, pixels", ylabel="density")
    figure.tight_layout()
    save_figure(figure, out / "mixture.png")
    for number, shares in enumerate(terms.responsibilities.tolist()):
        print(f"object {number}: parts of the proposals in its likelihood", [round(share, 2) for share in shares])


def trays(out: Path) -> None:
    """Show one tray, complete and with each fault; the masks are outlined."""
    kinds = (None, *DEFECTS)
    side, title = 224, 20
    sheet = Image.new("RGB", (3 * side, 2 * (side + title)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, kind in enumerate(kinds):
        sample = render_tray(TRAY_SEED, TRAY_INDEX, kind, (side, side))
        inside = np.pad(sample.mask > 0, 2)
        grown = np.max([np.roll(inside, (dy, dx), (0, 1)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)], axis=0)
        pixels = sample.image.copy()
        pixels[(grown & ~inside)[2:-2, 2:-2]] = (255, 0, 160)
        left, top = number % 3 * side, number // 3 * (side + title)
        draw.text((left + 4, top + 2), kind or "complete", "black", ImageFont.load_default(14))
        sheet.paste(Image.fromarray(pixels), (left, top + title))
    save(sheet, out / "trays.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder to write to")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    out.mkdir(parents=True, exist_ok=True)
    sheet = Image.open(ROOT / "docs" / "contact_sheet.png")
    upper = sheet.crop((0, 0, sheet.width, round(sheet.height * 0.502)))  # three of its six rows
    size = (WIDTH, round(upper.height * WIDTH / upper.width))
    save(upper.resize(size, Image.Resampling.LANCZOS), out / "start.png", 200)
    trays(out)
    mixture(out)
    notebook_pictures(out)
    layouts(out)


if __name__ == "__main__":
    main()
