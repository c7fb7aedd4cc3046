"""The models as Anomalib trains them, their arguments, and the guards around a run."""
