"""Datamodules of images with boxes, what they read, and the batches they make."""
