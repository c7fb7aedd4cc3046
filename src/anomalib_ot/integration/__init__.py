"""Everything that knows Anomalib, Lightning and OpenVINO: the only floor with framework names."""
