"""Training of every stage, on Megatron-Core's schedules.

check.py       what can be known to be wrong before a rank is started
starts.py      whether a run that is started again and again gets anywhere
initial.py     the weights that a run starts from
assemble.py    model -> DDP, optimizer, schedule
step.py        one optimizer step
guard.py       which steps are not to change the weights
meter.py       the figures of a log line; timing.py: where the time of a step goes
validate.py    the loss on held-out samples
export.py      Hugging Face directories from a run that goes on
stop.py        signals
learning.py    what the steps do that learn from samples
run.py         the steps of a run, whatever they do, and what stands between them
loop.py        a whole run
"""
