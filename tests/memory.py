"""Peak tensor memory of real training steps, as torch's own CPU allocator counts it.

The allocator reports every block that it gives out and takes back to torch's profiler: also those that live inside a
kernel or that autograd keeps in C++, which no Python hook sees, and without what the process's heap adds, which no
formula knows. Blocks of gloo, of NumPy and of the matrix library's own workspace are not the allocator's.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mm.config.layout import check_layout, sequence_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Batch
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import train_step

IMAGE_TOKEN = 5


@dataclass(frozen=True)
class Load:
    """What one micro-batch holds.

    Attributes:
        samples: tokens of each sample, all of one length where they are not packed; a pack's sum is its length.
        tiles: of all samples together.
        trained: tokens of the micro-batch, the last ones.
    """

    samples: tuple[int, ...]
    tiles: int
    trained: int


@dataclass(frozen=True)
class Peak:
    """Tensor memory of one rank in bytes: between two steps, and the most within one."""

    rest: int
    peak: int


def peaks(cases: list[tuple[RunConfig, Load]]) -> list[Peak]:
    """Of each config's second and third step; the first makes the optimizer's state. Runs on every rank."""
    platform, found = get_platform("cpu"), []
    with state.process_group(platform):
        for config, load in cases:
            found.append(_peak(config, load))
    return found


def _peak(config: RunConfig, load: Load) -> Peak:
    platform = get_platform("cpu")
    with state.model_parallel(config.parallel, config.seed) as groups:
        check_layout(config, torch.distributed.get_world_size())
        rest = 0

        def run(between: Callable[[], None]) -> None:
            nonlocal rest
            chunks = build_model(config, platform, groups, IMAGE_TOKEN)
            trainee = build_trainee(config, chunks, groups)
            num_batches = config.train.global_batch // config.train.micro_batch // state.data_ranks()
            batches = [_batch(config, load)] * num_batches
            train_step(trainee, batches, platform.device())
            between()
            for _ in range(2):
                train_step(trainee, batches, platform.device())
            between()

        return _profiled(run)


def _profiled(run: Callable[[Callable[[], None]], None]) -> Peak:
    """The profiler counts a block's end only where it saw its beginning, so it watches from the model's making on."""
    gc.collect()

    def mark() -> None:
        gc.collect()
        with torch.profiler.record_function("between steps"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(mark)
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    events = inner.kineto_results.events()
    marks = sorted(event.start_ns() for event in events if event.name() == "between steps")
    start, end = marks[0], marks[-1]
    held = most = rest = 0
    for time, num_bytes in sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda e: e[0]
    ):
        if time > end:
            break
        held += num_bytes
        if time >= start:
            most = max(most, held)
    rest = held
    return Peak(rest, most)


def _batch(config: RunConfig, load: Load) -> Batch:
    length = sum(load.samples) if config.data.packed else load.samples[0]
    rows = 1 if config.data.packed else len(load.samples)
    assert length % sequence_multiple(config) == 0
    num_features = load.tiles * config.model.vision.patches_per_tile
    ids = torch.arange(rows * length) % 100 + 10
    ids[:num_features] = IMAGE_TOKEN
    trained = torch.arange(rows * length) >= rows * length - load.trained
    side = config.model.vision.image_size
    return Batch(
        ids=ids.view(rows, length),
        labels=(torch.arange(rows * length) % 100 + 10).view(rows, length),
        trained=trained.view(rows, length),
        starts=torch.tensor([0, *load.samples]).cumsum(0).to(torch.int32) if config.data.packed else None,
        tiles=torch.zeros(load.tiles, side, side, 3, dtype=torch.uint8) if load.tiles else None,
        order=torch.arange(num_features),
        downscales=(),
        num_tokens=rows * length,
        num_samples=len(load.samples),
    )
