"""Trainer and engine in the same memory: what both take."""

from megatron_mm.config.schema import RunConfig
from megatron_mm.parallel.platform import Platform
from megatron_mm.planning.cache import RESERVED_SHARE
from megatron_mm.planning.rl_memory import PHASES, RLMemory, rl_memory, trainer_memory
from megatron_mm.planning.rollout import RolloutOptions, memory_loads

_GIB = 2**30


def budget(config: RunConfig, num_ranks: int, platform: Platform) -> RLMemory:
    """Return what a rank of a run is expected to hold, with responses as long as they are assumed to be."""
    backend = "te" if platform.layer_backend == "te" else "local"
    _, trainer, scoring = trainer_memory(config, num_ranks, memory_loads(config, RolloutOptions()), backend)
    reserved = RESERVED_SHARE if platform.has_own_memory else 0.0
    return rl_memory(config, trainer, scoring, backend, (1 - reserved) * platform.memory_bytes())


def describe(memory: RLMemory, total: int) -> str:
    """Return two lines for the log.

    Args:
        memory: what a rank is expected to hold.
        total: bytes that a rank has.
    """
    trainer = memory.trainer
    parts = {
        "weights": trainer.weights,
        "gradients": trainer.gradients,
        "optimizer": trainer.optimizer,
        "reference": memory.reference,
        "engine's weights": memory.engine,
        "engine's cache": memory.cache,
    }
    advice = ""
    if memory.total("drawing") > total:
        advice += "; too much to draw: lower rl.rollout.cache_gib if it is a number, or set rl.rollout.offload=true"
    if max(memory.total("scoring"), memory.total("updating")) > total:
        advice += "; too much to learn: set train.recompute=full, or raise parallel.tensor"
    phases = ", ".join(f"{phase} {_size(memory.total(phase))}" for phase in PHASES)
    return (
        f"memory of a rank, planned: {', '.join(f'{name} {_size(part)}' for name, part in parts.items())}\n"
        f"  {phases}, of {_size(total)}{advice}"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
