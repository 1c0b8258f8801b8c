"""The loss of trained tokens in blocks of the vocabulary, against the logits of all of them at once.

Forward and backward pass of the output layer and the loss, as `models/language.py` does them, fp32, one process and two
threads; each side in a process of its own. Memory is what the process grows by at most, its gradients included: that of
the output layer's weight alone takes a part of it. The other side differs in one thing: its block is the whole
vocabulary.
"""

import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figure import Figure
from benchmarks.high_water import GIVES_BACK, growth
from megatron_mm.models import language
from megatron_mm.models.language import build_language_model
from megatron_mm.models.megatron_config import language_config
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.ranks import run_alone
from tests.tiny import tiny_config

THREADS = 2
TOKENS, HIDDEN, VOCABULARY = 4096, 1024, 151_936


def measure() -> list[Figure]:
    """Memory and time of both sides, and how far their losses and gradients are from each other."""
    os.environ.update(GIVES_BACK)  # read when a process starts
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / side for side in ("blocks", "whole")]
        (ours, our_seconds), (whole, whole_seconds) = (
            run_alone(_forward_backward, file, whole=file.name == "whole") for file in files
        )
        mine, reference = (torch.load(file, mmap=True, weights_only=True) for file in files)
        differences = {name: float((mine[name] - tensor).norm() / tensor.norm()) for name, tensor in reference.items()}
    what = f"{TOKENS:,} trained tokens, vocabulary {VOCABULARY:,}, hidden {HIDDEN:,}, fp32"
    return [
        Figure(f"{what}: peak memory, in blocks / whole logits", ours / whole, "ratio", 1 / 3),
        Figure(f"{what}: peak memory, in blocks", ours / 2**20, "MiB"),
        Figure(f"{what}: peak memory, whole logits", whole / 2**20, "MiB"),
        Figure(f"{what}: of both, the gradient of the weight", 4 * VOCABULARY * HIDDEN / 2**20, "MiB"),
        *(Figure(f"{what}: difference of {name}", each, "of the norm", 1e-6) for name, each in differences.items()),
        Figure(f"{what}: time, in blocks / whole logits", our_seconds / whole_seconds, "ratio"),
        Figure(f"{what}: time, in blocks", our_seconds, "s"),
        Figure(f"{what}: time, whole logits", whole_seconds, "s"),
    ]


def _forward_backward(file: Path, *, whole: bool) -> tuple[int, float]:
    """Bytes that the process grows by, and seconds; losses and gradients go to a file."""
    if whole:
        language.vocab_block = lambda _, num_rows: num_rows
    config = tiny_config(
        model__language__hidden_size=HIDDEN, model__language__vocab_size=VOCABULARY, model__language__num_layers=1
    )
    platform = get_platform("cpu")
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        torch.set_num_threads(THREADS)
        megatron = language_config(config, platform)
        model = build_language_model(
            megatron, config.model.language, "local", groups, first=True, last=True, chunk=None
        )
        # Another seed than the weights': hidden states that equal rows of the output layer would be sure of one token.
        random = torch.Generator().manual_seed(1)
        hidden = torch.randn(TOKENS, 1, HIDDEN, generator=random).requires_grad_()
        labels = torch.randint(0, VOCABULARY, (1, TOKENS), generator=random)
        # As reinforcement learning does it: each token's loss has a gradient of its own.
        incoming = torch.randn(1, TOKENS, generator=random)
        results = []

        def run() -> None:
            losses = model._postprocess(hidden, labels=labels, loss_mask=None)
            losses.backward(incoming)
            results.append(losses.detach())

        start = time.perf_counter()
        num_bytes = growth(run)
        seconds = time.perf_counter() - start
        weight = model.shared_embedding_or_output_weight()
        torch.save({"losses": results[0], "gradient of hidden": hidden.grad, "gradient of weight": weight.grad}, file)
    return num_bytes, seconds
