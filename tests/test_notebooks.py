"""Every notebook runs from top to bottom without a network, with smaller numbers than its own, and has no outputs."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLOSED = "http://127.0.0.1:9"  # nothing listens here: whoever asks the network is refused at once
# What the cell tagged `parameters` says is said anew after it, as papermill does; everything else stays as it is.
SMALL = {
    "01_transport": {"SIDE": 128},
    "02_ot_prototypes": {"TRAIN": 8, "GOOD": 4, "SIDE": 96, "LAYERS": ["scale1", "scale2"]},
    "03_mvtec_benchmark": {"DRAWN": 1, "SIDE": 64},
    "04_tianchi_benchmark": {"FAULTY": 8, "GOOD": 12, "STEPS": 4},
    "05_maps_to_detector": {"TRAIN": 12, "GOOD": 4, "FAULTY": 4, "STEPS": 4, "SIDE": 96},
    "06_export_and_inspect": {
        "PRECISIONS": ["FP32"],
        "FILTERS": ["scale1", "scale2"],
        "TRAIN": 16,
        "SIDE": 96,
        "ROUNDS": 1,
    },
}


def parameters(notebook):
    """The place of the one cell of parameters, and the values that it assigns."""
    (place,) = (number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    statements = ast.parse(notebook.cells[place].source).body
    return place, {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}


@pytest.mark.skipif(not (ROOT / "notebooks").is_dir(), reason="this is not a checkout: notebooks/ is not here")
def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), f"strip the outputs: nbstripout {path.name}"
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_parameters_are_assigned_in_one_cell_and_nowhere_else(path):
    notebook = nbformat.read(path, as_version=4)
    place, values = parameters(notebook)
    assert set(SMALL[path.stem]) <= set(values)
    for cell in notebook.cells[place + 1 :]:
        if cell.cell_type == "code":
            parts = ast.walk(ast.parse(cell.source))
            names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
            assert not names & set(values)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    notebook = nbformat.read(path, as_version=4)
    lines = "\n".join(f"{name} = {value!r}" for name, value in SMALL[path.stem].items())
    notebook.cells.insert(parameters(notebook)[0] + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # a cell that fails raises here
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"cache"}, "it leaves files where it runs"
