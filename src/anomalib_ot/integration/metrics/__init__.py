"""Metrics of boxes over a whole validation or test."""
