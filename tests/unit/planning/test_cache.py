"""How much memory an engine's keys and values get when nobody says."""

import re

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.cache import (
    ENGINE_WORKING_BYTES,
    HOST_LIMIT_BYTES,
    auto_cache_bytes,
    cache_fault,
    engine_weight_bytes,
    sequence_cache_bytes,
)

GIB = 2**30


def _config(*overrides: str) -> RunConfig:
    return load_config("r4b/bpo", overrides=list(overrides))


def test_a_device_gives_what_is_free_but_weights_and_margin() -> None:
    config = _config()
    weights = engine_weight_bytes(config)
    assert weights == pytest.approx(8.975 * GIB, rel=1e-3)  # R-4B's 4,818,682,400 parameters in bf16
    found = auto_cache_bytes(config, 70 * GIB, 80 * GIB, has_own_memory=True)
    assert found == pytest.approx(70 * GIB - weights - ENGINE_WORKING_BYTES - 4 * GIB, abs=1)
    # Two ranks hold half of the weights each, and half of the heads: of a whole H200 both get more sequences.
    shared = _config("rl.rollout.ranks=2")
    assert engine_weight_bytes(shared) == weights / 2
    assert sequence_cache_bytes(shared) == sequence_cache_bytes(config) / 2
    assert auto_cache_bytes(shared, 70 * GIB, 80 * GIB, has_own_memory=True) == pytest.approx(
        found + weights / 2, abs=1
    )


def test_nobody_gets_more_than_the_longest_sequences_can_use() -> None:
    config = _config("rl.rollout.max_sequences=4")
    assert auto_cache_bytes(config, 130 * GIB, 140 * GIB, has_own_memory=True) == 5 * sequence_cache_bytes(config)
    mini = load_config("mini/bpo")
    assert auto_cache_bytes(mini, 60 * GIB, 64 * GIB, has_own_memory=False) == 257 * sequence_cache_bytes(mini)
    assert 257 * sequence_cache_bytes(mini) < GIB / 8


def test_the_host_gives_a_tenth_and_no_more_than_its_limit_unless_one_sequence_needs_more() -> None:
    short = _config("data.max_sequence_tokens=1024", "rl.stages.0.max_response_tokens=512")  # 0.14 GiB a sequence
    weights = engine_weight_bytes(short)
    assert auto_cache_bytes(short, weights + 4 * GIB, 64 * GIB, has_own_memory=False) == pytest.approx(0.4 * GIB, abs=1)
    assert auto_cache_bytes(short, weights + 40 * GIB, 64 * GIB, has_own_memory=False) == HOST_LIMIT_BYTES
    assert auto_cache_bytes(_config(), weights + 40 * GIB, 64 * GIB, has_own_memory=False) == 2.25 * GIB
    assert auto_cache_bytes(_config(), weights + 2 * GIB, 64 * GIB, has_own_memory=False) == pytest.approx(
        2 * GIB, abs=1
    )


def test_too_little_for_one_sequence_is_said_with_the_figures() -> None:
    config = _config()
    left = auto_cache_bytes(config, engine_weight_bytes(config) + 10 * GIB, 80 * GIB, has_own_memory=True)
    fault = cache_fault(config, left)
    assert fault is not None
    assert re.search(r"cache_gib=auto, which leaves 1 GiB here .*16384, which takes 2\.25; .*offload", fault)
    assert cache_fault(config, sequence_cache_bytes(config)) is None


@pytest.mark.parametrize("value", ["0", "-1", "big", "[1]", ".inf", "true"])
def test_a_size_is_a_number_or_auto(value: str) -> None:
    with pytest.raises(InputError, match=r"1 fault.*\n  rl\.rollout\.cache_gib: give a number of GiB above 0, or auto"):
        _config(f"rl.rollout.cache_gib={value}")


def test_sizes_in_bytes() -> None:
    for value, expected in (("2.5", 2.5 * GIB), ("20", 20 * GIB), ("auto", None)):
        config = _config(f"rl.rollout.cache_gib={value}")
        assert config.rl is not None
        assert config.rl.rollout.cache_bytes == expected
