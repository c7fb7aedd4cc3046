"""The edge device: exported models inspect frames with OpenVINO, NumPy and Pillow alone, without PyTorch."""
