"""``python -m anomalib_ot`` and the script ``anomalib-ot``: the ``anomalib`` command with this package's classes in it.

The plain ``anomalib`` command knows them too wherever the start-up hook runs. It does not run under ``python -S``, in a
frozen application, or for a package that lies on ``PYTHONPATH``; this command works there as well.
"""


def main() -> None:
    """Run the Anomalib command line on ``sys.argv``."""
    from anomalib_ot.integration.cli import run

    run()


if __name__ == "__main__":
    main()
