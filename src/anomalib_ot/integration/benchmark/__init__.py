"""Resumable sweeps over models and data: `anomalib-ot benchmark`."""
