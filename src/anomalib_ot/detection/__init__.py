"""Detectors for labeled defects, without any framework: label assignment, heads, losses."""
