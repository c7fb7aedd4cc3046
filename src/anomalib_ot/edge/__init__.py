"""The box beside the line: exported models inspect frames with OpenVINO, NumPy and Pillow alone, without PyTorch."""
