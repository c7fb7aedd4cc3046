"""Everything that knows Anomalib, Lightning and OpenVINO: the only floor with framework names."""

# First of all, whichever module of this room is imported first: the import of anomalib.data loads our data modules, and
# they import modules of this room, which must not be half imported then.
import anomalib.data  # noqa: F401
