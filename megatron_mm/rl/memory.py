"""Trainer and engine in the same memory: what both take, and how they make room for each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from megatron_mm.config.schema import RunConfig
from megatron_mm.parallel.platform import Platform
from megatron_mm.planning.cache import auto_cache_bytes, engine_weight_bytes
from megatron_mm.planning.load import LoadOptions, assumed_load
from megatron_mm.planning.memory import Memory, worst_memory
from megatron_mm.train.assemble import Trainee

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a rank is expected to hold.

    Attributes:
        trainer: at its fullest, of the pipeline stage that holds most.
        reference: weights that the run began with, beside the trainer's.
        engine: the engine's weights.
        cache: its keys and values.
        sleeps: whether the engine gives its memory back while the trainer works.
        offload: whether gradients and optimizer leave while the engine works.
    """

    trainer: Memory
    reference: float
    engine: float
    cache: float
    sleeps: bool
    offload: bool

    @property
    def drawing(self) -> float:
        """While responses are drawn."""
        trainer = self.trainer.weights if self.offload else self.trainer.rest
        return trainer + (0 if self.offload else self.reference) + self.engine + self.cache

    @property
    def learning(self) -> float:
        """In an update."""
        return self.trainer.total + self.reference + (0 if self.sleeps else self.engine + self.cache)

    def describe(self, total: int) -> str:
        """Two lines for the log.

        Args:
            total: bytes that a rank has.
        """
        parts = {
            "weights": self.trainer.weights,
            "gradients": self.trainer.gradients,
            "optimizer": self.trainer.optimizer,
            "reference": self.reference,
            "engine's weights": self.engine,
            "engine's cache": self.cache,
        }
        advice = ""
        if self.drawing > total:
            advice += "; too much to draw: lower rl.rollout.cache_gib, or set rl.rollout.offload=true"
        if self.learning > total:
            advice += "; too much to learn: set train.recompute=full, or raise parallel.tensor"
        return (
            f"memory of a rank, planned: {', '.join(f'{name} {_size(part)}' for name, part in parts.items())}\n"
            f"  drawing responses {_size(self.drawing)}, learning {_size(self.learning)}, of {_size(total)}{advice}"
        )


def budget(config: RunConfig, num_ranks: int, platform: Platform) -> Budget:
    """What the ranks of a run will hold."""
    assert config.rl is not None
    rollout = config.rl.rollout
    backend = "te" if platform.layer_backend == "te" else "local"
    _, trainer = worst_memory(config, num_ranks, assumed_load(config, LoadOptions()), backend)
    without_cache = Budget(
        trainer=trainer,
        reference=trainer.weights if config.rl.objective.kl != "none" else 0.0,
        engine=engine_weight_bytes(config),
        cache=0.0,
        sleeps=platform.has_own_memory,
        offload=rollout.offload,
    )
    cache = rollout.cache_bytes
    if cache is None:
        total = platform.memory_bytes()
        free = total - (without_cache.drawing - without_cache.engine)
        cache = max(0, auto_cache_bytes(config, free, total, has_own_memory=platform.has_own_memory))
    return replace(without_cache, cache=cache)


@contextmanager
def out_of_the_way(trainee: Trainee, platform: Platform, *, offload: bool) -> Iterator[None]:
    """Within, gradients take no memory and the optimizer's state lies in the host's; neither may be used.

    Args:
        offload: without it nothing happens.
    """
    if not offload:
        yield
        return
    platform.synchronize()
    for chunk in trainee.ddp:
        chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
    if platform.has_own_memory:
        trainee.optimizer.offload_to_cpu()
    try:
        yield
    finally:
        if platform.has_own_memory:
            trainee.optimizer.restore_from_cpu()
        for chunk in trainee.ddp:
            chunk.restore_grad_buffers(synchronize=False)
        platform.synchronize()


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
