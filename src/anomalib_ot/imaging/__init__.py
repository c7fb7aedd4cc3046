"""Image files in, pictures out, with NumPy and Pillow alone: shared by training and by the edge device."""
