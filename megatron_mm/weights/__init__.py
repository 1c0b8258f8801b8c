"""Hugging Face tensors <-> Megatron-Core parameters, from one table, in every layout.

mapping.py     the pure rules: copy, reshape, fused QKV, gated MLP
tables.py      which rule holds for which tensor of the model
stream.py      the table run over a live, sharded model, both ways
export.py      a Hugging Face directory in R-4B's layout
"""
