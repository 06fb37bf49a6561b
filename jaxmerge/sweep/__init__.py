"""Runs over a grid of config values, in one process."""
