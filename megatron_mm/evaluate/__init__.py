"""How well does an exported model answer? Needs no Megatron-Core.

heldout.py     held-out questions in every mode, through vLLM
"""
