"""Checkpoints on disk, one file per format, and the pool that is made of them."""
