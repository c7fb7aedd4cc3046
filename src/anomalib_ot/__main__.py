"""The script ``anomalib-ot``: the verbs of this package, else Anomalib's command with our models in it.

The plain ``anomalib`` command knows the models too wherever the start-up hook runs. It does not run under
``python -S``, in a frozen application, or for a package that lies on ``PYTHONPATH``; this command works there as well.
"""

import os
import sys
from importlib import import_module

VERBS = {  # each with the module whose `run` takes the rest of the command line; `inspect` needs no Anomalib
    "inspect": ("anomalib_ot.edge.command", "inspect MODEL SOURCE: exported models on the line"),
    "report": ("anomalib_ot.integration.report.command", "report RUN: the report of a run, from its table"),
    "calibrate": ("anomalib_ot.calibration.command", "calibrate MODEL --good DIR --max-false-alarms RATE: thresholds"),
    "update": ("anomalib_ot.calibration.update", "update MODEL.ckpt --good DIR: add good parts to a model"),
    "benchmark": ("anomalib_ot.integration.benchmark.command", "benchmark --config FILE --out DIR: resumable sweeps"),
    "doctor": ("anomalib_ot.doctor", "doctor: versions, devices, folders"),
}


def main() -> None:
    """Run a verb of this package, or else Anomalib's command, on ``sys.argv``.

    Threads that wait for each other sleep (``OMP_WAIT_POLICY=PASSIVE``, unless it is set): beside a busy program those
    that spin keep the ones that they wait for from their cores. OpenMP reads this once, when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        sys.exit(import_module(VERBS[verb][0]).run(sys.argv[2:]))
    if verb == "--version":
        from anomalib_ot import __version__

        print(f"anomalib-ot {__version__}")
        return
    if verb in ("-h", "--help"):
        for name, (_, said) in VERBS.items():
            print(f"anomalib-ot {said}; anomalib-ot {name} --help")
        print("anomalib-ot --version: the version alone\n", flush=True)
    from anomalib_ot.integration.cli import run

    run()


if __name__ == "__main__":
    main()
