"""One job of a sweep, in a process of its own: trains, tests, measures, and leaves its row in a file.

Started as `python -m anomalib_ot.integration.benchmark.job CONFIG RESULT` with a pipe as standard input; it ends when
the pipe closes, so that no job outlives a sweep that was killed.
"""

import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib_ot.integration.benchmark.config import SweepJob
from anomalib_ot.integration.benchmark.store import DONE, FAILED
from anomalib_ot.integration.checks.atomic_write import write_whole

WARM_UP, TIMED = 3, 20  # forwards
LONGEST = 10.0  # seconds of timed forwards, after the third
MEGABYTE = 2**20


def main(words: list[str]) -> None:
    """Run the job of two words: its configuration in JSON, and the file for its row."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    started = time.perf_counter()
    try:
        row = {"status": DONE, **measured(json.loads(words[0]))}
    except Exception as error:
        traceback.print_exc()
        row = {"status": FAILED, "error": _one_line(error)}
    row["seconds"] = time.perf_counter() - started
    write_whole(Path(words[1]), json.dumps(row).encode())


def measured(config: dict) -> dict[str, dict[str, float | None]]:
    """Train and test a model, and measure it.

    Returns:
        `figures` of the evaluator, and `costs`: `fit_duration` and `test_duration` in seconds, `latency_ms` (median of
        forwards of one image), `peak_mb` (highest resident memory of this process), `gpu_peak_mb` on CUDA, `state_mb`
        (parameters and buffers of the trained model).
    """
    from anomalib.data import get_datamodule
    from anomalib.engine import Engine
    from anomalib.models import get_model
    from lightning.pytorch import seed_everything

    from anomalib_ot.integration.cli import register_classes

    register_classes()
    seed_everything(config["seed"])
    model, datamodule = get_model(config["model"]), get_datamodule(config["data"])
    _complete(model, SweepJob(config))
    seed_everything(config["seed"])  # again: what follows is then what Anomalib's benchmark does
    with TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(accelerator=config["accelerator"], devices=1, default_root_dir=folder, **quiet)
        start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        fitted = time.perf_counter()
        found = engine.test(model, datamodule=datamodule, verbose=False)[0]
        tested = time.perf_counter()
    costs = {"fit_duration": fitted - start, "test_duration": tested - fitted}
    costs["latency_ms"] = _latency(model, datamodule, config["accelerator"])
    costs |= _memory(model, config["accelerator"])
    return {"figures": {name: _number(value) for name, value in found.items()}, "costs": costs}


def _complete(model: object, job: SweepJob) -> None:
    """Where the configuration says nothing of them: also measure the per-region overlap, and draw no pictures."""
    from anomalib.metrics import AUPRO, Evaluator

    metrics = type(model).configure_evaluator().test_metrics
    judges_maps = any("anomaly_map" in metric.fields for metric in metrics)
    if "model.init_args.evaluator" not in job.flat and judges_maps:
        own = AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)
        model.evaluator = Evaluator(test_metrics=[*metrics, own])
    if "model.init_args.visualizer" not in job.flat:
        model.visualizer = None


def _latency(model: object, datamodule: object, accelerator: str) -> float:
    """Median time in ms of what an export would compute for one image: resize, network, post-processing."""
    import torch

    image = datamodule.test_data[0].image[None].to(accelerator)
    model.to(accelerator).eval()
    times: list[float] = []
    with torch.inference_mode():
        while len(times) < WARM_UP + TIMED and (len(times) < WARM_UP + 3 or sum(times[WARM_UP:]) < LONGEST):
            start = time.perf_counter()
            model(image)
            if accelerator == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[WARM_UP:])


def _memory(model: object, accelerator: str) -> dict[str, float]:
    import torch

    state = [tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]
    sizes = {"peak_mb": _peak() / MEGABYTE, "state_mb": sum(t.numel() * t.element_size() for t in state) / MEGABYTE}
    return sizes | ({"gpu_peak_mb": torch.cuda.max_memory_allocated() / MEGABYTE} if accelerator == "cuda" else {})


def _peak() -> int:
    """Highest resident memory of this process, bytes. Linux counts the parent's into ru_maxrss, but not into VmHWM."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _number(value: object) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _one_line(error: BaseException) -> str:
    from anomalib_ot.integration.checks.errors import InputError

    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
