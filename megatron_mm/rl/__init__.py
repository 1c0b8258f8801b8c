"""Reinforcement learning: sync the weights, sample, grade, credit, update.

questions.py   the questions of each step
sampler.py     questions -> graded responses, by engines that share the ranks out
algorithms.py  what to sample for a prompt, and how responses are credited
objective.py   what an update maximises: one term a token
experience.py  responses -> micro-batches
update.py      log-probabilities, and the loss of an update
exchange.py    the trainer's weights for the engine, and the proof that they arrived
practice.py    what a step does
heldout.py     how held-out questions are answered meanwhile
alarm.py       says when a mode collapses
memory.py      trainer and engine in the same memory
offload.py     what the trainer moves out of the device's memory for an engine
report.py      figures of the steps, and their responses
job.py         a run
"""
