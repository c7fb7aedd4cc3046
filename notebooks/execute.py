"""Execute notebooks in place, so that they can be read with their results: `make notebooks`.

    python notebooks/execute.py [NOTEBOOK ...]

Each keeps a hash of the code that its outputs are from; tests compare it with the code that is there. Pictures
are made small, and what changes by run or machine (times of execution, the version of Python) is not kept.
"""

import argparse
import base64
import hashlib
import io
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of the sources of the code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0\n".join(sources).encode()).hexdigest()


def make_smaller(data: dict) -> None:
    """Replace the PNG of an output by one of 256 colors or a JPEG, whichever is smaller, at most 960 pixels wide."""
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
        picture.thumbnail((960, 960))
        jpeg, png = io.BytesIO(), io.BytesIO()
        picture.save(jpeg, "JPEG", quality=75, optimize=True, progressive=True)
        picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
        kind, smaller = min(("image/jpeg", jpeg), ("image/png", png), key=lambda form: form[1].tell())
        data[kind] = base64.b64encode(smaller.getvalue()).decode()


def execute(path: Path) -> None:
    """Execute a notebook beside its file, and write it back with its outputs; raises where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    kept = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    options = {"timeout": None, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(path.resolve().parent)}}, **options).execute()
    notebook.metadata = nbformat.from_dict({**kept, "executed_code": code_hash(notebook)})
    for cell in notebook.cells:
        if cell.cell_type == "code":  # rich leaves empty lines where a bar of progress is off
            cell.outputs = [output for output in cell.outputs if output.get("data", {}).get("text/plain") != ""]
            for output in cell.outputs:
                make_smaller(output.get("data", {}))
    nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all that lie beside this file, if none are named")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of other packages, while they are imported
    for path in parser.parse_args().notebooks or sorted(HERE.glob("*.ipynb")):
        execute(path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
