"""The script ``anomalib-ot``: ``inspect``, ``calibrate``, ``benchmark``, else Anomalib's command with ours in it.

``inspect`` is for the edge device; ``calibrate`` sets thresholds from good images; ``benchmark`` reads Anomalib's
benchmark files and can be resumed; ``doctor`` says whether all is there that they need.

The plain ``anomalib`` command knows them too wherever the start-up hook runs. It does not run under ``python -S``, in a
frozen application, or for a package that lies on ``PYTHONPATH``; this command works there as well.
"""

import sys


def main() -> None:
    """Run ``inspect`` (without Anomalib) or another command of ours, or else Anomalib's command, on ``sys.argv``."""
    if sys.argv[1:2] == ["inspect"]:
        from anomalib_ot.edge.command import run as inspect

        sys.exit(inspect(sys.argv[2:]))

    if sys.argv[1:2] == ["benchmark"]:
        from anomalib_ot.integration.benchmark.command import run as benchmark

        sys.exit(benchmark(sys.argv[2:]))

    if sys.argv[1:2] == ["calibrate"]:
        from anomalib_ot.calibration.command import run as calibrate

        sys.exit(calibrate(sys.argv[2:]))

    if sys.argv[1:2] == ["report"]:
        from anomalib_ot.integration.report.command import run as report

        sys.exit(report(sys.argv[2:]))

    if sys.argv[1:2] == ["doctor"]:
        from anomalib_ot.doctor import run as doctor

        sys.exit(doctor(sys.argv[2:]))

    if sys.argv[1:2] == ["--version"]:
        from anomalib_ot import __version__

        print(f"anomalib-ot {__version__}")
        return

    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print("anomalib-ot inspect MODEL SOURCE: exported models on the line; anomalib-ot inspect --help")
        print("anomalib-ot report RUN: the report of a run, from its table; anomalib-ot report --help")
        print(
            "anomalib-ot calibrate MODEL --good DIR --max-false-alarms RATE: thresholds; anomalib-ot calibrate --help"
        )
        print("anomalib-ot doctor: versions, devices, folders; anomalib-ot --version: the version alone")
        print(
            "anomalib-ot benchmark --config FILE --out DIR: resumable sweeps; anomalib-ot benchmark --help\n",
            flush=True,
        )
    from anomalib_ot.integration.cli import run

    run()


if __name__ == "__main__":
    main()
