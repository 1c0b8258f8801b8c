"""Search for layouts that fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config.layout import layout_faults
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_mm.planning.load import Load
from megatron_mm.planning.memory import Memory, worst_memory
from megatron_mm.planning.steptime import StepTime, step_time

DEGREES = (1, 2, 4, 8)
CHUNKS = (1, 2, 3, 4)
MICRO_BATCHES = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")

Settings = dict[str, object]
# Of what a layout is made of; a micro-batch has none.
_DEFAULTS: Settings = {
    "parallel.tensor": 1,
    "parallel.sequence": False,
    "model.vision.parallel": "tensor",
    "parallel.context": 1,
    "parallel.expert": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.pipeline_layers": None,
    "train.recompute": "none",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run is planned for.

    Attributes:
        num_gpus: in all.
        memory_share: of a GPU's memory that tensors may take.
        utilisation: share of the peak that a GPU reaches while it computes.
    """

    gpu: Gpu
    num_gpus: int
    memory_share: float
    utilisation: float

    @property
    def usable_bytes(self) -> float:
        """Of a GPU."""
        return self.gpu.memory_gib * 2**30 * self.memory_share


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout and what it takes.

    Attributes:
        stage: whose ranks hold most.
    """

    config: RunConfig
    stage: int
    memory: Memory
    time: StepTime


def assess(config: RunConfig, machine: Machine, load: Load) -> Candidate:
    """What a layout takes that `layout_faults` accepts."""
    stage, memory = worst_memory(config, machine.num_gpus, load, "te")
    time = step_time(config, machine.num_gpus, machine.gpu, load, machine.utilisation)
    return Candidate(config, stage, memory, time)


def proposals(config: RunConfig, machine: Machine, load: Load, number: int) -> list[Candidate]:
    """Up to `number` layouts that fit, the fastest first; what the config says beside the layout stays."""
    timed = [
        (step_time(layout, machine.num_gpus, machine.gpu, load, machine.utilisation).seconds, place, layout)
        for place, layout in enumerate(layouts(config))
        if not layout_faults(layout, machine.num_gpus)
    ]
    found: dict[tuple[object, ...], Candidate] = {}
    for _, _, layout in sorted(timed, key=lambda entry: entry[:2]):
        # A larger micro-batch that is as fast only takes more memory.
        kind = layout.parallel, layout.model.vision.parallel, layout.train.recompute
        candidate = assess(layout, machine, load)
        if kind not in found and candidate.memory.total <= machine.usable_bytes:
            found[kind] = candidate
        if len(found) == number:
            break
    return list(found.values())


def layouts(config: RunConfig) -> Iterator[RunConfig]:
    """All that are tried, whether they can be or not; the simplest first."""
    experts = config.model.language.experts is not None
    degrees = [degree for degree in DEGREES if degree <= GPUS_PER_NODE]
    for pipeline, chunks, context, tensor, sequence, vision, recompute, micro_batch, expert in itertools.product(
        DEGREES,
        CHUNKS,
        DEGREES,
        degrees,
        (False, True),
        ("tensor", "data"),
        RECOMPUTE,
        MICRO_BATCHES,
        DEGREES if experts else (1,),
    ):
        if (tensor == 1 and (sequence or vision == "data")) or (chunks > 1 and pipeline == 1):
            continue
        parallel = config.parallel.model_copy(
            update={
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": chunks,
                "pipeline_layers": None,
                "context": context,
                "expert": expert,
                "sequence": sequence,
            }
        )
        encoder = config.model.vision.model_copy(update={"parallel": vision})
        yield config.model_copy(
            update={
                "parallel": parallel,
                "model": config.model.model_copy(update={"vision": encoder}),
                "train": config.train.model_copy(update={"recompute": recompute, "micro_batch": micro_batch}),
            }
        )


def overrides(config: RunConfig, recipe: RunConfig) -> str:
    """Return the settings of a layout as the command line takes them after the recipe.

    What is the schema's default and what the recipe says as well is left out.

    Args:
        config: the recipe with another layout, or the same.
        recipe: the recipe.
    """
    return as_overrides(_layout_settings(config), _layout_settings(recipe), _DEFAULTS)


def as_overrides(settings: Settings, of_recipe: Settings, defaults: Settings) -> str:
    """Return settings as the command line takes them, but for those that are both the default and the recipe's."""
    return " ".join(
        f"{name}={_as_yaml(value)}"
        for name, value in settings.items()
        if value != of_recipe[name] or value != defaults.get(name)
    )


def _layout_settings(config: RunConfig) -> Settings:
    parallel = config.parallel
    return {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence": parallel.sequence,
        "model.vision.parallel": config.model.vision.parallel,
        "parallel.context": parallel.context,
        "parallel.expert": parallel.expert,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.pipeline_layers": parallel.pipeline_layers,
        "train.recompute": config.train.recompute,
        "train.micro_batch": config.train.micro_batch,
    }


def _as_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value).replace(" ", "")
