"""Reinforcement learning: sample, grade, credit, update, hand the weights over.

objective.py   what an update maximises: one term a token
algorithms.py  what to sample for a prompt, and how responses are credited
experience.py  responses -> micro-batches
update.py      updates of the policy
exchange.py    the trainer's weights for the engine, and the proof that they arrived
"""
