"""Prepared data sets: written once, planned as a pure function of (index, blend, seed, step), read by offset.

shards.py      tar shards + columnar index: writing and reading
digits.py      the miniature data set, on scikit-learn's handwritten digits
plan.py        which samples make up which global batch
loader.py      plan -> batches of tensors for one data-parallel rank
"""
