"""Thresholds from good images, in checkpoints and trainings of Anomalib."""
