"""What trainer and engine take together, and what each leaves to the other."""

from dataclasses import replace

from megatron_mm.config.load import load_config
from megatron_mm.parallel.platform import get_platform
from megatron_mm.planning.memory import Memory
from megatron_mm.rl.memory import Budget, budget

GIB = 2.0**30
ALL = Budget(
    trainer=Memory(
        weights=8 * GIB, gradients=16 * GIB, optimizer=6 * GIB, language=20 * GIB, vision=0, output=4 * GIB, working=GIB
    ),
    reference=8 * GIB,
    engine=8 * GIB,
    cache=10 * GIB,
    sleeps=False,
    offload=False,
)


def test_what_is_held_when() -> None:
    assert ALL.drawing == 56 * GIB
    assert ALL.learning == 81 * GIB
    asleep = replace(ALL, sleeps=True)
    assert (asleep.drawing, asleep.learning) == (56 * GIB, 63 * GIB)
    offloaded = replace(asleep, offload=True)
    assert (offloaded.drawing, offloaded.learning) == (26 * GIB, 63 * GIB)


def test_it_says_what_does_not_fit() -> None:
    at_80 = ALL.describe(int(80 * GIB))
    assert at_80.splitlines()[0].endswith("reference 8.00 GiB, engine's weights 8.00 GiB, engine's cache 10.00 GiB")
    assert "drawing responses 56.00 GiB, learning 81.00 GiB, of 80.00 GiB; too much to learn" in at_80
    assert "too much to draw" not in at_80
    assert "too much" not in ALL.describe(int(81 * GIB))
    assert "too much to draw" in ALL.describe(int(50 * GIB))


def test_the_budget_of_a_run() -> None:
    settings = ["rl.rollout.ranks=2", "rl.rollout.cache_gib=0.5", "rl.objective.kl=none"]
    platform = get_platform("cpu")
    found, halved = (budget(load_config("mini/bpo", overrides=given), 2, platform) for given in ([], settings))
    assert found.reference == found.trainer.weights == found.engine  # one rank holds the whole model
    assert (halved.engine, halved.reference, halved.cache) == (found.engine / 2, 0, 0.5 * GIB)
    assert not found.sleeps
    # 2 bytes a weight, 4 a gradient.
    assert found.trainer.gradients == 2 * found.trainer.weights
