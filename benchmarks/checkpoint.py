"""How long training stands still for a checkpoint in the background, against one that is waited for.

A model of some tens of millions of parameters on two data-parallel ranks with the distributed optimizer, in bf16 with
fp32 master weights: 14 bytes a parameter. Saves of both kinds alternate, the first of each left out; a figure is the
median over rounds of the slower rank. Standing still is `save()` and all `poll()`s until the checkpoint has its name,
with training steps in between; a step's own slowing down by the writer, which shares its cores, is told apart.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figure import Figure
from megatron_mm.checkpoint.manifest import Manifest
from megatron_mm.checkpoint.paths import find
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config.schema import CheckpointConfig, RunConfig
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import Trainee, build_trainee
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

ROUNDS = 5
MODEL: dict[str, Any] = {
    "model__language__hidden_size": 768,
    "model__language__ffn_hidden_size": 2048,
    "model__language__num_layers": 8,
    "model__language__num_heads": 8,
    "model__language__num_kv_heads": 4,
    "model__language__vocab_size": 16384,
}


@dataclass(frozen=True, slots=True)
class Round:
    """One save of each kind, as a rank saw it.

    Attributes:
        waited_seconds: of the save that is waited for.
        save_seconds, poll_seconds: of the one in the background; all its polls together.
        longest_poll_seconds: the one that completed it.
        written_seconds: from its beginning to its name.
        num_polls: until then.
        step_seconds, writing_step_seconds: a step without and with a writer beside it.
    """

    waited_seconds: float
    save_seconds: float
    poll_seconds: float
    longest_poll_seconds: float
    written_seconds: float
    num_polls: int
    step_seconds: float
    writing_step_seconds: float

    @property
    def stall_seconds(self) -> float:
        """That training stands still for a save in the background."""
        return self.save_seconds + self.poll_seconds


def measure() -> list[Figure]:
    """Standing still, and bytes a second."""
    config = tiny_config(**MODEL, precision="bf16", train__trained="[vision, projector, language, embeddings]")
    with tempfile.TemporaryDirectory() as folder:
        of_ranks = run_on_ranks(_measure, 2, config, Path(folder))
    num_parameters, num_bytes, _ = of_ranks[0]
    rounds = list(zip(*(rank_rounds for *_, rank_rounds in of_ranks), strict=True))

    def median(name: str) -> float:
        return statistics.median(max(getattr(mine, name) for mine in of_round) for of_round in rounds)

    ratios = [
        max(mine.stall_seconds for mine in of_round) / max(mine.waited_seconds for mine in of_round)
        for of_round in rounds
    ]
    slowing = median("writing_step_seconds") / median("step_seconds")
    return [
        Figure("standing still, in the background / waited for", statistics.median(ratios), "ratio", 0.2),
        Figure("parameters", num_parameters / 1e6, "million"),
        Figure("a checkpoint", num_bytes / 1e6, "MB"),
        Figure("waited for", median("waited_seconds"), "s"),
        Figure("in the background: save() and polls", median("stall_seconds"), "s"),
        Figure("in the background: save()", median("save_seconds"), "s"),
        Figure("in the background: the poll that completes it", median("longest_poll_seconds"), "s"),
        Figure("in the background: all other polls", median("poll_seconds") - median("longest_poll_seconds"), "s"),
        Figure("in the background: polls", median("num_polls"), "polls"),
        Figure("in the background: until it has its name", median("written_seconds"), "s"),
        Figure("a step with a writer beside it / without", slowing, "ratio"),
        Figure("written, waited for", num_bytes / 1e6 / median("waited_seconds"), "MB/s"),
        Figure("written, in the background", num_bytes / 1e6 / median("written_seconds"), "MB/s"),
    ]


def _measure(config: RunConfig, run_dir: Path) -> tuple[int, int, list[Round]]:
    """Parameters, bytes of a checkpoint, rounds. Runs on every rank."""
    platform = get_platform("cpu")
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        trainee = build_trainee(config, build_model(config, platform, groups, image_token=5), groups)
        _step(trainee)
        waited = Saver(run_dir / "waited", CheckpointConfig(asynchronous=False, keep_last=1))
        background = Saver(run_dir / "background", CheckpointConfig(keep_last=1))
        rounds = [_round(trainee, waited, background, number) for number in range(1, ROUNDS + 2)][1:]
        background.finish()
        files = Manifest.read(find(run_dir / "background")).files.values()
    return sum(trainee.num_trained.values()), sum(record.size_bytes for record in files), rounds


def _round(trainee: Trainee, waited: Saver, background: Saver, number: int) -> Round:
    step_seconds = _step(trainee)
    dist.barrier()  # ranks are compared: none starts its clock while another is at something else
    start = time.perf_counter()
    waited.save(number, trainee.chunks, trainee.optimizer, {})
    waited_seconds = time.perf_counter() - start
    waited.finish()  # the files of the one before are removed
    dist.barrier()
    start = time.perf_counter()
    background.save(number, trainee.chunks, trainee.optimizer, {})
    save_seconds = time.perf_counter() - start
    polls, steps = [], []
    while background.last_saved != number:
        steps.append(_step(trainee))
        poll = time.perf_counter()
        background.poll()
        polls.append(time.perf_counter() - poll)
    written_seconds = time.perf_counter() - start
    background.finish()
    return Round(
        waited_seconds,
        save_seconds,
        sum(polls),
        max(polls),
        written_seconds,
        len(polls),
        step_seconds,
        statistics.median(steps),
    )


def _step(trainee: Trainee) -> float:
    """Seconds of an update with random gradients: every parameter and all the optimizer's state change."""
    start = time.perf_counter()
    for wrapped in trainee.ddp:
        for parameter in wrapped.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape))  # pyright: ignore
    trainee.optimizer.step()
    return time.perf_counter() - start
