"""Reinforcement learning: sample, grade, credit, update, hand the weights over.

objective.py   what an update maximises: one term a token
algorithms.py  what to sample for a prompt, and how responses are credited
"""
