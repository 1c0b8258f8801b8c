"""A mode that is lost is said to be, once."""

from megatron_mm.rl.alarm import ModeAlarm


def _said(least_share: float, *think_rates: float) -> list[str]:
    said: list[str] = []
    alarm = ModeAlarm(least_share, said.append)
    for step, think_rate in enumerate(think_rates):
        alarm.look(step, think_rate, "held-out questions")
    return said


def test_a_mode_that_is_lost_is_named_once() -> None:
    assert _said(0.05, 0.5, 0.05, 0.95) == []
    (said,) = _said(0.05, 0.5, 0.04, 0.0)
    assert said.startswith("step 1: the thinking mode has collapsed: 4.0% of the held-out questions")
    (said,) = _said(0.05, 0.5, 0.99)
    assert said.startswith("step 1: the non-thinking mode")


def test_a_mode_that_comes_back_can_be_lost_again() -> None:
    assert len(_said(0.05, 0.5, 0.0, 0.5, 1.0)) == 2


def test_a_model_that_never_had_both_modes_has_lost_none() -> None:
    assert _said(0.05, 1.0, 1.0) == []
    assert _said(0.0, 0.5, 1.0) == []
