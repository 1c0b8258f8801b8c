"""Which responses a step learns from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_mm.config.load import load_config
from megatron_mm.grading.rewards import Grade
from megatron_mm.parallel import state
from megatron_mm.rl.alarm import ModeAlarm
from megatron_mm.rl.exchange import Exchange
from megatron_mm.rl.job import make_algorithm
from megatron_mm.rl.practice import Practice
from megatron_mm.rl.report import ROLLOUTS, Report
from megatron_mm.train.run import Place

PROMPTS = 3


class _Rollout:
    def __init__(self, row: int, reward: float):
        self.row, self.grade = row, Grade(reward)


class _World:
    """Questions, sampler, weight sync, room and watchdog of a practice.

    Step s of the plan has questions 10 s, 10 s + 1, ...
    """

    def __init__(self, with_signal: set[int]):
        self._with_signal, self.rests, self.num_asked = with_signal, 0, 0
        self.events: list[str] = []

    def __call__(self, *, compare_all: bool) -> Exchange:
        self.events.append("sync, all compared" if compare_all else "sync")
        return Exchange(1, 1.0, 0.0)

    @contextmanager
    def away(self, timed: Any) -> Iterator[None]:
        with timed():
            self.events.append("trainer leaves")
        yield
        with timed():
            self.events.append("trainer returns")

    def rows(self, data_step: int) -> list[int]:
        return [10 * data_step + number for number in range(PROMPTS)]

    def draw(self, rows: list[int], modes: Any, *_: Any, **__: Any) -> list[list[_Rollout]]:
        self.events.append("draw")
        return [
            [_Rollout(row, float(place == 0 and row in self._with_signal)) for place in range(len(modes))]
            for row in rows
        ]

    def state(self) -> dict[str, int]:
        return {"asked": self.num_asked}

    def load(self, state: dict[str, int]) -> None:
        self.num_asked = state["asked"]

    def rest(self, *, keeps_weights: bool) -> None:
        self.events.append("rest with weights" if keeps_weights else "rest")
        self.rests += 1

    def at(self, step: int, what: str) -> None:
        """Of the watchdog."""


def _practice(max_draws: int, world: Any, alarm: Any = None, warn: Any = None, run_dir: Any = "unused") -> Practice:
    config = load_config("mini/bpo", overrides=[f"rl.max_draws={max_draws}", f"run_dir={run_dir}"])
    assert config.rl is not None
    nothing: Any = None
    return Practice(
        config=config,
        rl=config.rl,
        platform=nothing,
        trainee=nothing,
        offload=world,
        questions=world,
        sampler=world,
        exchange=world,
        algorithm=make_algorithm(config.rl),
        reference=None,
        guard=nothing,
        watchdog=world,
        report=Report(),
        held_out=None,
        alarm=alarm,
        pad=0,
        warn=warn,
    )


def _drawn(max_draws: int, with_signal: set[int]) -> tuple[list[int], int, dict[str, float]]:
    """Questions that are learned from, steps of the plan that were used, metrics."""
    world = _World(with_signal)
    practice = _practice(max_draws, world)
    groups, used = practice._draw(Place(step=0, data_step=2), practice.rl.stage(0))
    assert world.rests == 1
    assert world.events.count("sync, all compared") == world.events.count("rest") == 1
    return [cast(_Rollout, group[0]).row for group in groups], used, practice.report.metrics()


def test_the_trainer_makes_room_once_a_step_and_weights_are_synced_when_they_changed() -> None:
    world = _World({1})
    practice = _practice(1, world)
    place = Place(step=0, data_step=0)

    def events_of(keeps_weights: bool) -> list[str]:
        world.events.clear()
        with practice._drawing(0, "rollout", keeps_weights=keeps_weights):
            world.draw([], ())
        assert (world.events[0], world.events[-1]) == ("trainer leaves", "trainer returns")
        return world.events[1:-1]

    practice.begin(place)
    assert events_of(False) == ["sync, all compared", "draw", "rest"]
    practice.is_stale = True  # after an update
    assert events_of(True) == ["sync", "draw", "rest with weights"]  # held-out questions
    assert events_of(False) == ["draw", "rest"]
    practice.begin(place)  # after a roll-back
    assert events_of(False) == ["sync, all compared", "draw", "rest"]
    assert {"time/offload", "time/exchange", "time/rollout", "exchange/bytes"} <= practice.report.metrics().keys()


def test_the_alarm_goes_on_with_the_run() -> None:
    said: list[str] = []
    before, after = (_practice(1, _World(set()), ModeAlarm(0.05, said.append)) for _ in range(2))
    before.alarm.look(4, 0.5, "held-out questions")
    after.load(before.state())
    after.alarm.look(8, 0.0, "held-out questions")
    assert len(said) == 1
    before.load(after.state())
    before.alarm.look(12, 0.0, "held-out questions")
    assert len(said) == 1


def test_questions_are_counted_on() -> None:
    before, after = _World(set()), _World(set())
    before.num_asked = 7
    alarm = ModeAlarm(0.05, print)
    _practice(1, after, alarm).load(_practice(1, before, alarm).state())
    assert after.num_asked == 7


def test_responses_that_cannot_be_kept_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(state, "writes", lambda: True)
    practice = _practice(1, _World(set()), warn=said.append, run_dir=tmp_path)
    (tmp_path / ROLLOUTS).write_text("a file where a directory should be", encoding="utf-8")
    practice._keep(3, [], [])
    assert "the responses of step 3 are not kept" in said[0]
    (tmp_path / ROLLOUTS).unlink()
    practice._keep(4, [], [])
    assert len(said) == 1
    assert [file.name for file in (tmp_path / ROLLOUTS).iterdir()] == ["step_00000004.jsonl"]


def test_one_draw_keeps_what_there_is() -> None:
    rows, used, metrics = _drawn(1, {21})
    assert (rows, used) == ([20, 21, 22], 1)
    assert metrics["flat_groups"] == pytest.approx(2 / 3)


def test_questions_that_tell_nothing_are_passed_over_and_others_drawn() -> None:
    rows, used, metrics = _drawn(5, {21, 30, 32, 40})
    assert (rows, used) == ([21, 30, 32], 2)
    assert metrics["flat_groups"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    # No more than a batch: the third draw brings two, one of which is needed.
    assert _drawn(5, {21, 30, 41, 42})[:2] == ([21, 30, 41], 3)


def test_there_is_an_end_to_drawing() -> None:
    assert _drawn(2, {31})[:2] == ([31], 2)
    assert _drawn(2, set())[:2] == ([30, 31, 32], 2)


def test_figures_are_means_over_the_steps_but_for_the_largest() -> None:
    report = Report()
    for mean, largest in ((0.1, 0.2), (0.3, 0.9), (0.2, 0.4)):
        report.note(**{"logprob_difference/mean": mean, "logprob_difference/max": largest})
    metrics = report.metrics()
    assert metrics["logprob_difference/mean"] == pytest.approx(0.2)
    assert metrics["logprob_difference/max"] == 0.9
