"""Detectors for labelled defects, without any framework: label assignment, heads, losses."""
