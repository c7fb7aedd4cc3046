"""Exports that are compared with the model in PyTorch, and say what they are."""
