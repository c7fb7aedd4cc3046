"""`anomalib-ot benchmark`: killed, resumed by two processes, and with jobs that are not run at all."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import anomalib_ot
from anomalib_ot.integration.benchmark import command as sweep_command
from anomalib_ot.integration.benchmark.command import run
from anomalib_ot.integration.benchmark.config import SweepJob, read_configs, sweep_jobs
from anomalib_ot.integration.benchmark.report import markdown, read_sweep
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs/howto/benchmark.md"
SMALL = {"backbone": "filter_bank", "layers": ["scale1"], "image_size": [64, 64], "num_prototypes": 8}
FIGURES = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO")
COSTS = ("fit_duration", "test_duration", "latency_ms", "peak_mb", "state_mb")
PATIENCE = 500  # seconds, on a machine with much else to do


def written(folder: Path, models: list, categories: list[str], **more) -> Path:
    """Write a benchmark of models on categories in MVTec's layout; the jobs of the first category come first."""
    data = {"root": str(folder / "mvtec"), "num_workers": 0, "seed": 0, "category": {"grid": categories}}
    jobs = {"seed": 0, "data": {"class_path": "MVTecAD", "init_args": data}, "model": {"grid": models}}
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump({"accelerator": ["cpu"], "benchmark": jobs | more}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three models, one of which cannot be built, on a category that is there and on one that is not."""
    folder = tmp_path_factory.mktemp("sweep")
    cloth = FabricFolder(num_train=4, num_test_good=2, num_per_defect=2, image_size=(64, 64), defects=("hole", "stain"))
    cloth.ensure(folder / "mvtec" / "cloth")
    for mask in (folder / "mvtec/cloth/ground_truth").rglob("*.png"):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    ours = "anomalib_ot.OTPrototypes"
    models = [
        {"class_path": ours, "init_args": SMALL},
        {"class_path": ours, "init_args": {**SMALL, "advanced": {"alpha": 0.0}}},
        {"class_path": "Padim", "init_args": {"backbone": "resnet99"}},
    ]
    written(folder, models, ["cloth", "silk"])
    return folder


@pytest.fixture(scope="module")
def environment():
    source = str(Path(anomalib_ot.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def killed(home, environment):
    """Kill the sweep when its first row is there; return the bytes of the row, and the job that was in hand."""
    rows = home / "out/rows-0.jsonl"
    words = ["-m", "anomalib_ot", "benchmark", "--config", "benchmark.yaml", "--out", "out"]
    with (home / "said.txt").open("wb") as said:
        process = subprocess.Popen([sys.executable, *words], cwd=home, env=environment, stdout=said, stderr=said)
    until = time.monotonic() + PATIENCE
    children: list[int] = []
    tasks = Path(f"/proc/{process.pid}/task")
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
        if not rows.is_file() or not rows.stat().st_size:
            continue
        if tasks.is_dir():  # the next job is about to begin; each thread has children of its own
            children = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
        if children or not tasks.is_dir():
            break
    assert process.poll() is None, (home / "said.txt").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return rows.read_bytes(), children


@pytest.fixture(scope="module")
def resumed(home, environment, killed):
    """Go on with two processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "anomalib_ot", "benchmark", "--config", "benchmark.yaml", "--out", "out"]
    pipes = {"capture_output": True, "text": True, "timeout": PATIENCE}
    return subprocess.run([sys.executable, *words], cwd=home, env=environment, **pipes)


def row_of(home, number):
    job = sweep_jobs(read_configs([home / "benchmark.yaml"]))[number]
    lines = [json.loads(line) for path in sorted((home / "out").glob("rows-*")) for line in path.open()]
    found = [line for line in lines if line["key"] == job.key]
    assert len(found) == 1
    return found[0]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the job's process in /proc")
def test_no_job_outlives_a_sweep_that_was_killed(killed):
    def runs(pid):
        try:
            return b"benchmark.job" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    assert killed[1]
    until = time.monotonic() + PATIENCE
    while any(map(runs, killed[1])) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(runs, killed[1]))


def test_what_was_done_is_kept_and_the_rest_is_done_by_two_processes(home, killed, resumed):
    assert resumed.returncode == 1, resumed.stderr  # a job has failed
    first = killed[0]
    assert first.count(b"\n") == 1
    assert (home / "out/rows-0.jsonl").read_bytes().startswith(first)
    statuses = ["done", "done", "failed", "skipped", "skipped", "skipped"]
    assert [row_of(home, number)["status"] for number in range(6)] == statuses
    of_second = [json.loads(line)["key"] for line in (home / "out/rows-1.jsonl").open()]
    jobs = sweep_jobs(read_configs([home / "benchmark.yaml"]))
    assert of_second == [jobs[number].key for number in (1, 3, 5)]


def test_a_row_has_what_was_measured(home, resumed):
    row = row_of(home, 1)
    assert tuple(row["figures"]) == FIGURES
    assert all(0 <= value <= 1 for value in row["figures"].values())
    assert tuple(row["costs"]) == COSTS
    assert all(value > 0 for value in row["costs"].values())
    assert 100 < row["costs"]["peak_mb"] < 8000
    assert row["threads"] == 1


def test_the_figures_are_those_of_anomalibs_benchmark(home, resumed):
    from anomalib.data import get_datamodule
    from anomalib.models import get_model
    from anomalib.pipelines.benchmark.job import BenchmarkJob

    config = sweep_jobs(read_configs([home / "benchmark.yaml"]))[1].config
    model, data = get_model(config["model"]), get_datamodule(config["data"])
    model.visualizer = None
    found = BenchmarkJob("cpu", model, data, config["seed"], {}).run()
    row = row_of(home, 1)
    assert {name: row["figures"][name] for name in FIGURES[:4]} == {name: found[name] for name in FIGURES[:4]}


def test_what_failed_and_what_is_not_there_is_said_in_one_line(home, resumed):
    assert row_of(home, 2)["error"] == "RuntimeError: Unknown model (resnet99)"
    assert row_of(home, 3)["error"] == f"there is no folder '{home / 'mvtec' / 'silk'}'"
    logs = list((home / "out/logs").iterdir())
    assert [path.stem for path in logs] == [row_of(home, 2)["key"]]
    assert "Traceback" in logs[0].read_text()
    page = (home / "out/table.md").read_text()
    assert "- Padim, cloth, seed 0: failed: RuntimeError: Unknown model (resnet99)" in page
    assert "| OTPrototypes alpha=0.0 | 1/2 |" in page
    assert markdown(read_sweep(home / "out")) == page
    with (home / "out/results.csv").open() as file:
        assert [line["status"] for line in csv.DictReader(file)].count("skipped") == 3
    assert Image.open(home / "out/plots.png").size[0] > 500


# ---- without processes: what is run again, and the exit status


@pytest.fixture
def ran(monkeypatch):
    """Replace the process of a job; returns the jobs that came. A model whose name begins with B fails."""
    calls: list[SweepJob] = []

    def pretend(job, logs, environment, stop):
        calls.append(job)
        if job.flat["model.class_path"].startswith("B"):
            return {"status": "failed", "error": "ValueError: bad", "seconds": 1.0}
        return {"status": "done", "figures": {"image_AUROC": 1.0}, "costs": {"latency_ms": 2.0}, "seconds": 1.0}

    monkeypatch.setattr(sweep_command, "_run_one", pretend)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def classes(*names):
    return [{"class_path": name} for name in names]


def sweep(folder, *words):
    return run(["--config", str(folder / "benchmark.yaml"), "--out", str(folder / "out"), *words])


def test_failed_jobs_are_tried_again_and_no_others(tmp_path, ran, monkeypatch, capsys):
    (tmp_path / "mvtec/cloth").mkdir(parents=True)
    written(tmp_path, classes("Good", "Bad"), ["cloth"])
    assert sweep(tmp_path, "--processes", "2") == 1
    said = capsys.readouterr()
    assert "Good, cloth: image_AUROC 1.000, 1 s" in said.err
    assert "Bad, cloth: failed: ValueError: bad" in said.err
    assert "| Good | 1/1 | 1.000 | 2.0 |" in said.out
    assert sweep(tmp_path) == 1
    assert [job.flat["model.class_path"] for job in ran[2:]] == ["Bad"]
    monkeypatch.setattr(
        sweep_command, "_run_one", lambda *_: {"status": "done", "figures": {}, "costs": {}, "seconds": 1.0}
    )
    assert sweep(tmp_path) == 0
    assert "2 done; table" in capsys.readouterr().err


def test_a_process_of_several_fails_only_when_all_is_done(tmp_path, ran, monkeypatch, capsys):
    (tmp_path / "mvtec/cloth").mkdir(parents=True)
    written(tmp_path, classes("Bad", "Good", "Fine"), ["cloth"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    for rank, status in (("0", 0), ("1", 1)):  # a launcher would end rank 1 if rank 0 failed before it
        monkeypatch.setenv("RANK", rank)
        assert sweep(tmp_path) == status
    assert [job.flat["model.class_path"] for job in ran] == ["Bad", "Fine", "Good"]

    # Again: what failed before in another process is open until that one has tried.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    for rank, status in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert sweep(tmp_path) == status
    assert "1 not yet" in capsys.readouterr().err


def test_a_sweep_that_is_asked_to_end_leaves_the_rest_for_later(tmp_path, ran, monkeypatch, capsys):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread only")
    (tmp_path / "mvtec/cloth").mkdir(parents=True)
    written(tmp_path, classes("One", "Two", "Three"), ["cloth"])
    pretend = sweep_command._run_one

    def asked(job, logs, environment, stop):
        if job.flat["model.class_path"] == "Two":
            os.kill(os.getpid(), signal.SIGTERM)
            return None if stop.wait(10) else pretend(job, logs, environment, stop)
        return pretend(job, logs, environment, stop)

    monkeypatch.setattr(sweep_command, "_run_one", asked)
    assert sweep(tmp_path) == 130
    assert "stopped: 1 done, 2 not yet" in capsys.readouterr().err
    assert "| One | 1/1 |" in (tmp_path / "out/table.md").read_text()
    monkeypatch.setattr(sweep_command, "_run_one", pretend)
    assert sweep(tmp_path) == 0
    assert [job.flat["model.class_path"] for job in ran] == ["One", "Two", "Three"]


@pytest.mark.skipif(not GUIDE.is_file(), reason="this is not a checkout: no docs/ here")
def test_the_guide_is_right(tmp_path):
    text = GUIDE.read_text(encoding="utf-8")
    (tmp_path / "benchmark.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert len(sweep_jobs(read_configs([tmp_path / "benchmark.yaml"]))) == 6
    lines = [
        line for line in text.replace("\\\n", " ").splitlines() if "benchmark --config" in line and "`" not in line
    ]
    assert len(lines) == 6
    for line in lines:
        words = line.partition(" benchmark ")[2].rstrip('"').split()
        options = sweep_command._parser().parse_args(words)
        if options.config[0].startswith("configs"):
            assert read_configs([ROOT / path for path in options.config])


def test_nothing_there_is_no_success(tmp_path, ran):
    written(tmp_path, classes("Good"), ["cloth"])
    assert sweep(tmp_path) == 1
    assert not ran
    assert "there is no folder" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "0"], "--processes is 0; expected at least 1"),
        (["--config", "nowhere.yaml"], "--config is 'nowhere.yaml', which is no file"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, ran, capsys, words, said):
    written(tmp_path, classes("Good"), ["cloth"])
    assert sweep(tmp_path, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"anomalib-ot benchmark: error: {said}")
    assert not (tmp_path / "out").exists()


def test_a_process_that_dies_is_a_row(tmp_path, monkeypatch):
    job = SweepJob({"accelerator": "cpu", "seed": 0, "model": {"class_path": "A"}, "data": {"class_path": "B"}})
    monkeypatch.setattr(sweep_command.sys, "executable", "/bin/false")
    row = sweep_command._run_one(job, tmp_path / "logs", {}, threading.Event())
    assert row == {"status": "failed", "error": "its process ended with status 1; it said last: nothing"}
