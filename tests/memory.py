"""Peak tensor memory of real training steps, as torch's own CPU allocator counts it.

The allocator reports every block that it gives out and takes back to torch's profiler: also those that live inside a
kernel or that autograd keeps in C++, which no Python hook sees, and without what the process's heap adds, which no
formula knows. Blocks of gloo, of NumPy and of the matrix library's own workspace are not the allocator's.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mm.config.layout import check_layout, sequence_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Batch
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.planning.activations import Backend
from megatron_mm.planning.load import Load
from megatron_mm.planning.memory import worst_memory
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import train_step
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

IMAGE_TOKEN = 5
MARK = "between steps"


@dataclass(frozen=True)
class Batched:
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


def peaks(cases: list[tuple[RunConfig, Batched]]) -> list[Peak]:
    """Of each config's second step; the first makes the optimizer's state. Runs on every rank."""
    with state.process_group(get_platform("cpu")):
        return [_peak(config, batched) for config, batched in cases]


def _peak(config: RunConfig, batched: Batched) -> Peak:
    platform = get_platform("cpu")
    with state.model_parallel(config.parallel, config.seed) as groups:
        check_layout(config, torch.distributed.get_world_size())

        def run(between: Callable[[], None]) -> None:
            chunks = build_model(config, platform, groups, IMAGE_TOKEN)
            trainee = build_trainee(config, chunks, groups)
            num_batches = config.train.global_batch // config.train.micro_batch // state.data_ranks()
            batches = [batch_of(config, batched)] * num_batches
            train_step(trainee, batches, platform.device())
            between()
            train_step(trainee, batches, platform.device())
            between()

        return _profiled(run)


def _profiled(run: Callable[[Callable[[], None]], None]) -> Peak:
    """The profiler counts a block's end only where it saw its beginning, so it watches from the model's making on."""
    gc.collect()

    def mark() -> None:
        gc.collect()
        with torch.profiler.record_function(MARK):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(mark)
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    events = list(_all_events(inner.kineto_results.experimental_event_tree()))
    start, end = sorted(event.start_time_ns for event in events if event.name == MARK)
    # By address: blocks that gloo's threads give back are not seen to end, until another takes their place.
    blocks: dict[int, int] = {}
    held = most = 0
    changes = sorted((event for event in events if event.name == "[memory]"), key=lambda event: event.start_time_ns)
    for event in changes:
        if event.start_time_ns > end:
            break
        address, num_bytes = event.extra_fields.ptr, event.extra_fields.alloc_size
        held -= blocks.pop(address, 0)
        if num_bytes > 0:
            blocks[address] = num_bytes
            held += num_bytes
        if event.start_time_ns >= start:
            most = max(most, held)
    return Peak(held, most)


def _all_events(events: Iterable[Any]) -> Iterator[Any]:
    """Of a tree of torch's profiler."""
    for event in events:
        yield event
        yield from _all_events(event.children)


def batch_of(config: RunConfig, batched: Batched) -> Batch:
    """A micro-batch of ids that mean nothing."""
    length = sum(batched.samples) if config.data.packed else batched.samples[0]
    rows = 1 if config.data.packed else len(batched.samples)
    assert length % sequence_multiple(config) == 0
    num_features = batched.tiles * config.model.vision.patches_per_tile
    ids = torch.arange(rows * length) % 100 + 10
    ids[:num_features] = IMAGE_TOKEN
    trained = torch.arange(rows * length) >= rows * length - batched.trained
    side = config.model.vision.image_size
    return Batch(
        ids=ids.view(rows, length),
        labels=(torch.arange(rows * length) % 100 + 10).view(rows, length),
        trained=trained.view(rows, length),
        starts=torch.tensor([0, *batched.samples]).cumsum(0).to(torch.int32) if config.data.packed else None,
        tiles=torch.zeros(batched.tiles, side, side, 3, dtype=torch.uint8) if batched.tiles else None,
        order=torch.arange(num_features),
        downscales=(),
        parts=torch.zeros(len(batched.samples), dtype=torch.int64),
        squared_tokens=sum(length**2 for length in batched.samples),
        num_tokens=rows * length,
        num_samples=len(batched.samples),
    )


# What a machine without GPUs measures in seconds, wide and long enough that what is not counted does not matter.
SIZES: dict[str, object] = {
    "model__language__hidden_size": 256,
    "model__language__ffn_hidden_size": 768,
    "model__language__num_heads": 8,
    "model__language__num_kv_heads": 4,
    "model__language__num_layers": 4,
    "model__language__vocab_size": 4096,
    "model__language__max_positions": 4096,
    "data__max_sequence_tokens": 2048,
    "data__packed": "true",
    # 400 patches a tile
    "model__vision__image_size": 160,
    "model__vision__hidden_size": 128,
    "model__vision__ffn_hidden_size": 512,
    "train__trained": "[vision, projector, language, embeddings]",
    "train__global_batch": 2,
    "train__micro_batch": 1,
}
PACK = Batched((512, 1024, 512), 4, 400)
PADDED = Batched((1024, 1024), 4, 800)
TWO_SAMPLES: dict[str, object] = {"data__packed": "false", "train__micro_batch": 2}
BF16: dict[str, object] = {"precision": "bf16"}
TP2_SP: dict[str, object] = {"parallel__tensor": 2, "parallel__sequence": "true"}
PP2: dict[str, object] = {"parallel__pipeline": 2, "train__global_batch": 4}
EXPERTS: dict[str, object] = {
    "model__language__experts": "{num_experts: 8, experts_per_token: 2, ffn_hidden_size: 256}",
    "model__language__tied_embeddings": "false",
}
# Logits of 1,600 tokens are more than the loss makes at once (config/loss_blocks.py), on each of two ranks as well.
MANY_TOKENS: dict[str, object] = {"model__language__vocab_size": 98304, "model__language__num_layers": 1}
# Name -> (ranks, overrides, one micro-batch).
LAYOUTS: dict[str, tuple[int, dict[str, object], Batched]] = {
    "padded, fp32": (1, TWO_SAMPLES, PADDED),
    "packed, bf16": (1, BF16, PACK),
    "packed, recompute full, bf16": (1, {**BF16, "train__recompute": "full"}, PACK),
    "packed, recompute selective, fp32": (1, {"train__recompute": "selective"}, PACK),
    "padded, projector alone learns, bf16": (
        1,
        {**BF16, **TWO_SAMPLES, "train__trained": "[projector]"},
        PADDED,
    ),
    "TP 2 + SP, bf16": (2, {**BF16, **TP2_SP}, PACK),
    "TP 2 + SP, recompute full, fp32": (2, {**TP2_SP, "train__recompute": "full"}, PACK),
    "TP 2, vision data-parallel, bf16": (
        2,
        {**BF16, "parallel__tensor": 2, "model__vision__parallel": "data"},
        PACK,
    ),
    "PP 2, bf16": (2, {**BF16, **PP2}, PACK),
    "PP 2 interleaved, untied, fp32": (
        2,
        {**PP2, "parallel__virtual_pipeline": 2, "model__language__tied_embeddings": "false"},
        PACK,
    ),
    "DP 2, distributed optimizer, bf16": (2, BF16, PACK),
    "DP 2, plain optimizer, fp32": (2, {"optim__distributed": "false"}, PACK),
    # Pieces long enough for the fused kernel: of short ones the local layers hold scores, which the plan leaves out.
    "CP 2, bf16": (2, {**BF16, "parallel__context": 2}, Batched((2048,), 4, 400)),
    "loss in blocks, bf16": (1, {**BF16, **MANY_TOKENS}, Batched((512, 1024, 512), 2, 1600)),
    "loss in blocks, TP 2 + SP, fp32": (2, {**TP2_SP, **MANY_TOKENS}, Batched((512, 1024, 512), 2, 1600)),
    "experts, EP 2, bf16": (2, {**BF16, **EXPERTS, "parallel__expert": 2}, PACK),
}


@dataclass(frozen=True)
class Comparison:
    """The fullest rank of a layout, in bytes."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def compare(names: Iterable[str]) -> dict[str, Comparison]:
    """Predict and measure some of LAYOUTS; one start of processes for each number of ranks."""
    found: dict[str, Comparison] = {}
    names = list(names)
    for num_ranks in sorted({LAYOUTS[name][0] for name in names}):
        mine = [name for name in names if LAYOUTS[name][0] == num_ranks]
        cases = [(tiny_config(**{**SIZES, **LAYOUTS[name][1]}), LAYOUTS[name][2]) for name in mine]
        ranks = run_on_ranks(peaks, num_ranks, cases)
        for number, (name, (config, batched)) in enumerate(zip(mine, cases, strict=True)):
            measured = max(peaks_of_rank[number].peak for peaks_of_rank in ranks)
            found[name] = Comparison(predicted(config, num_ranks, batched), measured)
    return found


def predicted(config: RunConfig, num_ranks: int, batched: Batched, backend: Backend = "local") -> float:
    """What the plan says of the fullest rank."""
    sequences = config.train.micro_batch
    load = Load(
        tokens=sum(batched.samples) // sequences,
        squared_tokens=sum(length**2 for length in batched.samples) / sequences,
        num_samples=len(batched.samples) / sequences,
        tiles=batched.tiles / sequences,
        trained_tokens=batched.trained / sequences,
    )
    return worst_memory(config, num_ranks, load, backend)[1].total
