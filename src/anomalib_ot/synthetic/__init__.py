"""Synthetic images with known defects: printed woven fabric."""
