"""Image files in, pictures out, with NumPy and Pillow alone: what the lab and the box beside the line share."""
