"""The Anomalib command line with this package's classes in it, whether or not the start-up hook has run."""


def register_classes() -> None:
    """Put the public models and datamodules of this package where Anomalib looks names up.

    That is what the start-up hook does for installed packages, done here for the classes of ``anomalib_ot.__all__`` by
    direct import: short names and ``class_path: anomalib_ot.X`` work in every subcommand, ``benchmark`` included.
    Calling it twice, or after the hook, changes nothing.
    """
    import anomalib.data
    import anomalib.models

    import anomalib_ot

    homes = {anomalib.data.AnomalibDataModule: anomalib.data, anomalib.models.AnomalibModule: anomalib.models}
    for name in anomalib_ot.__all__:
        value = getattr(anomalib_ot, name)
        for kind, home in homes.items():
            if isinstance(value, type) and issubclass(value, kind):
                setattr(home, name, value)
    anomalib.models.ALLOWED_MODULES.add(anomalib_ot.__name__)


def run() -> None:
    """Register the classes, then run Anomalib's own command on ``sys.argv``."""
    register_classes()

    from anomalib.cli.cli import main

    from anomalib_ot.integration.checks.errors import install_short_errors

    install_short_errors()
    main()
