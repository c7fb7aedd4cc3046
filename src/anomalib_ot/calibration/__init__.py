"""Thresholds from good images: the command `anomalib-ot calibrate`, for checkpoints and exports alike."""
