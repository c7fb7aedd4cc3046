"""Everything that knows Anomalib, Lightning and OpenVINO: the only floor with framework names."""

# First of all, whatever module of this room is asked for: Anomalib's import makes the start-up hook load this package's
# datamodules, which cannot succeed while a module that they share is half imported.
import anomalib.data  # noqa: F401
