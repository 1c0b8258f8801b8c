"""How often a training step waits for the device, and where: counted on a CPU by tests/host_syncs.py.

Each line of Megatron-Core's or ours that waits is a figure of its own. What a GPU runs in place of the CPU's layers,
Transformer Engine's kernels, is not seen. A step has four micro-batches with images in four layers.
"""

import tempfile
from pathlib import Path

from benchmarks.figure import Figure
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.shards import TOKENIZER
from tests.host_syncs import CASES, found_on_ranks

# Whether any token was trained, the gradient norm, and the loss.
BAR = 3
# And the log-probabilities of each micro-batch, before the update.
BARS = {"RL update": BAR + 4}
# Megatron-Core's own: pipeline stages tell each other shapes, experts how many tokens they get.
WITHOUT_BAR = ("PP 2", "experts, EP 2")


def measure() -> list[Figure]:
    """Synchronisations and copies of a step of each case, in all and line by line."""
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        prepare_digits(digits, num_train=2, num_heldout=2, seed=0)
        found = found_on_ranks(list(CASES), ChatTokenizer(digits / TOKENIZER))
    figures = []
    for name, result in found.items():
        bars = (None, None) if name in WITHOUT_BAR else (BARS.get(name, BAR), 0)
        figures += [
            Figure(f"{name}: synchronisations", result.syncs.total(), "a step", bars[0]),
            Figure(f"{name}: copies to the device that wait", result.copies.total(), "a step", bars[1]),
        ]
        figures += [
            Figure(f"{name}: {place}", count, "a step")
            for counts in (result.syncs, result.copies)
            for place, count in sorted(counts.items())
        ]
    return figures
