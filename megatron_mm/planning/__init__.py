"""What a run will need and take, before anything is started: memory, operations, traffic, time, layouts that fit.

gpus.py        memory, speed and links of the GPUs that are known, with the source of each number
load.py        what a micro-batch is assumed to hold
parameters.py  parameters of each module, over the model and on a rank
activations.py what a layer keeps for the backward pass
memory.py      memory of a rank of each pipeline stage, by part
traffic.py     bytes that a rank sends in a step, by kind and link
steptime.py    operations and seconds of a step
propose.py     search for layouts that fit
report.py      all of it as text

Of reinforcement learning:

rollout.py     what a step draws, and how many responses an engine holds at once
cache.py       memory for an engine's keys and values
rl_memory.py   memory of a rank while it draws, scores and updates, and of a node's host
rl_steptime.py seconds of each phase of a step
rl_propose.py  search for settings that fit
rl_report.py   all of it as text

Reads the config only; no torch.
"""
