"""A trained detector in PyTorch, OpenVINO FP32 and INT8: mean average precision and speed.

    python benchmarks/detector_export.py --data ../shared/data --checkpoint model.ckpt

Exports as `anomalib export` does, integers calibrated on training images. All ways see the same test images, one at a
time, with as many threads; they take turns, and medians are compared. Exports stay in OUT, made anew each time.
"""

import argparse
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from detectors import data_of
from export_speed import STREAMS, WAYS, async_way, compiled, speeds, sync_way, torch_way

MODELS = ("OTADetector", "SparseMDOD")


def main() -> None:
    import torch
    from anomalib.deploy import CompressionType

    import anomalib_ot
    from anomalib_ot.integration.export import export as checked_export
    from anomalib_ot.integration.export.parity import torch_outputs
    from anomalib_ot.integration.export.quantization import EvaluationResult, Samples, accuracy_value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a trained detector")
    parser.add_argument("--model", default="OTADetector", choices=MODELS, help="what it is")
    parser.add_argument("--set", default="deeppcb", choices=["deeppcb", "neu_det", "magnetic_tile"])
    parser.add_argument("--images", type=int, default=100, help="test images at most, spread evenly")
    parser.add_argument("--calibration", type=int, default=128, help="training images that integers are calibrated on")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results/detector_export"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    checked_export.CALIBRATION_IMAGES = args.calibration
    checked_export.ACCURACY_IMAGES = min(args.images, checked_export.ACCURACY_IMAGES)  # exports measure, too
    model = getattr(anomalib_ot, args.model).load_from_checkpoint(args.checkpoint).eval()
    datamodule = data_of(args.set, args.data, 8, None)
    datamodule.prepare_data()
    datamodule.setup("test")
    samples = Samples(datamodule, "test", args.images)
    ways = {"PyTorch": torch_way(model, args.threads)}
    runs = {"PyTorch": lambda images: torch_outputs(model, torch.from_numpy(images))}
    for name in ("FP32", "INT8"):
        kind = WAYS[name] and CompressionType(WAYS[name])
        path = model.to_openvino(args.out / args.set / name, compression_type=kind, datamodule=datamodule)
        runs[f"OpenVINO {name}"] = compiled(path, args.threads)
        ways[f"OpenVINO {name}, sync"] = sync_way(path, args.threads)
        ways[f"OpenVINO {name}, {STREAMS} streams"] = async_way(path, args.threads)
    figures = {name: accuracy_value(EvaluationResult(run, samples)) for name, run in runs.items()}
    images = np.stack([samples.image(row).numpy() for row in range(min(len(samples), 16))])
    rates = speeds(ways, images)
    counts = f"{len(samples)} test images, calibrated on {args.calibration}, {args.threads} threads"
    print(f"{args.model} on {args.set}: {counts}")
    print("| way | images/s | to PyTorch | mAP |\n|---|---|---|---|")
    for name, rate in rates.items():
        found = figures[name.partition(",")[0]]
        print(f"| {name} | {rate:.1f} | {rate / rates['PyTorch']:.2f} | {found:.4f} |")
    for turn in ("sync", f"{STREAMS} streams"):
        ratio = rates[f"OpenVINO INT8, {turn}"] / rates[f"OpenVINO FP32, {turn}"]
        print(f"INT8 / FP32, {turn}: {ratio:.2f} (asked for: 1.3)")
    lost = 100 * (figures["OpenVINO FP32"] - figures["OpenVINO INT8"])
    print(f"INT8 loses {lost:+.2f} points of mAP (at most 0.5 asked for)")
    (args.out / args.set / "figures.json").write_text(json.dumps({"images_per_s": rates, "map": figures}, indent=1))


if __name__ == "__main__":
    main()
