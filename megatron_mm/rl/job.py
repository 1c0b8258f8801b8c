"""A run of reinforcement learning: what it is made of, on the loop that all runs have."""

import os
import shutil
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_mm.chat.modes import Mode
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import ReinforceConfig, RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Colocation, Engine
from megatron_mm.grading.workers import Graders
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.parallel.watchdog import Watchdog
from megatron_mm.planning.cache import auto_cache_bytes, cache_fault
from megatron_mm.planning.rollout import engine_faults, rank_faults
from megatron_mm.rl.alarm import ModeAlarm
from megatron_mm.rl.algorithms import Algorithm, Bpo, Grpo
from megatron_mm.rl.exchange import WeightExchange
from megatron_mm.rl.heldout import HeldOut
from megatron_mm.rl.memory import budget, describe
from megatron_mm.rl.offload import HostCopy, Offload
from megatron_mm.rl.practice import Practice
from megatron_mm.rl.questions import Questions
from megatron_mm.rl.report import Report
from megatron_mm.rl.sampler import Sampler
from megatron_mm.rl.update import Reference
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.guard import Guard
from megatron_mm.train.loop import longest_wait, train
from megatron_mm.train.run import Outcome
from megatron_mm.weights.export import write_description
from megatron_mm.weights.stream import dtype_name
from megatron_mm.weights.tables import model_table

# In the run directory: what an engine starts from.
ENGINE = "engine"
ALGORITHMS: dict[str, type[Grpo]] = {"grpo": Grpo, "bpo": Bpo}


def reinforce(config: RunConfig) -> Outcome:
    """Run this rank's part of a run of reinforcement learning; continues it where the run directory holds a checkpoint.

    Raises:
        InputError: see train/loop.py; or the engines do not share the ranks out evenly.
    """
    return train(config, ReinforceJob)


class ReinforceJob:
    """See train/loop.py Job."""

    # The loss is the divergence alone where advantages add up to 0, and grows; norms are large where responses differ.
    spike_sigma = 0.0

    def __init__(self, config: RunConfig, platform: Platform, data: PreparedData, tokenizer: ChatTokenizer):
        assert config.rl is not None
        self._config, self._rl, self._platform, self._tokenizer = config, config.rl, platform, tokenizer
        check_run(config, dist.get_world_size())
        self._questions = Questions(config, data, tokenizer)
        is_validated = config.train.validate_every is not None
        self._held_out = HeldOut(config, data, config.rl.heldout_questions) if is_validated else None
        self._reference: Reference | None = None

    @property
    def wants_initial_weights(self) -> bool:
        """The reference is what the run began with, also when it goes on."""
        return self._rl.objective.kl != "none"

    @property
    def fingerprint(self) -> str:
        """See Job."""
        return self._questions.fingerprint

    def describe(self) -> str:
        """See Job."""
        plan, memory = self._questions.plan, budget(self._config, dist.get_world_size(), self._platform)
        return (
            f"data: {plan.num_samples:,} questions an epoch; {len(plan.left_out):,} do not fit and are left out\n"
            f"{describe(memory, self._platform.memory_bytes())}"
        )

    def look_at_initial_weights(self, chunks: Sequence[VisionLanguageModel]) -> None:
        """Keep them as the reference."""
        if self.wants_initial_weights:
            is_offloaded = self._rl.rollout.offload and self._platform.has_own_memory
            self._reference = Reference(chunks, HostCopy(self._platform) if is_offloaded else None)
            self._platform.synchronize()  # updates change the weights that are being copied

    def work(self, trainee: Trainee, guard: Guard, watchdog: Watchdog, warn: Callable[[str], None]) -> Practice:
        """See Job."""
        rollout = self._rl.rollout
        language = trainee.chunks[-1].language
        language.makes_entropies = self._rl.objective.entropy_coef > 0
        language.never_drawn = self._tokenizer.control(IMAGE)
        directory = self._config.run_dir / ENGINE
        dtype = DTYPES[self._config.precision]
        if state.writes():
            # Of a start before it may be left, with another model or tokenizer.
            shutil.rmtree(directory, ignore_errors=True)
            write_description(directory, self._config.model, self._tokenizer, dtype)
        dist.barrier()
        offload = Offload(trainee, self._platform, is_on=rollout.offload)
        with offload.away():
            most, cache_bytes = self._config.data.max_sequence_tokens, agreed_cache_bytes(self._config, self._platform)
            engine = Engine(
                directory,
                dtype_name(dtype),
                rollout.max_sequences,
                self._config.seed,
                has_own_memory=self._platform.has_own_memory,
                colocation=Colocation(rollout.ranks, most, cache_bytes),
            )
        algorithm = make_algorithm(self._rl)
        if self._held_out is None and Mode.AUTO not in algorithm.modes(1):
            warn(
                f"rl.algorithm={self._rl.algorithm} draws nothing in auto mode: without train.validate_every nobody "
                "sees the think rate, nor a mode that collapses"
            )
        graders = Graders.of_config(self._rl.reward) if dist.get_rank() % rollout.ranks == 0 else None
        return Practice(
            config=self._config,
            rl=self._rl,
            platform=self._platform,
            trainee=trainee,
            offload=offload,
            questions=self._questions,
            sampler=Sampler(
                engine,
                rollout.ranks,
                self._questions,
                self._tokenizer,
                graders,
                self._config.seed,
                longest_wait(self._config),
            ),
            exchange=WeightExchange(trainee.chunks, model_table(self._config.model), engine, self._platform),
            algorithm=algorithm,
            reference=self._reference,
            guard=guard,
            watchdog=watchdog,
            report=Report(),
            held_out=self._held_out,
            alarm=ModeAlarm(self._rl.least_mode_share, warn),
            pad=self._tokenizer.control(PAD),
            warn=warn,
        )


def make_algorithm(rl: ReinforceConfig) -> Algorithm:
    """By its name."""
    return ALGORITHMS[rl.algorithm](by_deviation=rl.by_deviation)


def check_run(config: RunConfig, num_ranks: int) -> None:
    """Raise `InputError` if engines or responses do not fit the ranks, or vLLM would not start or take the model."""
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    faults = [*rank_faults(config, num_ranks, ranks_of_node), *engine_faults(config)]
    if faults:
        raise InputError("\n".join(faults))


def agreed_cache_bytes(config: RunConfig, platform: Platform) -> int:
    """Return the bytes for keys and values on each rank, the same on all.

    All ranks ask together, with the trainer out of the way.

    Raises:
        InputError: rl.rollout.cache_gib=auto leaves less than one sequence takes.
    """
    assert config.rl is not None
    given = config.rl.rollout.cache_bytes
    if given is not None:
        return given
    planned, total = budget(config, dist.get_world_size(), platform), platform.memory_bytes()
    # What is free now may not be later: the optimizer's state is not there before the first update.
    free = min(platform.free_bytes(), total - planned.trainer_while_drawing)
    found = auto_cache_bytes(config, free, total, has_own_memory=platform.has_own_memory)
    agreed = int(state.least_of_all(torch.tensor(found, device=platform.device())))
    fault = cache_fault(config, agreed)
    if fault is not None:
        raise InputError(fault)
    return agreed
