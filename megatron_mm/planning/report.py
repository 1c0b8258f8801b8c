"""`megatron-mm plan`: everything said in plain text, with what was assumed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import layout_faults, pipeline_split
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.gpus import GPUS_PER_NODE, find_gpu
from megatron_mm.planning.load import Load, LoadOptions, assumed_load
from megatron_mm.planning.memory import Memory
from megatron_mm.planning.parameters import model_parameters
from megatron_mm.planning.propose import Candidate, Machine, assess, overrides, proposals
from megatron_mm.planning.traffic import LINK_EFFICIENCY, num_micro_batches

NUM_PROPOSALS = 5
MOST_GPUS = 1_000_000
# GPUs that a layout may leave idle where none fits all of them.
MOST_LEFT_IDLE = 8
SECONDS_PER_HOUR = 3600
COMPONENTS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer's state",
    "language": "activations of the language model",
    "vision": "activations of ViT and projector",
    "output": "final norm, logits and loss",
    "working": "work space of the passes",
}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line says beside the config.

    Attributes:
        gpu: name of a GPU in gpus.py.
        memory_share: of a GPU's memory that tensors may take.
        utilisation: share of the peak that a GPU reaches while it computes.
    """

    gpu: str
    num_gpus: int
    memory_share: float
    utilisation: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command prints, and why it refuses, None where it does not."""

    text: str
    refusal: str | None


def plan(config: RunConfig, options: PlanOptions, load_options: LoadOptions) -> Plan:
    """Everything about a run of supervised training on so many GPUs.

    Raises:
        InputError: an option is out of its range, or no such GPU is known.
    """
    check_options(options)
    machine = Machine(find_gpu(options.gpu), options.num_gpus, options.memory_share, options.utilisation)
    load = assumed_load(config, load_options)
    faults = layout_faults(config, options.num_gpus)
    found = proposals(config, machine, load, NUM_PROPOSALS)
    if faults:
        return Plan("", _refusal_of_layout(config, machine, load, faults, found))
    given = assess(config, machine, load)
    lines = [f"{config.recipe} on {machine.num_gpus} {machine.gpu.name}", "", *describe_parameters(config)]
    lines += ["", *_memory(given, machine), "", *_time(given, machine), "", *_traffic(given, machine)]
    lines += ["", *_proposals(found, config), "", "Assumed"]
    lines += [f"  - {line}" for line in _assumptions(config, machine, load)]
    return Plan("\n".join(lines) + "\n", _refusal(config, machine, given, found))


def check_options(options: PlanOptions) -> None:
    """Raise `InputError` if an option is out of its range."""
    for name, share in (("--utilisation", options.utilisation), ("--memory-share", options.memory_share)):
        if not 0 < share <= 1:
            raise InputError(f"{name} {share} is not above 0 and at most 1")
    if not 1 <= options.num_gpus <= MOST_GPUS:
        what = "below 1" if options.num_gpus < 1 else f"above {MOST_GPUS:,}"
        raise InputError(f"--gpus {options.num_gpus} is {what}")


def _refusal_of_layout(
    config: RunConfig, machine: Machine, load: Load, faults: list[str], found: list[Candidate]
) -> str:
    """One message: why the layout cannot run at all, and what would, with a few GPUs less if need be."""
    instead = _fastest(config, found)
    for num_gpus in range(machine.num_gpus - 1, max(machine.num_gpus - MOST_LEFT_IDLE, 0), -1):
        if found:
            break
        found = proposals(config, replace(machine, num_gpus=num_gpus), load, 1)
        if found:
            instead = f"with {num_gpus} GPUs, {_fastest(config, found)}"
    return "\n".join([f"recipe {config.recipe} cannot run on {machine.num_gpus} ranks:", *faults, instead])


def _fastest(config: RunConfig, found: list[Candidate]) -> str:
    return f"the fastest layout that fits: {overrides(found[0].config, config)}" if found else "no layout tried fits"


def _refusal(config: RunConfig, machine: Machine, given: Candidate, found: list[Candidate]) -> str | None:
    """One message: what does not fit, by how much, and the fastest layout that does."""
    memory = given.memory
    if memory.total <= machine.usable_bytes:
        return None
    part = memory.largest_part
    return (
        f"recipe {config.recipe} does not fit {machine.gpu.name}: a rank of pipeline stage {given.stage} needs "
        f"{gib(memory.total)} GiB, {gib(memory.total - machine.usable_bytes)} more than the "
        f"{gib(machine.usable_bytes)} that it may take; the largest part is {COMPONENTS[part]}, "
        f"{gib(getattr(memory, part))} GiB; {_fastest(config, found)}"
    )


def describe_parameters(config: RunConfig) -> Iterator[str]:
    """Yield the number of parameters of each module, and whether it learns."""
    counts = model_parameters(config.model)
    yield "Parameters"
    for module, number in counts.items():
        learns = "learns" if module in config.train.trained else "frozen"
        yield f"  {module:<36}{number:>16,}  {learns}"
    yield f"  {'in all':<36}{sum(counts.values()):>16,}"


def _memory(given: Candidate, machine: Machine) -> Iterator[str]:
    config, memory = given.config, given.memory
    parallel = config.parallel
    ranks = machine.num_gpus // parallel.model_ranks
    yield f"Layout: {overrides(config, config)}, data-parallel {ranks}"
    if parallel.num_chunks > 1:
        yield f"  language layers of each pipeline chunk: {', '.join(map(str, pipeline_split(config)))}"
    stage = f" of pipeline stage {given.stage}, the fullest" if parallel.pipeline > 1 else ""
    yield f"Memory of a rank{stage}, GiB"
    for field in fields(Memory):
        yield f"  {COMPONENTS[field.name]:<36}{gib(getattr(memory, field.name)):>10}"
    verdict = "fits" if memory.total <= machine.usable_bytes else "DOES NOT FIT"
    yield f"  {'in all':<36}{gib(memory.total):>10}  of {gib(machine.usable_bytes)} that it may take: {verdict}"


def _time(given: Candidate, machine: Machine) -> Iterator[str]:
    config, time = given.config, given.time
    train, seconds = config.train, time.seconds
    tokens = train.global_batch * config.data.max_sequence_tokens
    reached = time.model_flops / seconds / machine.num_gpus / (machine.gpu.peak_tflops * 1e12)
    hours = train.steps * seconds / SECONDS_PER_HOUR
    yield "Operations and time of a step"
    yield f"  {'of the model':<36}{time.model_flops / 1e15:>10,.0f} PFLOP"
    yield f"  {'done twice':<36}{time.recomputed_flops / 1e15:>10,.0f} PFLOP"
    yield f"  {'computing':<36}{time.compute_seconds:>10.2f} s"
    yield f"  {'pipeline bubble':<36}{time.bubble_seconds:>10.2f} s, {time.bubble_share:.1%} of the pipeline's time"
    yield f"  {'sending':<36}{time.traffic_seconds:>10.2f} s, {time.hidden_seconds:.2f} s of it while computing"
    yield f"  {'in all':<36}{seconds:>10.2f} s, {tokens / seconds:,.0f} tokens/s"
    if config.parallel.pipeline > 1:
        yield (
            f"  {'balance of the stages':<36}{time.balance:>10.1%}, the mean of their operations over the most, which "
            f"stage {time.slowest_stage} has"
        )
    yield f"  {'model FLOPs utilisation':<36}{reached:>10.1%}"
    yield (
        f"  {f'{train.steps:,} steps':<36}{hours:>10,.1f} hours for {train.steps * tokens / 1e9:,.1f} B tokens, "
        f"{hours * machine.num_gpus:,.0f} GPU hours"
    )


def _traffic(given: Candidate, machine: Machine) -> Iterator[str]:
    yield "Sent by the busiest rank in a step"
    if not given.time.flows:
        yield "  nothing"
    for flow in given.time.flows:
        yield (
            f"  {f'{flow.kind}-parallel, {flow.link}':<36}{flow.step_bytes / 1e9:>10,.1f} GB, "
            f"{flow.seconds(machine.gpu):.2f} s"
        )


def _proposals(found: Sequence[Candidate], recipe: RunConfig) -> Iterator[str]:
    if not found:
        yield "No layout that was tried fits; take more GPUs, larger ones, or shorter sequences"
        return
    yield "Layouts that fit, the fastest first"
    yield f"  {'s/step':>8}{'GiB':>8}{'bubble':>8}  layout"
    for candidate in found:
        time = candidate.time
        yield (
            f"  {time.seconds:>8.2f}{gib(candidate.memory.total):>8}{time.bubble_share:>8.1%}  "
            f"{overrides(candidate.config, recipe)}"
        )


def _assumptions(config: RunConfig, machine: Machine, load: Load) -> Iterator[str]:
    """Each line one, so that a reader can contradict it."""
    gpu = machine.gpu
    micro = num_micro_batches(config, machine.num_gpus) if not layout_faults(config, machine.num_gpus) else None
    what = "pack" if config.data.packed else "padded sample"
    yield (
        f"each {what} is full: {load.tokens:,} tokens, {load.num_samples:g} samples of equal length, {load.tiles:g} "
        f"tiles, {load.trained_tokens:,.0f} trained tokens (--tiles-per-pack, --trained-share, --samples-per-pack)"
    )
    if micro is not None:
        yield f"a data-parallel rank runs {micro:,} micro-batches of {config.train.micro_batch} a step, all alike"
    yield f"a GPU reaches {machine.utilisation:.0%} of {gpu.peak_tflops:,g} TFLOPS while it computes (--utilisation)"
    yield (
        f"tensors may take {machine.memory_share:.0%} of {gpu.memory_gib:g} GiB; the rest is for the CUDA context, "
        "NCCL, kernels' work space and holes in the heap (--memory-share)"
    )
    yield (
        f"nodes of {GPUS_PER_NODE} GPUs; {gpu.nvlink_gbytes:g} GB/s inside and {gpu.network_gbytes:g} GB/s between "
        f"them, each one way and a GPU, {LINK_EFFICIENCY:.0%} of which collectives reach"
    )
    yield f"of the {gpu.name}: {gpu.source}"
    yield (
        "nothing is sent while a rank computes but gradients, in the last backward pass of a step (optim.overlap), and "
        "the optimizer's update takes no time"
    )
    yield (
        "activations are those of Transformer Engine's norms, linears and attention in "
        f"{config.precision}; only the CPU's layers were measured (benchmarks/results/plan_memory.json)"
    )
    if config.fp8.recipe != "none":
        yield f"fp8.recipe={config.fp8.recipe} is counted as bf16, in memory and in time"
    if config.model.language.experts is not None:
        yield "every expert gets as many tokens as any other"


def gib(num_bytes: float) -> str:
    """Return bytes in GiB, rounded to a tenth."""
    return f"{num_bytes / 2**30:.1f}"
