"""Generating responses. The only package that imports vLLM.

engine.py      vLLM in this process
weights.py     what its worker computes with: loading, and reading back
colocation.py  what vLLM does to its process, undone
"""
