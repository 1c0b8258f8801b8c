"""Distributed checkpoints in Megatron-Core's format.

paths.py       where they lie, which is the newest
store.py       saving aside and moving into place; loading whole or weights only, on any layout
whole.py       whole parameters in and out of the files, one at a time, without a live model
"""
