"""Ranks, devices and process groups. The only package that knows whether it runs on GPUs or a CPU.

platform/      cuda | cpu behind one interface
state.py       process groups: start, ask, end
launch.py      starting ranks on this machine
nodes.py       the machines of a job
cores.py       how many cores this process may use
failure.py     what ended a rank
output.py      what ranks print: a log each, and the terminal
watchdog.py    who hangs where
"""
