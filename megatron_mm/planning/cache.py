"""Memory for an engine's keys and values: what one sequence takes, and what `rl.rollout.cache_gib=auto` comes to."""

from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.activations import weight_bytes
from megatron_mm.planning.parameters import model_parameters

_GIB = 2**30
# vLLM's cache is cut into blocks of so many tokens on CPUs, and smaller ones on GPUs.
_BLOCK_TOKENS = 128
# What an engine takes of a GPU besides weights and cache, estimated from vLLM 0.26's source and never measured: CUDA
# graphs of decoding (2 GiB), a pass over 16,384 tokens of prompts (2 GiB), and fp32 logits of 256 sequences with the
# copies that sampling makes of them (1 GiB).
GRAPH_BYTES = 2 * _GIB
ENGINE_WORKING_BYTES = GRAPH_BYTES + 3 * _GIB
# Share of a GPU that is left to NCCL, whose communicators are made when they are first needed, to libraries'
# workspaces, and to what is lost between blocks. An estimate too.
RESERVED_SHARE = 0.05
# In the host's memory others live as well, and a laptop has little.
HOST_SHARE = 0.1
HOST_LIMIT_BYTES = 1 * _GIB


def sequence_cache_bytes(config: RunConfig) -> int:
    """Return the bytes of keys and values of one sequence of data.max_sequence_tokens, on a rank of an engine.

    vLLM refuses to start with less.
    """
    return cache_token_bytes(config) * -(-config.data.max_sequence_tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS


def cache_token_bytes(config: RunConfig) -> int:
    """Return the bytes of one token's keys and values on a rank of an engine; more ranks than heads repeat heads."""
    assert config.rl is not None
    language = config.model.language
    heads = max(1, language.num_kv_heads // config.rl.rollout.ranks)
    return 2 * language.num_layers * heads * language.head_dim * weight_bytes(config)


def engine_weight_bytes(config: RunConfig) -> float:
    """Return the bytes of the weights that a rank of an engine holds."""
    assert config.rl is not None
    return weight_bytes(config) * sum(model_parameters(config.model).values()) / config.rl.rollout.ranks


def auto_cache_bytes(config: RunConfig, free: float, total: float, *, has_own_memory: bool) -> int:
    """Return what a rank's cache gets with `rl.rollout.cache_gib=auto`; 0 or less where nothing is left.

    On a device with memory of its own: what is free, less the engine's weights, ENGINE_WORKING_BYTES, and
    RESERVED_SHARE of the whole. In the host's memory: HOST_SHARE of what the engine's weights leave, at most
    HOST_LIMIT_BYTES, but what one sequence needs where it is there at all. Never more than
    rl.rollout.max_sequences of the longest sequences can use.

    Args:
        free: bytes that nothing else takes while responses are drawn, of this rank's device or its share of the host.
        total: bytes that the rank has.
        has_own_memory: whether it is a device's memory (parallel/platform).
    """
    assert config.rl is not None
    sequence = sequence_cache_bytes(config)
    room = free - engine_weight_bytes(config)
    if has_own_memory:
        room -= ENGINE_WORKING_BYTES + RESERVED_SHARE * total
    else:
        room = min(room, max(sequence, min(HOST_SHARE * room, HOST_LIMIT_BYTES)))
    # vLLM keeps one block for itself.
    return int(min(room, (config.rl.rollout.max_sequences + 1) * sequence))


def cache_fault(config: RunConfig, cache_bytes: int) -> str | None:
    """Return why vLLM would not start with a cache of this size, None if it would."""
    assert config.rl is not None
    needed, rollout = sequence_cache_bytes(config), config.rl.rollout
    if cache_bytes >= needed:
        return None
    is_auto = rollout.cache_bytes is None
    leaves = f", which leaves {max(0, cache_bytes) / _GIB:.3g} GiB here and" if is_auto else ""
    return (
        f"rl.rollout.cache_gib={rollout.cache_gib}{leaves} holds no sequence of "
        f"data.max_sequence_tokens={config.data.max_sequence_tokens}, which takes {needed / _GIB:.3g}; "
        f"{'set rl.rollout.offload=true' if is_auto else 'raise it'}, lower data.max_sequence_tokens, or raise "
        "rl.rollout.ranks"
    )
