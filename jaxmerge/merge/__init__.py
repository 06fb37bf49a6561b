"""Merges: pure functions of parameter trees."""
