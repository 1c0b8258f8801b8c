"""What a run says of itself.

run.py         the run directory: config, metrics, events, boards, and lines on the terminal
lines.py       files of one JSON object a line, in which every line is whole
configs.py     config.yaml, and those of the starts before
boards.py      TensorBoard and W&B
terminal.py    a progress bar where somebody looks, plain lines elsewhere
"""
