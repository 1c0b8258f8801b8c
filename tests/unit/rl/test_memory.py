"""What trainer and engine take together, and what each leaves to the other."""

from dataclasses import replace

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config
from megatron_mm.parallel.platform import get_platform
from megatron_mm.planning.cache import sequence_cache_bytes
from megatron_mm.planning.memory import Memory
from megatron_mm.planning.rl_memory import RLMemory
from megatron_mm.planning.rollout import MODES
from megatron_mm.rl.job import ALGORITHMS, check_run
from megatron_mm.rl.memory import budget, describe

GIB = 2.0**30
ALL = RLMemory(
    trainer=Memory(
        weights=8 * GIB, gradients=16 * GIB, optimizer=6 * GIB, language=20 * GIB, vision=0, output=4 * GIB, working=GIB
    ),
    scoring=Memory(weights=0, gradients=0, optimizer=0, language=0, vision=0, output=2 * GIB, working=GIB),
    reference=8 * GIB,
    engine=8 * GIB,
    cache=10 * GIB,
    graphs=2 * GIB,
    engine_working=3 * GIB,
    sleeps=False,
    offload=False,
)


def _totals(memory: RLMemory) -> list[float]:
    return [memory.total("drawing") / GIB, memory.total("scoring") / GIB, memory.total("updating") / GIB]


def test_what_is_held_when() -> None:
    assert _totals(ALL) == [61, 61, 83]
    asleep = replace(ALL, sleeps=True)
    assert _totals(asleep) == [61, 43, 65]
    # The reference is away but for its own pass.
    offloaded = replace(asleep, offload=True)
    assert _totals(offloaded) == [31, 43, 57]
    assert ALL.trainer_while_drawing == 38 * GIB
    assert offloaded.trainer_while_drawing == 8 * GIB


def test_it_says_what_does_not_fit() -> None:
    at_80 = describe(ALL, int(80 * GIB))
    assert at_80.splitlines()[0].endswith("reference 8.00 GiB, engine's weights 8.00 GiB, engine's cache 10.00 GiB")
    assert "drawing 61.00 GiB, scoring 61.00 GiB, updating 83.00 GiB, of 80.00 GiB; too much to learn" in at_80
    assert "too much to draw" not in at_80
    assert "too much" not in describe(ALL, int(83 * GIB))
    assert "too much to draw" in describe(ALL, int(50 * GIB))


def test_algorithms_draw_in_as_many_modes_as_the_plan_says() -> None:
    assert {name: len(kind().modes(1)) for name, kind in ALGORITHMS.items()} == MODES


def test_the_budget_of_a_run() -> None:
    settings = ["rl.rollout.ranks=2", "rl.rollout.cache_gib=0.5", "rl.objective.kl=none"]
    platform = get_platform("cpu")
    found, halved = (budget(load_config("mini/bpo", overrides=given), 2, platform) for given in ([], settings))
    assert found.reference == found.trainer.weights == found.engine  # one rank holds the whole model
    assert (halved.engine, halved.reference, halved.cache) == (found.engine / 2, 0, 0.5 * GIB)
    assert not found.sleeps
    # 2 bytes a weight, 4 a gradient.
    assert found.trainer.gradients == 2 * found.trainer.weights


def test_a_cache_that_holds_no_sequence_is_refused() -> None:
    # Qwen3-4B: 36 layers of 8 heads of 128, 16,384 tokens.
    assert sequence_cache_bytes(load_config("r4b/bpo")) == 2.25 * GIB
    assert sequence_cache_bytes(load_config("r4b/bpo", overrides=["rl.rollout.ranks=2"])) == 1.125 * GIB
    for gib, refused in ((2.2, True), (2.25, False)):
        config = load_config("r4b/bpo", overrides=[f"rl.rollout.cache_gib={gib}"])
        if not refused:
            check_run(config, 8)
            continue
        with pytest.raises(InputError, match=r"cache_gib=2\.2 .*max_sequence_tokens=16384, which takes 2\.25"):
            check_run(config, 8)


def test_a_model_that_vllm_cannot_be_handed_is_refused() -> None:
    config = load_config("r4b/bpo", overrides=["model.language={preset: qwen3-30b-a3b}"])
    with pytest.raises(InputError, match="experts"):
        check_run(config, 8)
