"""`megatron-mm plan` of reinforcement learning: everything said in plain text, with what was assumed."""

from collections.abc import Iterator, Sequence

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.cache import ENGINE_WORKING_BYTES, GRAPH_BYTES, cache_token_bytes
from megatron_mm.planning.gpus import GPUS_PER_NODE, find_gpu
from megatron_mm.planning.load import check_tiles
from megatron_mm.planning.propose import Machine
from megatron_mm.planning.report import (
    COMPONENTS,
    NUM_PROPOSALS,
    SECONDS_PER_HOUR,
    Plan,
    PlanOptions,
    check_options,
    describe_parameters,
    gib,
)
from megatron_mm.planning.rl_memory import PHASES, PROCESS_BYTES, largest
from megatron_mm.planning.rl_propose import RLCandidate, assess_rl, rl_faults, rl_overrides, rl_proposals
from megatron_mm.planning.rl_steptime import HOST_EFFICIENCY, MEMORY_EFFICIENCY, STEP_SECONDS, SUM_SECONDS, RLStepTime
from megatron_mm.planning.rollout import (
    MODES,
    PROMPT_TILES,
    QUESTION_TOKENS,
    RESPONSE_SHARE,
    RolloutOptions,
    num_engines,
    rollouts_of_run,
)
from megatron_mm.planning.traffic import LINK_EFFICIENCY

_COMPONENTS = COMPONENTS | {
    "reference": "reference",
    "engine": "engine's weights",
    "cache": "engine's keys and values",
    "graphs": "engine's CUDA graphs",
    "engine_working": "engine's work space",
}
_HOST = {
    "optimizer": "optimizer's state, offloaded",
    "reference": "reference, offloaded",
    "engine": "weights of a sleeping engine",
    "checkpoint": "a checkpoint being written",
    "processes": "processes of the ranks",
}


def plan_rl(config: RunConfig, options: PlanOptions, rollout: RolloutOptions) -> Plan:
    """Return everything about a run of reinforcement learning on so many GPUs.

    Raises:
        InputError: an option is out of its range, or no such GPU is known.
    """
    check_options(options)
    for name, value in (("--draw-rate", rollout.draw_rate), ("--host-memory", rollout.host_memory_gib)):
        if value is not None and value <= 0:
            raise InputError(f"{name} {value:g} is not above 0")
    check_tiles(rollout.tiles_per_pack)
    machine = Machine(find_gpu(options.gpu), options.num_gpus, options.memory_share, options.utilisation)
    host_gib = machine.gpu.host_memory_gib if rollout.host_memory_gib is None else rollout.host_memory_gib
    faults = rl_faults(config, options.num_gpus)
    found = rl_proposals(config, machine, rollout, host_gib * 2**30, NUM_PROPOSALS)
    if faults:
        cannot = f"recipe {config.recipe} cannot run on {machine.num_gpus} ranks:"
        return Plan("", "\n".join([cannot, *faults, _fastest(config, found)]))
    given = assess_rl(config, machine, rollout)
    lines = [f"{config.recipe} on {machine.num_gpus} {machine.gpu.name}", "", *describe_parameters(config)]
    lines += ["", *_memory(given, machine), "", *_host_memory(given, machine, host_gib), "", *_steps(given, machine)]
    lines += ["", *_proposals(found, config), "", "Assumed"]
    lines += [f"  - {line}" for line in _assumptions(config, machine, rollout)]
    return Plan("\n".join(lines) + "\n", _refusal(config, machine, host_gib * 2**30, given, found))


def _fastest(config: RunConfig, found: Sequence[RLCandidate]) -> str:
    return f"the fastest settings that fit: {rl_overrides(found[0].config, config)}" if found else "nothing tried fits"


def _refusal(
    config: RunConfig,
    machine: Machine,
    host_bytes: float,
    given: RLCandidate,
    found: Sequence[RLCandidate],
) -> str | None:
    """Return one message, what does not fit, by how much, and the fastest settings that do, or None where all fits."""
    memory, faults = given.memory, []
    phase = memory.worst_phase
    total, host = memory.total(phase), sum(given.host.values())
    if total > machine.usable_bytes:
        components = memory.held(phase)
        name = largest(components)
        faults.append(
            f"recipe {config.recipe} does not fit {machine.gpu.name} while {phase}: a rank of pipeline stage "
            f"{given.pipeline_stage} needs {gib(total)} GiB, {gib(total - machine.usable_bytes)} more than the "
            f"{gib(machine.usable_bytes)} that it may take; the largest component is {_COMPONENTS[name]}, "
            f"{gib(components[name])} GiB"
        )
    if host > host_bytes:
        name = largest(given.host)
        faults.append(
            f"recipe {config.recipe} does not fit the host: a node needs {gib(host)} GiB, {gib(host - host_bytes)} "
            f"more than the {gib(host_bytes)} that it has (--host-memory); the largest component is {_HOST[name]}, "
            f"{gib(given.host[name])} GiB"
        )
    return "; ".join([*faults, _fastest(config, found)]) if faults else None


def _memory(given: RLCandidate, machine: Machine) -> Iterator[str]:
    config, memory = given.config, given.memory
    assert config.rl is not None
    ranks = machine.num_gpus // config.parallel.model_ranks
    engines = num_engines(config, machine.num_gpus)
    yield f"Settings: {rl_overrides(config, config)}, data-parallel {ranks}, {engines} engines"
    stage = f" of pipeline stage {given.pipeline_stage}, the fullest" if config.parallel.pipeline > 1 else ""
    yield f"Memory of a rank{stage}, GiB"
    yield f"  {'':<36}{''.join(f'{phase:>10}' for phase in PHASES)}"
    held = [memory.held(phase) for phase in PHASES]
    for name in held[0]:
        yield f"  {_COMPONENTS[name]:<36}{''.join(f'{gib(of_phase[name]):>10}' for of_phase in held)}"
    totals = "".join(f"{gib(memory.total(phase)):>10}" for phase in PHASES)
    verdict = "fits" if memory.total(memory.worst_phase) <= machine.usable_bytes else "DOES NOT FIT"
    yield f"  {'in all':<36}{totals}  of {gib(machine.usable_bytes)} that it may take: {verdict}"


def _host_memory(given: RLCandidate, machine: Machine, host_gib: float) -> Iterator[str]:
    yield f"Memory of a node's host, GiB, {min(machine.num_gpus, GPUS_PER_NODE)} ranks"
    for name, num_bytes in given.host.items():
        yield f"  {_HOST[name]:<36}{gib(num_bytes):>10}"
    total = sum(given.host.values())
    verdict = "fits" if total <= host_gib * 2**30 else "DOES NOT FIT"
    yield f"  {'in all':<36}{gib(total):>10}  of {host_gib:,g}: {verdict}"


def _steps(given: RLCandidate, machine: Machine) -> Iterator[str]:
    for number, time in enumerate(given.times):
        yield from _step(given, time, number, machine)
    hours = given.run_seconds / SECONDS_PER_HOUR
    yield f"All {given.config.train.steps:,} steps: {hours:,.1f} hours, {hours * machine.num_gpus:,.0f} GPU hours"


def _step(given: RLCandidate, time: RLStepTime, number: int, machine: Machine) -> Iterator[str]:
    config, rollouts = given.config, time.rollouts
    assert config.rl is not None
    share = rollouts.num_responses / num_engines(config, machine.num_gpus)
    tokens = given.memory.cache / cache_token_bytes(config)
    rate = rollouts.drawn_tokens / time.drawing / machine.num_gpus
    yield (
        f"A step of rl.stages.{number}: {rollouts.num_responses:,} responses of {rollouts.response_tokens:,.0f} tokens "
        f"on average, at most {rollouts.longest_response:,.0f}"
    )
    yield (
        f"  {'side by side in an engine':<36}{time.side_by_side:>10,.0f} of its {share:,.0f}; the cache has "
        f"{tokens:,.0f} tokens"
    )
    yield f"  {'drawing':<36}{time.drawing:>10.1f} s at {rate:,.0f} tokens/s a GPU"
    yield f"  {'offloading':<36}{time.offloading:>10.2f} s"
    yield f"  {'scoring':<36}{time.scoring:>10.1f} s"
    yield f"  {'updating':<36}{time.updating:>10.1f} s in {config.rl.updates} updates"
    yield f"  {'weight sync':<36}{time.syncing:>10.2f} s"
    hours = rollouts.stage.steps * time.seconds / SECONDS_PER_HOUR
    yield f"  {'in all':<36}{time.seconds:>10.1f} s; {rollouts.stage.steps:,} steps {hours:,.1f} hours"


def _proposals(found: Sequence[RLCandidate], recipe: RunConfig) -> Iterator[str]:
    if not found:
        yield "Nothing that was tried fits; take more GPUs, larger ones, or shorter sequences"
        return
    yield "Settings that fit, the fastest first"
    yield f"  {'hours':>8}{'GiB':>8}{'cache':>8}  settings"
    for candidate in found:
        memory = candidate.memory
        yield (
            f"  {candidate.run_seconds / SECONDS_PER_HOUR:>8.1f}{gib(memory.total(memory.worst_phase)):>8}"
            f"{gib(memory.cache):>8}  {rl_overrides(candidate.config, recipe)}"
        )


def _assumptions(config: RunConfig, machine: Machine, options: RolloutOptions) -> Iterator[str]:
    """Yield lines that a reader can contradict one by one."""
    gpu = machine.gpu
    assert config.rl is not None
    prompt = rollouts_of_run(config, options)[0].prompt_tokens
    yield (
        f"a prompt has {prompt:,.0f} tokens (--prompt-tokens)"
        + (
            f": an image of {PROMPT_TILES} tiles and {QUESTION_TOKENS} tokens of text, as far as a response leaves room"
            if options.prompt_tokens is None
            else ""
        )
    )
    if options.response_tokens is None:
        yield (
            f"a response has {RESPONSE_SHARE:.0%} of the longest length on average (--response-tokens); memory is "
            "counted for sequences of the longest responses, and of mean ones, which hold more images"
        )
    if config.data.packed:
        yield "packs are full, and those of a data-parallel rank alike"
    if MODES[config.rl.algorithm] > 1:
        yield f"{config.rl.algorithm} draws group_size responses in each of {MODES[config.rl.algorithm]} modes"
    if options.draw_rate is None:
        yield (
            "the rate of drawing is an assumption, not a measurement (give what an engine reached: --draw-rate): "
            f"weights, keys and values are read at {MEMORY_EFFICIENCY:.0%} of {gpu.memory_gbytes:,g} GB/s, a step of "
            f"decoding takes {STEP_SECONDS * 1e3:g} ms more, a sum over an engine's ranks {SUM_SECONDS * 1e6:g} us, "
            "and lengths are distributed exponentially"
        )
    yield "responses to a prompt in one mode share its keys and values; reading prompts and grading take no time"
    yield (
        f"a GPU reaches {machine.utilisation:.0%} of {gpu.peak_tflops:,g} TFLOPS while it scores and updates "
        "(--utilisation); the optimizer's update takes no time"
    )
    yield (
        f"collectives reach {LINK_EFFICIENCY:.0%} of {gpu.nvlink_gbytes:g} GB/s inside and {gpu.network_gbytes:g} GB/s "
        f"between nodes of {GPUS_PER_NODE} GPUs, copies to the host {HOST_EFFICIENCY:.0%} of {gpu.host_gbytes:g} GB/s, "
        f"copies within a GPU {MEMORY_EFFICIENCY:.0%} of its memory's"
    )
    yield (
        f"tensors may take {machine.memory_share:.0%} of {gpu.memory_gib:g} GiB; the rest is for the CUDA context, "
        "NCCL, kernels' work space and holes in the heap (--memory-share)"
    )
    yield (
        f"vLLM's graphs take {gib(GRAPH_BYTES)} GiB and its work space {gib(ENGINE_WORKING_BYTES - GRAPH_BYTES)}, and "
        f"a rank's process takes {gib(PROCESS_BYTES)} GiB of the host's memory; none of it was measured"
    )
    if options.host_memory_gib is None:
        yield f"a node has {gpu.host_memory_gib:,g} GiB, as a DGX machine with these GPUs (--host-memory)"
    yield "a sleeping engine's weights take twice their size on the host, whose pinned blocks are rounded up"
    yield f"of the {gpu.name}: {gpu.source}"
    yield "activations are those of Transformer Engine's norms, linears and attention; none of this ran on a GPU"
