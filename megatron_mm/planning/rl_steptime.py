"""Seconds of a step of reinforcement learning, by phase."""

from dataclasses import dataclass

from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.activations import weight_bytes
from megatron_mm.planning.cache import cache_token_bytes
from megatron_mm.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_mm.planning.parameters import model_parameters
from megatron_mm.planning.rl_memory import RLMemory, forward_config, update_config
from megatron_mm.planning.rollout import (
    Rollouts,
    num_engines,
    sequence_load,
    side_by_side,
)
from megatron_mm.planning.steptime import step_time
from megatron_mm.planning.traffic import LINK_EFFICIENCY

# Our assumptions, none of them measured: what decoding and copies reach of the stated bandwidth of a GPU's memory, what
# pinned copies reach of PCIe; seconds of scheduling and sampling in a step of decoding, and of a small sum over ranks.
MEMORY_EFFICIENCY = 0.6
HOST_EFFICIENCY = 0.8
STEP_SECONDS = 4e-3
SUM_SECONDS = 15e-6
# A weight sync reads and writes each weight once, and a sum over the bits reads what was sent and what arrived.
SYNC_PASSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RLStepTime:
    """Seconds of one step, phase by phase; nothing goes on at the same time.

    Attributes:
        rollouts: what is drawn.
        side_by_side: responses that an engine works on at a time.
        drawing: responses of the step.
        offloading: what moves between GPU and host.
        scoring: log-probabilities under policy and reference.
        updating: all updates.
        syncing: weights for the engine.
    """

    rollouts: Rollouts
    side_by_side: float
    drawing: float
    offloading: float
    scoring: float
    updating: float
    syncing: float

    @property
    def seconds(self) -> float:
        """All phases."""
        return self.drawing + self.offloading + self.scoring + self.updating + self.syncing


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTime:
    """Seconds of the trainer's phases of one step.

    Attributes:
        scoring: log-probabilities under policy and reference.
        updating: all updates.
    """

    scoring: float
    updating: float


def trainer_time(
    config: RunConfig, num_ranks: int, gpu: Gpu, rollouts: Rollouts, utilisation: float, tiles_per_pack: float | None
) -> TrainerTime:
    """Return the seconds that scores and updates of a step take.

    Args:
        config: a run of reinforcement learning whose layout can be.
        num_ranks: all ranks of the run.
        gpu: what the ranks run on.
        rollouts: what a step of the stage draws.
        utilisation: share of the peak that a GPU reaches while it computes.
        tiles_per_pack: see `sequence_load`.
    """
    assert config.rl is not None
    rl, update = config.rl, update_config(config, num_ranks, rollouts)
    load = sequence_load(config, rollouts, rollouts.response_tokens, tiles_per_pack)
    learns = step_time(update, num_ranks, gpu, load, utilisation)
    scores = step_time(forward_config(update), num_ranks, gpu, load, utilisation)
    passes = 1 + (rl.objective.kl != "none")
    return TrainerTime(scoring=rl.updates * passes * scores.seconds, updating=rl.updates * learns.seconds)


def rl_step_time(
    config: RunConfig,
    num_ranks: int,
    gpu: Gpu,
    rollouts: Rollouts,
    memory: RLMemory,
    trainer: TrainerTime,
    draw_rate: float | None,
) -> RLStepTime:
    """Return the seconds of a step of a stage.

    Args:
        config: a run of reinforcement learning whose layout can be.
        num_ranks: all ranks of the run.
        gpu: what the ranks run on.
        rollouts: what a step of the stage draws.
        memory: what a rank holds.
        trainer: seconds of scores and updates.
        draw_rate: tokens a second that one GPU draws; None means as fast as its memory is read.
    """
    number = side_by_side(config, num_ranks, rollouts, memory.cache)
    if draw_rate is None:
        drawing = _draw_seconds(config, num_ranks, gpu, rollouts, number)
    else:
        drawing = rollouts.drawn_tokens / num_ranks / draw_rate
    return RLStepTime(
        rollouts=rollouts,
        side_by_side=number,
        drawing=drawing,
        offloading=_offload_seconds(config, gpu, memory),
        scoring=trainer.scoring,
        updating=trainer.updating,
        syncing=_sync_seconds(config, num_ranks, gpu, memory),
    )


def _draw_seconds(config: RunConfig, num_ranks: int, gpu: Gpu, rollouts: Rollouts, number: float) -> float:
    """Return the seconds that an engine takes for all of its responses.

    Decoding is bound by memory: each of its steps reads all weights that a token meets, and for every response its keys
    and values so far. What else a step does takes STEP_SECONDS, and an engine of several ranks sums twice a layer. An
    engine that works on n of R responses takes R / n times the mean length in steps, and goes on until the longest
    response of the last ones has ended. Where lengths are distributed exponentially with mean L, a response after a
    prompt of P tokens reads P L + L^2 tokens of keys and values in all.
    """
    assert config.rl is not None
    share = rollouts.num_responses / num_engines(config, num_ranks)
    prompt, response, longest = rollouts.prompt_tokens, rollouts.response_tokens, rollouts.longest_response
    steps = max(1.0, share / number) * response + longest - response
    language = config.model.language
    read = model_parameters(config.model)["language"] + language.vocab_size * language.hidden_size
    weights = weight_bytes(config) * read / config.rl.rollout.ranks
    keys = share * (prompt * response + response**2) * cache_token_bytes(config)
    sums = 2 * language.num_layers * SUM_SECONDS * (config.rl.rollout.ranks > 1)
    return steps * (STEP_SECONDS + sums) + (steps * weights + keys) / (gpu.memory_gbytes * 1e9 * MEMORY_EFFICIENCY)


def _offload_seconds(config: RunConfig, gpu: Gpu, memory: RLMemory) -> float:
    """Return the seconds for the optimizer's state to leave and return, and for the reference to come to each score."""
    assert config.rl is not None
    if not memory.offload:
        return 0.0
    moved = 2 * memory.trainer.optimizer + config.rl.updates * memory.reference
    return moved / (gpu.host_gbytes * 1e9 * HOST_EFFICIENCY)


def _sync_seconds(config: RunConfig, num_ranks: int, gpu: Gpu, memory: RLMemory) -> float:
    """Return the seconds of a weight sync: copies and sums in a GPU's memory, and what is gathered of other ranks.

    Where a worker holds what its rank's trainer holds, nothing is gathered; otherwise every rank gets all weights.
    """
    assert config.rl is not None
    parallel = config.parallel
    here = SYNC_PASSES * memory.engine / (gpu.memory_gbytes * 1e9 * MEMORY_EFFICIENCY)
    ranks = parallel.pipeline * (1 if parallel.tensor == config.rl.rollout.ranks else parallel.tensor)
    if ranks == 1:
        return here
    whole = memory.engine * config.rl.rollout.ranks
    spans_nodes = parallel.pipeline > 1 and num_ranks > GPUS_PER_NODE
    gbytes = gpu.network_gbytes if spans_nodes else gpu.nvlink_gbytes
    return here + whole * (ranks - 1) / ranks / (gbytes * 1e9 * LINK_EFFICIENCY)
