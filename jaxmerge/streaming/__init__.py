"""Merges from file to file: blocks of tensors are read, merged and written side by side."""
