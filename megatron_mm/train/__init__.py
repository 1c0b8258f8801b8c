"""Training of every stage, on Megatron-Core's schedules.

check.py       what can be known to be wrong before a rank is started
assemble.py    model -> DDP, optimizer, schedule
step.py        one optimizer step
loop.py        a whole run
"""
