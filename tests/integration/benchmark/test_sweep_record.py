"""The folder of a sweep: rows that survive, and what it refuses."""

import json

import pytest

from anomalib_ot.integration.benchmark.store import SweepRecord
from anomalib_ot.integration.checks.errors import InputError

CONFIGS = [{"accelerator": ["cpu"], "benchmark": {"seed": 0, "data": {"init_args": {"category": {"grid": ["a"]}}}}}]


def test_a_row_is_there_when_it_is_written_and_a_half_one_is_cut_off(tmp_path):
    with SweepRecord(tmp_path / "out", CONFIGS) as record:
        record.write({"key": "a", "status": "done"})
        path = tmp_path / "out/rows-0.jsonl"
        whole = path.read_bytes()
        assert json.loads(whole)["key"] == "a"
    path.write_bytes(whole + b'{"key": "b", "sta')
    with SweepRecord(tmp_path / "out", CONFIGS) as record:
        assert set(record.rows()) == {"a"}
        record.write({"key": "c", "status": "failed"})
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "c"]


def test_rows_of_all_processes_count_and_a_result_outweighs_a_failure(tmp_path):
    with SweepRecord(tmp_path, CONFIGS) as first, SweepRecord(tmp_path, CONFIGS, 1) as second:
        first.write({"key": "a", "status": "done"})
        second.write({"key": "a", "status": "failed"})
        first.write({"key": "b", "status": "failed", "error": "old"})
        second.write({"key": "b", "status": "failed", "error": "new"})
        second.write({"key": "c", "status": "done"})
        (tmp_path / "rows-2.jsonl").write_bytes(b'{"key": "d"')  # being written
        found = second.rows()
    assert {key: row["status"] for key, row in found.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert found["b"]["error"] == "new"


def test_two_sweeps_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    with SweepRecord(tmp_path, CONFIGS), pytest.raises(InputError, match="being written by another sweep"):
        SweepRecord(tmp_path, CONFIGS)
    SweepRecord(tmp_path, CONFIGS).__exit__()


def test_a_folder_of_another_configuration_says_what_differs(tmp_path):
    SweepRecord(tmp_path, CONFIGS).__exit__()
    other = [
        {"accelerator": ["cpu"], "benchmark": {"seed": 1, "data": {"init_args": {"category": {"grid": ["a", "b"]}}}}}
    ]
    with pytest.raises(InputError) as caught:
        SweepRecord(tmp_path, other)
    assert "benchmark.seed is 0 there and 1 here" in str(caught.value)
    assert "benchmark.data.init_args.category.grid is ['a'] there and ['a', 'b'] here" in str(caught.value)


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, such as 'notes\.txt'"):
        SweepRecord(tmp_path, CONFIGS)
    with pytest.raises(InputError, match="a file; expected a new folder"):
        SweepRecord(tmp_path / "notes.txt", CONFIGS)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/sweep.json").write_text("[")
    with pytest.raises(InputError, match="is damaged"):
        SweepRecord(tmp_path / "damaged", CONFIGS)
