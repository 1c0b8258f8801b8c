"""Hugging Face tensors <-> Megatron-Core parameters, from one table, in every layout.

mapping.py        the pure rules: copy, patch convolution, fused QKV, gated MLP, padded vocabulary
tables.py         which rule holds for which tensor of the model
names.py          the spellings of names that there are, and what directories hold beside the model
hf_config.py      config.json -> our model config, strictly
hf_fields.py      fields of config.json, each of the type that it must have
files.py          directories of safetensors, read in parts and written in shards
sizes.py          how large tensors are, and which go together
source.py         directories as the weights of a model, complete and fitting
stream.py         the table run over a live, sharded model, both ways
export.py         Hugging Face directories that vLLM and transformers serve
modeling_r4b.py   R-4B's model for transformers
"""
