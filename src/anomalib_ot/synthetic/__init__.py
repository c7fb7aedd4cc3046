"""Synthetic images with known defects: printed woven fabric, and trays of parts."""
