"""Every notebook has the results of its present code, and runs without a network with smaller numbers than its own."""

import ast
import os
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A path from the root of a file system, or the address of an object.
FOREIGN = r"(?<![\w.~/:])/[A-Za-z][\w.-]*/\w|\b[A-Z]:\\\\|at 0x[0-9a-f]+"
CLOSED = "http://127.0.0.1:9"  # nothing listens here: whoever asks the network is refused at once
# What the cell tagged `parameters` says is said anew after it, as papermill does; everything else stays as it is.
SMALL = {
    "01_transport": {"SIDE": 128},
    "02_ot_prototypes": {"TRAIN": 8, "GOOD": 4, "SIDE": 96, "LAYERS": ["scale1", "scale2"]},
    "03_mvtec_benchmark": {"DRAWN": 1, "TRAIN": 12, "SIDE": 64},
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


def every_notebook(test):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(test)


@every_notebook
def test_its_results_are_those_of_its_code(path):
    tool = runpy.run_path(str(path.with_name("execute.py")))
    notebook = nbformat.read(path, as_version=4)
    renew = f"the results are not those of this code; renew them: make notebooks NOTEBOOKS=notebooks/{path.name}"
    assert notebook.metadata.get("executed_code") == tool["code_hash"](notebook), renew
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), renew
    notebook.cells[parameters(notebook)[0]].source += "\nMORE = 1"
    assert notebook.metadata["executed_code"] != tool["code_hash"](notebook)


@every_notebook
def test_it_can_be_read_on_the_web(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "executed_code"}
    assert path.stat().st_size < 400_000, "draw fewer or smaller pictures"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, "what changes by run is not kept"
        for output in cell.get("outputs", []):
            assert output.output_type in ("stream", "display_data", "execute_result"), output
            assert output.get("name") != "stderr", f"this is no result: {output.text}"
            said = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            for text in said:
                assert len(text.splitlines()) <= 60, f"a wall of text: {text[:200]}"
                assert not re.search(FOREIGN, text), f"a path or an address of one run: {re.search(FOREIGN, text)[0]}"
                assert "Warning" not in text, text


@every_notebook
def test_its_parameters_are_assigned_in_one_cell_and_nowhere_else(path):
    notebook = nbformat.read(path, as_version=4)
    place, values = parameters(notebook)
    assert set(SMALL[path.stem]) <= set(values)
    for cell in notebook.cells[place + 1 :]:
        if cell.cell_type == "code":
            parts = ast.walk(ast.parse(cell.source))
            names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
            assert not names & set(values)


@pytest.mark.slow
@every_notebook
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
