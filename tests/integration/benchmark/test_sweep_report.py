"""The table, the file of all rows and the plots of a sweep."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.benchmark.config import SweepJob, SweepLabels
from anomalib_ot.integration.benchmark.report import SweepTable, markdown, sweep_plots, sweep_table, write_report
from anomalib_ot.integration.benchmark.store import SweepRecord

JOBS = [
    SweepJob(
        {
            "accelerator": "cpu",
            "seed": seed,
            "model": {"class_path": model},
            "data": {"class_path": "MVTecAD", "init_args": {"category": category}},
        }
    )
    for model in ("Padim", "Patchcore", "Dinomaly")
    for category in ("bottle", "cable")
    for seed in (0, 1)
]
AUROC = {("Padim", "bottle"): (0.7, 0.9), ("Padim", "cable"): (0.6, 0.6), ("Patchcore", "bottle"): (0.99, 0.99)}


def rows():
    """Padim on both, Patchcore on one of the two, Dinomaly on none."""
    found = {}
    for job in JOBS:
        model, category = job.flat["model.class_path"], job.flat["data.init_args.category"]
        if (model, category) in AUROC:
            figures = {"image_AUROC": AUROC[model, category][job.config["seed"]]}
            costs = {"fit_duration": 2.0, "latency_ms": 30.0, "peak_mb": 900.0, "state_mb": 1.5}
            row = {"status": "done", "figures": figures, "costs": costs, "seconds": 4.0, "threads": 1}
        else:
            row = {"status": "failed", "error": "ValueError: no weights", "seconds": 1.0}
        found[job.key] = row
    return found


@pytest.fixture
def table():
    return sweep_table(JOBS, SweepLabels(JOBS), rows())


def test_seeds_and_data_are_averaged_and_only_full_rows_are_best(table):
    headings, lines = table.summary()
    assert headings == ["model", "data", "image_AUROC", "fit, s", "latency, ms", "peak memory, MB", "state, MB"]
    assert lines[0] == ["Padim", "2/2", "0.700", "2.0", "30.0", "900", "1.5"]  # alone with both: nothing to win
    assert lines[1][:3] == ["Patchcore", "1/2", "0.990"]
    assert lines[2] == ["Dinomaly", "0/2", "", "", "", "", ""]


def test_the_best_is_bold_also_where_less_is_better():
    names = ("image_AUROC", "latency_ms")
    values = {
        ("A", "d", names[0]): 0.9,
        ("A", "d", names[1]): 5.0,
        ("B", "d", names[0]): 0.8,
        ("B", "d", names[1]): 4.0,
    }
    _, lines = SweepTable(["A", "B"], ["d"], [names[0]], values, []).summary()
    assert lines == [["A", "1/1", "**0.900**", "5.0"], ["B", "1/1", "0.800", "**4.0**"]]


def test_the_page_has_each_figure_on_each_of_the_data_and_names_what_failed(table):
    page = markdown(table)
    assert "| bottle | 0.800 | 0.990 |  |" in page
    assert "- Dinomaly, cable, seed 1: failed: ValueError: no weights" in page


def test_the_report_is_made_of_the_rows_of_all_processes(tmp_path):
    with SweepRecord(tmp_path, [{}]) as one, SweepRecord(tmp_path, [{}], 1) as two:
        for number, (key, row) in enumerate(rows().items()):
            (one, two)[number % 2].write({"key": key, **row})
        assert set(write_report(tmp_path, JOBS, SweepLabels(JOBS), one)) == {job.key for job in JOBS}
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(lines) == len(JOBS)
    assert {line["status"] for line in lines} == {"done", "failed"}
    best = next(line for line in lines if line["model_label"] == "Patchcore" and line["data_label"] == "bottle")
    assert (best["image_AUROC"], best["data.init_args.category"], best["seed"]) == ("0.99", "bottle", "0")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_row_that_comes_while_the_report_is_written_is_in_it(tmp_path):
    with SweepRecord(tmp_path, [{}]) as record:
        found = list(rows().items())
        record.write({"key": found[0][0], **found[0][1]})
        read, calls = record.rows, []

        def late():
            calls.append(1)
            seen = read()
            if len(calls) == 1:
                record.write({"key": found[1][0], **found[1][1]})
            return seen

        record.rows = late
        write_report(tmp_path, JOBS, SweepLabels(JOBS), record)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_the_plots_show_every_model_that_has_results(table):
    picture = np.asarray(Image.open(io.BytesIO(sweep_plots(table))).convert("RGB")).reshape(-1, 3)
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (picture == color).all(1).sum() > 100
    assert not (picture == (0, 0x9E, 0x73)).all(1).any()  # Dinomaly has none
    assert sweep_plots(SweepTable(["A"], ["d"], [], {}, [])) is None
