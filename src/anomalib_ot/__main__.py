"""The script ``anomalib-ot``: ``inspect``, ``calibrate``, ``update``, ..., else Anomalib's command with ours in it.

``inspect`` is for the edge device; ``calibrate`` sets thresholds from good images; ``update`` adds good images to what
a checkpoint knows; ``benchmark`` reads Anomalib's benchmark files and can be resumed.

The plain ``anomalib`` command knows them too wherever the start-up hook runs. It does not run under ``python -S``, in a
frozen application, or for a package that lies on ``PYTHONPATH``; this command works there as well.
"""

import sys


def main() -> None:
    """Run ``inspect`` (without Anomalib), another command of this package, or else Anomalib's, on ``sys.argv``."""
    if sys.argv[1:2] == ["inspect"]:
        from anomalib_ot.edge.command import run as inspect

        sys.exit(inspect(sys.argv[2:]))

    if sys.argv[1:2] == ["benchmark"]:
        from anomalib_ot.integration.benchmark.command import run as benchmark

        sys.exit(benchmark(sys.argv[2:]))

    if sys.argv[1:2] == ["calibrate"]:
        from anomalib_ot.calibration.command import run as calibrate

        sys.exit(calibrate(sys.argv[2:]))

    if sys.argv[1:2] == ["update"]:
        from anomalib_ot.calibration.update import run as update

        sys.exit(update(sys.argv[2:]))

    if sys.argv[1:2] == ["report"]:
        from anomalib_ot.integration.report.command import run as report

        sys.exit(report(sys.argv[2:]))

    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print("anomalib-ot inspect MODEL SOURCE: exported models on the line; anomalib-ot inspect --help")
        print("anomalib-ot report RUN: the report of a run, from its table; anomalib-ot report --help")
        print(
            "anomalib-ot calibrate MODEL --good DIR --max-false-alarms RATE: thresholds; anomalib-ot calibrate --help"
        )
        print("anomalib-ot update MODEL.ckpt --good DIR: add good parts to a model; anomalib-ot update --help")
        print(
            "anomalib-ot benchmark --config FILE --out DIR: resumable sweeps; anomalib-ot benchmark --help\n",
            flush=True,
        )
    from anomalib_ot.integration.cli import run

    run()


if __name__ == "__main__":
    main()
