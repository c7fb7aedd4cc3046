"""Sinkhorn-NMS beside torchvision's batched_nms and beside the network that it follows: times of one run.

    python benchmarks/nms_speed.py

One image with 100, 300 and 1000 proposals, six near each object, and 100 regions. `select` is the seed gate alone,
`merge` also transports proposals to regions. OpenVINO runs the exported graphs in float32. The network is the untrained
default detector (resnet18, 512 x 512 pixels) in torch. Contenders take turns; the median of their times counts. Greedy
suppression does far less work and stays faster; what counts is the part of the network's time. Exit code 0: with 300
proposals that is at most a tenth; 1: it is more.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import openvino
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.ops import batched_nms

from anomalib_ot.integration.models.ota_options import PRESETS, build_detector
from anomalib_ot.postprocess import sinkhorn_nms, sinkhorn_regions
from anomalib_ot.postprocess.proposals import SinkhornNMSSettings

GREEDY, NETWORK, TRAINING = "batched_nms", "network, forward", "merge, torch, with gradients"
NUMBERS = (100, 300, 1000)
BESIDE_NETWORK = 300
AIM = 10  # per cent of the network's time
CLASSES, DUPLICATES, SIDE = 20, 6, 512


class Suppression(nn.Module):
    """What is exported."""

    def __init__(self, decode: str) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(sinkhorn_nms(boxes, scores, labels, decode=self.decode)[:3])


def proposals(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make one image's proposals: six near each object, one class each."""
    generator = torch.Generator().manual_seed(number)
    objects = -(-number // DUPLICATES)
    corner = torch.rand(objects, 2, generator=generator) * (SIDE - 80)
    size = 16 + 64 * torch.rand(objects, 2, generator=generator)
    boxes = torch.cat([corner, corner + size], -1).repeat_interleave(DUPLICATES, 0)[:number]
    boxes = boxes + torch.randn(number, 4, generator=generator) * 2
    labels = torch.randint(CLASSES, (objects,), generator=generator).repeat_interleave(DUPLICATES)[:number]
    return boxes[None], torch.rand(1, number, generator=generator), labels[None]


def exported(decode: str, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Compile a graph for OpenVINO; return a call that runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(Suppression(decode).eval(), example_input=inputs)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    arrays = [values.numpy() for values in inputs]
    return lambda: compiled(arrays)


def trained_step(inputs: tuple[Tensor, ...]) -> None:
    """Run regions forwards and backwards."""
    boxes, scores, labels = inputs
    settings = SinkhornNMSSettings(decode="merge").softened(0.05)
    regions = sinkhorn_regions(
        boxes.clone().requires_grad_(), scores.clone().requires_grad_(), labels, settings=settings
    )
    (regions.boxes.mean() + regions.scores.mean()).backward()


def network() -> Callable[[], object]:
    """Return a call of the default detector's forward."""
    arguments = {"backbone": "resnet18", "layers": ("layer2", "layer3"), "image_size": (SIDE, SIDE), "tile_size": None}
    arguments |= {"nms": "hard", "max_detections": 100, "one_to_one": False}
    detector = build_detector(PRESETS["default"], arguments, num_classes=CLASSES).eval()
    image = torch.rand(1, 3, SIDE, SIDE)
    return lambda: detector(image)


def median_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls in turns; return the median of each, ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            with torch.set_grad_enabled(name == TRAINING):
                call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    console = Console()
    title = f"One image, threads of torch: {torch.get_num_threads()}; ms (times {GREEDY})"
    table = Table("", *(f"{number} proposals" for number in NUMBERS), title=title, title_justify="left")
    found = {number: median_times(contenders(number), options.rounds) for number in NUMBERS}
    for name in found[BESIDE_NETWORK]:
        table.add_row(name, *(_cell(found[number], name) for number in NUMBERS))
    console.print(table)
    beside = found[BESIDE_NETWORK]
    shares = {name: 100 * beside[name] / beside[NETWORK] for name in beside if name not in (GREEDY, NETWORK, TRAINING)}
    listed = ", ".join(f"{name} {share:.1f} %" for name, share in shares.items())
    console.print(f"Of the network's time, {BESIDE_NETWORK} proposals: {listed} (at most {AIM} %)", highlight=False)
    return 0 if max(shares.values()) <= AIM else 1


def contenders(number: int) -> dict[str, Callable[[], object]]:
    """Return what is timed with this number of proposals."""
    inputs = proposals(number)
    boxes, scores, labels = (values[0] for values in inputs)
    calls: dict[str, Callable[[], object]] = {GREEDY: lambda: batched_nms(boxes, scores, labels, 0.5)}
    for decode in ("select", "merge"):
        calls[f"{decode}, torch"] = lambda decode=decode: sinkhorn_nms(*inputs, decode=decode)
        calls[f"{decode}, OpenVINO"] = exported(decode, inputs)
    calls[TRAINING] = lambda: trained_step(inputs)
    if number == BESIDE_NETWORK:
        calls[NETWORK] = network()
    return calls


def _cell(times: dict[str, float], name: str) -> str:
    if name not in times:
        return ""
    return f"{times[name]:.2f}" if name == GREEDY else f"{times[name]:.1f} ({times[name] / times[GREEDY]:.0f})"


if __name__ == "__main__":
    raise SystemExit(main())
