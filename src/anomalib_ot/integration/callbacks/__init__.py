"""Callbacks that write predictions to files."""
