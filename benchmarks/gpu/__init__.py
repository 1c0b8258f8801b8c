"""Measurements for a machine with a GPU; docs/gpu.md says how to run them and what each figure means."""
