"""Generating responses. The only package that imports vLLM.

engine.py      vLLM in this process
"""
