"""What a step of reinforcement learning draws, what packs its responses make, and how many an engine holds at once."""

from dataclasses import dataclass

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import ReinforceConfig, RunConfig, StageConfig
from megatron_mm.planning.cache import cache_fault, cache_token_bytes
from megatron_mm.planning.load import Load

# Mean response as a share of the longest allowed; an assumption. Vision-R1 reports means of 1,285 to 2,057 tokens under
# limits of 4,096 and 8,192 (arXiv 2503.06749v4, Table 3); R-4B reports none of its training.
RESPONSE_SHARE = 0.25
# A prompt that is not given: an image of two tiles, the overview and one of the grid, and a question of so many tokens.
PROMPT_TILES, QUESTION_TOKENS = 2, 128
# Responses to a prompt for each of `group_size`: BPO draws as many in each of two modes (rl/algorithms.py).
MODES = {"grpo": 1, "bpo": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """What the command line says about responses. What is None is assumed.

    Attributes:
        prompt_tokens: mean length of a prompt, its image features included.
        response_tokens: mean length of a response in every stage.
        draw_rate: tokens a second that one GPU draws.
        host_memory_gib: memory of a node.
        tiles_per_pack: tiles of a packed or padded sequence.
    """

    prompt_tokens: float | None = None
    response_tokens: float | None = None
    draw_rate: float | None = None
    host_memory_gib: float | None = None
    tiles_per_pack: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """The responses of one step of a stage.

    Attributes:
        stage: the stage in the config.
        num_responses: number of responses to all prompts together.
        prompt_tokens: mean length of a prompt.
        response_tokens: mean length of a response.
        longest_response: longest response that is possible.
    """

    stage: StageConfig
    num_responses: int
    prompt_tokens: float
    response_tokens: float
    longest_response: float

    @property
    def drawn_tokens(self) -> float:
        """Tokens of all responses."""
        return self.num_responses * self.response_tokens


def rollouts_of_run(config: RunConfig, options: RolloutOptions) -> list[Rollouts]:
    """Return what a step of each stage draws.

    Raises:
        InputError: a mean length leaves no room in a sequence, or exceeds what a stage allows.
    """
    rl, most = _rl(config), config.data.max_sequence_tokens
    limit = max(stage.max_response_tokens for stage in rl.stages)
    for name, value in (("--prompt-tokens", options.prompt_tokens), ("--response-tokens", options.response_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value:g} is below 1")
    if options.prompt_tokens is not None and options.prompt_tokens >= most:
        raise InputError(
            f"--prompt-tokens {options.prompt_tokens:g} leaves no room for a response in "
            f"data.max_sequence_tokens={most}; give less, or raise that"
        )
    if options.response_tokens is not None and options.response_tokens > limit:
        raise InputError(
            f"--response-tokens {options.response_tokens:g} is above max_response_tokens={limit} of every stage in "
            "rl.stages; give a mean length that a stage allows"
        )
    return [_rollouts(config, stage, options) for stage in rl.stages]


def _rollouts(config: RunConfig, stage: StageConfig, options: RolloutOptions) -> Rollouts:
    most, longest = config.data.max_sequence_tokens, float(stage.max_response_tokens)
    prompt = options.prompt_tokens
    if prompt is None:
        assumed = PROMPT_TILES * config.model.vision.patches_per_tile + QUESTION_TOKENS
        prompt = float(min(assumed, most - stage.max_response_tokens))
    longest = min(longest, most - prompt)
    response = RESPONSE_SHARE * longest if options.response_tokens is None else min(options.response_tokens, longest)
    rl = _rl(config)
    return Rollouts(
        stage=stage,
        num_responses=config.train.global_batch * stage.group_size * MODES[rl.algorithm],
        prompt_tokens=prompt,
        response_tokens=response,
        longest_response=longest,
    )


def sequence_load(config: RunConfig, rollouts: Rollouts, response_tokens: float, tiles_per_pack: float | None) -> Load:
    """Return the load of one sequence, packed or padded, that is made of responses of one length.

    Args:
        rollouts: what is drawn.
        response_tokens: length of each response, not above `rollouts.longest_response`.
        tiles_per_pack: tiles of the sequence; None means that prompts are images but for what fills no tile.
    """
    sample = rollouts.prompt_tokens + response_tokens
    tokens = config.data.max_sequence_tokens if config.data.packed else round(sample)
    num_samples = tokens / sample if config.data.packed else 1.0
    tiles = tiles_per_pack
    if tiles is None:
        tiles = rollouts.prompt_tokens // config.model.vision.patches_per_tile * num_samples
        if config.data.max_pack_tiles is not None:
            tiles = min(tiles, config.data.max_pack_tiles)
    return Load(tokens, tokens**2 / num_samples, num_samples, tiles, num_samples * response_tokens)


def memory_loads(config: RunConfig, options: RolloutOptions) -> list[tuple[Rollouts, Load]]:
    """Return the sequences in which a rank may hold most: of each stage's longest responses, and of its mean ones.

    Long responses have more tokens with a loss, short ones leave room for more images.
    """
    return [
        (rollouts, sequence_load(config, rollouts, response, options.tiles_per_pack))
        for rollouts in rollouts_of_run(config, options)
        for response in (rollouts.longest_response, rollouts.response_tokens)
    ]


def num_sequences(config: RunConfig, rollouts: Rollouts) -> float:
    """Return how many sequences, packed or padded, the responses of a step make."""
    if not config.data.packed:
        return float(rollouts.num_responses)
    sample = rollouts.prompt_tokens + rollouts.response_tokens
    return rollouts.num_responses * sample / config.data.max_sequence_tokens


def num_engines(config: RunConfig, num_ranks: int) -> int:
    """Return how many engines share out the prompts of a step."""
    return num_ranks // _rl(config).rollout.ranks


def side_by_side(config: RunConfig, num_ranks: int, rollouts: Rollouts, cache_bytes: float) -> float:
    """Return how many responses an engine works on at a time.

    That is what its cache holds, at most rl.rollout.max_sequences and its share of the responses. Responses to a prompt
    in one mode share the prompt's keys and values (vLLM's prefix cache). A response that is under way has the mean
    length: half of its own would be right if all were equally long, but longer ones are under way for longer, and where
    lengths are distributed exponentially both effects cancel.
    """
    rl = _rl(config)
    each = rollouts.prompt_tokens / rollouts.stage.group_size + rollouts.response_tokens
    held = cache_bytes / cache_token_bytes(config) / each
    share = rollouts.num_responses / num_engines(config, num_ranks)
    return max(1.0, min(held, rl.rollout.max_sequences, share))


def rank_faults(config: RunConfig, num_ranks: int, ranks_of_node: int) -> list[str]:
    """Return every reason why engines and responses cannot be shared out over ranks, one sentence each."""
    rl, faults = _rl(config), []
    if ranks_of_node % rl.rollout.ranks:
        faults.append(f"rl.rollout.ranks={rl.rollout.ranks} does not divide the {ranks_of_node} ranks of a machine")
    fewest = min(stage.group_size for stage in rl.stages) * config.train.global_batch // rl.updates
    data_ranks = num_ranks // config.parallel.model_ranks
    if fewest < data_ranks:
        faults.append(
            f"an update has {fewest} responses (train.global_batch={config.train.global_batch} prompts, "
            f"rl.updates={rl.updates}), fewer than the {data_ranks} data-parallel ranks"
        )
    return faults


def engine_faults(config: RunConfig) -> list[str]:
    """Return every reason why vLLM would not start, or not take the model, one sentence each."""
    if config.model.language.experts is not None:
        return ["the model has experts, whose weights cannot be handed to vLLM yet; take a model without"]
    cache_bytes = _rl(config).rollout.cache_bytes
    if cache_bytes is None and config.fp8.recipe != "none":
        return [
            f"fp8.recipe={config.fp8.recipe} keeps copies of the weights in 8 bits from the first pass on, which "
            "rl.rollout.cache_gib=auto does not foresee; give rl.rollout.cache_gib a number, or set fp8.recipe=none"
        ]
    fault = None if cache_bytes is None else cache_fault(config, cache_bytes)
    return [] if fault is None else [fault]


def _rl(config: RunConfig) -> ReinforceConfig:
    assert config.rl is not None
    return config.rl
