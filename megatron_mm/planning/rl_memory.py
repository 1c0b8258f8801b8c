"""Memory of reinforcement learning: of a rank while it draws, scores and updates, and of a node's host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.activations import Backend
from megatron_mm.planning.cache import (
    ENGINE_WORKING_BYTES,
    GRAPH_BYTES,
    auto_cache_bytes,
    engine_weight_bytes,
    sequence_cache_bytes,
)
from megatron_mm.planning.load import Load
from megatron_mm.planning.memory import Memory, worst_memory
from megatron_mm.planning.rollout import Rollouts, num_sequences

# A block of pinned memory is as large as the next power of two (torch's CachingHostAllocator): a copy that vLLM makes
# of its weights block by block takes at most twice as much.
PINNED_ROUNDING = 2
# Host memory of a rank's process: Python, CUDA, vLLM, data, graders. An estimate, not measured.
PROCESS_BYTES = 6 * 2**30

Phase = Literal["drawing", "scoring", "updating"]
PHASES: tuple[Phase, ...] = ("drawing", "scoring", "updating")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLMemory:
    """Bytes that a rank is expected to hold.

    Attributes:
        trainer: the trainer's in an update, on the pipeline stage that holds most.
        scoring: the trainer's in a forward pass; its weights, gradients and optimizer are not looked at.
        reference: the weights that the run began with.
        engine: the engine's weights.
        cache: the engine's keys and values.
        graphs: the engine's CUDA graphs.
        engine_working: activations and logits of the engine while it draws.
        sleeps: whether the engine gives its memory back while the trainer works; only GPUs can.
        offload: whether gradients, optimizer and reference leave the rank while the engine works.
    """

    trainer: Memory
    scoring: Memory
    reference: float
    engine: float
    cache: float
    graphs: float
    engine_working: float
    sleeps: bool
    offload: bool

    def held(self, phase: Phase) -> dict[str, float]:
        """Return the bytes of each component in a phase of a step; names are those of the fields."""
        trainer, draws = self.trainer, phase == "drawing"
        away = draws and self.offload
        passes = Memory(0, 0, 0, 0, 0, 0, 0) if draws else self.scoring if phase == "scoring" else trainer
        asleep = not draws and self.sleeps
        # A CPU's host is the device: nothing but gradients leaves. Offloaded, the reference comes for its own pass.
        reference = phase == "scoring" or not (self.offload and self.sleeps)
        return {
            "weights": trainer.weights,
            "gradients": 0.0 if away else trainer.gradients,
            "optimizer": 0.0 if away and self.sleeps else trainer.optimizer,
            "reference": self.reference if reference else 0.0,
            **{name: getattr(passes, name) for name in ("language", "vision", "output", "working")},
            "engine": 0.0 if asleep else self.engine,
            "cache": 0.0 if asleep else self.cache,
            "graphs": self.graphs,
            "engine_working": self.engine_working if draws else 0.0,
        }

    def total(self, phase: Phase) -> float:
        """Return the bytes of all components in a phase."""
        return sum(self.held(phase).values())

    @property
    def trainer_while_drawing(self) -> float:
        """What the trainer holds while responses are drawn."""
        held = self.held("drawing")
        return sum(held[name] for name in ("weights", "gradients", "optimizer", "reference"))

    @property
    def worst_phase(self) -> Phase:
        """The phase in which a rank holds most."""
        return max(PHASES, key=self.total)


def largest(components: dict[str, float]) -> str:
    """Return the name of the component that takes most."""
    return max(components, key=lambda name: components[name])


def trainer_memory(
    config: RunConfig, num_ranks: int, loads: Sequence[tuple[Rollouts, Load]], backend: Backend
) -> tuple[int, Memory, Memory]:
    """Return the pipeline stage whose ranks hold most, and the trainer's memory there in an update and in a score.

    Args:
        config: a run of reinforcement learning whose layout can be.
        num_ranks: all ranks of the run.
        loads: what a sequence may hold; the one that takes most counts, in updates and in scores apart.
        backend: "te" on GPUs, "local" on CPU.
    """
    found = []
    for rollouts, load in loads:
        update = update_config(config, num_ranks, rollouts)
        stage, trainer = worst_memory(update, num_ranks, load, backend)
        found.append((stage, trainer, worst_memory(forward_config(update), num_ranks, load, backend)[1]))
    stage, trainer, _ = max(found, key=lambda entry: entry[1].total)
    return stage, trainer, max((scoring for *_, scoring in found), key=lambda memory: memory.total)


def rl_memory(config: RunConfig, trainer: Memory, scoring: Memory, backend: Backend, usable_bytes: float) -> RLMemory:
    """Return what a rank holds.

    Args:
        config: a run of reinforcement learning.
        trainer: the trainer's memory in an update.
        scoring: the trainer's memory in a forward pass.
        backend: "te" on GPUs, "local" on CPU.
        usable_bytes: what tensors of a rank may take; rl.rollout.cache_gib=auto takes what is left of it.
    """
    assert config.rl is not None
    rollout, on_gpu = config.rl.rollout, backend == "te"
    without_cache = RLMemory(
        trainer=trainer,
        scoring=scoring,
        reference=trainer.weights if config.rl.objective.kl != "none" else 0.0,
        engine=engine_weight_bytes(config),
        cache=0.0,
        graphs=float(GRAPH_BYTES * on_gpu),
        engine_working=float((ENGINE_WORKING_BYTES - GRAPH_BYTES) * on_gpu),
        sleeps=on_gpu,
        offload=rollout.offload,
    )
    return _with_cache(config, without_cache, usable_bytes)


def host_memory(config: RunConfig, memory: RLMemory, ranks: int) -> dict[str, float]:
    """Return the bytes of a node's host by component.

    Args:
        config: the run.
        memory: what one of its ranks holds.
        ranks: ranks on the node.
    """
    trainer = memory.trainer
    written = ranks * trainer.optimizer + min(ranks, config.parallel.model_ranks) * trainer.weights
    return {
        "optimizer": ranks * trainer.optimizer * memory.offload,
        "reference": ranks * memory.reference * memory.offload,
        # Kept there while an engine sleeps between held-out questions and the next weight sync; and a copy of what was
        # sent is there while every element is compared, when it is awake.
        "engine": PINNED_ROUNDING * ranks * memory.engine * memory.sleeps,
        "checkpoint": written * config.checkpoint.asynchronous,
        "processes": float(ranks * PROCESS_BYTES),
    }


def update_config(config: RunConfig, num_ranks: int, rollouts: Rollouts) -> RunConfig:
    """Return the config of one update as a step of supervised training, whose batch counts sequences.

    Sequences are rounded up to a whole number of micro-batches on every rank, as rl/experience.py does.
    """
    assert config.rl is not None
    parallel, train = config.parallel, config.train
    micro_batch = 1 if config.data.packed else train.micro_batch
    unit = micro_batch * (num_ranks // parallel.model_ranks)
    if parallel.virtual_pipeline > 1:
        unit *= parallel.pipeline
    sequences = num_sequences(config, rollouts) / config.rl.updates
    changed = {"global_batch": unit * max(1, -int(-sequences // unit)), "micro_batch": micro_batch}
    return config.model_copy(update={"train": train.model_copy(update=changed)})


def forward_config(config: RunConfig) -> RunConfig:
    """Return the config of a pass in which nothing learns."""
    return config.model_copy(update={"train": config.train.model_copy(update={"trained": ()})})


def _with_cache(config: RunConfig, memory: RLMemory, usable_bytes: float) -> RLMemory:
    """Return memory without a cache with the cache that the config asks for.

    Where rl.rollout.cache_gib=auto leaves less than one sequence takes, with which a run does not start, that is what
    is counted.
    """
    assert config.rl is not None
    cache = config.rl.rollout.cache_bytes
    if cache is None:
        # What has to stay free is not among the bytes that tensors may take.
        free = usable_bytes - memory.trainer_while_drawing
        found = auto_cache_bytes(config, free, 0.0, has_own_memory=memory.sleeps)
        cache = max(found, sequence_cache_bytes(config))
    return replace(memory, cache=float(cache))
