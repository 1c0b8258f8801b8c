"""What a run of reinforcement learning takes on a machine, and a search for settings that fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config.layout import layout_faults
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.gpus import GPUS_PER_NODE
from megatron_mm.planning.memory import Memory
from megatron_mm.planning.propose import DEGREES, Machine, Settings, as_overrides, layouts, overrides
from megatron_mm.planning.rl_memory import RLMemory, host_memory, rl_memory, trainer_memory
from megatron_mm.planning.rl_steptime import RLStepTime, TrainerTime, rl_step_time, trainer_time
from megatron_mm.planning.rollout import RolloutOptions, engine_faults, memory_loads, rank_faults, rollouts_of_run


@dataclass(frozen=True, slots=True, kw_only=True)
class RLCandidate:
    """Settings and what they take.

    Attributes:
        config: the run with these settings.
        pipeline_stage: the pipeline stage whose ranks hold most.
        memory: what such a rank holds.
        host: bytes of a node's host by component.
        times: seconds of a step of each stage of the run.
    """

    config: RunConfig
    pipeline_stage: int
    memory: RLMemory
    host: dict[str, float]
    times: tuple[RLStepTime, ...]

    @property
    def run_seconds(self) -> float:
        """Seconds of all steps of all stages."""
        return sum(time.rollouts.stage.steps * time.seconds for time in self.times)

    def fits(self, machine: Machine, host_bytes: float) -> bool:
        """Return whether a GPU and a node hold it."""
        memory = self.memory
        return memory.total(memory.worst_phase) <= machine.usable_bytes and sum(self.host.values()) <= host_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trainer:
    """What the trainer of a layout takes, whatever its engines are."""

    pipeline_stage: int
    memory: Memory
    scoring: Memory
    times: tuple[TrainerTime, ...]


def assess_rl(config: RunConfig, machine: Machine, options: RolloutOptions) -> RLCandidate:
    """Return what settings take that `rl_faults` accepts; memory is that of the worst stage of the run."""
    return _with_engines(config, machine, options, _trainer(config, machine, options))


def rl_proposals(
    config: RunConfig, machine: Machine, options: RolloutOptions, host_bytes: float, number: int
) -> list[RLCandidate]:
    """Return up to `number` settings that fit, the fastest first, one of each layout; the rest of the config stays."""
    found = []
    for layout in _layouts(config):
        settings = [setting for setting in _engines(layout) if not rl_faults(setting, machine.num_gpus)]
        if not settings:
            continue
        trainer = _trainer(layout, machine, options)
        candidates = [_with_engines(setting, machine, options, trainer) for setting in settings]
        fitting = [candidate for candidate in candidates if candidate.fits(machine, host_bytes)]
        if fitting:
            found.append(min(fitting, key=lambda candidate: candidate.run_seconds))
    return sorted(found, key=lambda candidate: candidate.run_seconds)[:number]


def _trainer(config: RunConfig, machine: Machine, options: RolloutOptions) -> _Trainer:
    stage, memory, scoring = trainer_memory(config, machine.num_gpus, memory_loads(config, options), "te")
    times = tuple(
        trainer_time(config, machine.num_gpus, machine.gpu, rollouts, machine.utilisation, options.tiles_per_pack)
        for rollouts in rollouts_of_run(config, options)
    )
    return _Trainer(pipeline_stage=stage, memory=memory, scoring=scoring, times=times)


def _with_engines(config: RunConfig, machine: Machine, options: RolloutOptions, trainer: _Trainer) -> RLCandidate:
    memory = rl_memory(config, trainer.memory, trainer.scoring, "te", machine.usable_bytes)
    times = tuple(
        rl_step_time(config, machine.num_gpus, machine.gpu, rollouts, memory, time, options.draw_rate)
        for rollouts, time in zip(rollouts_of_run(config, options), trainer.times, strict=True)
    )
    host = host_memory(config, memory, min(machine.num_gpus, GPUS_PER_NODE))
    return RLCandidate(config=config, pipeline_stage=trainer.pipeline_stage, memory=memory, host=host, times=times)


def rl_faults(config: RunConfig, num_gpus: int) -> list[str]:
    """Return every reason why a run cannot be on so many GPUs, one sentence each, empty if it can."""
    assert config.rl is not None
    faults = [*layout_faults(config, num_gpus), *config.rollout_faults(config.rl.rollout), *engine_faults(config)]
    return [*faults, *rank_faults(config, num_gpus, min(num_gpus, GPUS_PER_NODE))]


def rl_overrides(config: RunConfig, recipe: RunConfig) -> str:
    """Return the settings as the command line takes them after the recipe, see `overrides`."""
    engines = as_overrides(_engine_settings(config), _engine_settings(recipe), {"rl.rollout.ranks": 1})
    return f"{overrides(config, recipe)} {engines}"


def _engine_settings(config: RunConfig) -> Settings:
    assert config.rl is not None
    rollout = config.rl.rollout
    return {
        "rl.rollout.ranks": rollout.ranks,
        "rl.rollout.offload": rollout.offload,
        "rl.rollout.cache_gib": rollout.cache_gib,
    }


def _layouts(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the layouts that are tried, whether they can be or not, the simplest first.

    Sequences are not cut: packs are made of many responses, and shorter packs do the same at no cost.
    """
    for layout in layouts(config):
        parallel, micro_batch = layout.parallel, layout.train.micro_batch
        is_cut = parallel.context > 1 or parallel.virtual_pipeline > 1
        if not is_cut and not (config.data.packed and micro_batch > 1):
            yield layout


def _engines(config: RunConfig) -> Iterator[RunConfig]:
    """Yield a layout with every kind of engine that is tried."""
    assert config.rl is not None
    for ranks, offload in itertools.product(DEGREES, (False, True)):
        rollout = config.rl.rollout.model_copy(update={"ranks": ranks, "offload": offload, "cache_gib": "auto"})
        yield config.model_copy(update={"rl": config.rl.model_copy(update={"rollout": rollout})})
