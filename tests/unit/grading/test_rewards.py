"""What responses are paid, and plug-ins."""

from pathlib import Path

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RewardConfig
from megatron_mm.grading.quantities import Tolerance
from megatron_mm.grading.rewards import RewardSpec, Submission, load_plugin
from tests.graders import install_plugin


@pytest.mark.parametrize(
    ("response", "finished", "format_right", "answer"),
    [
        ("<think>a</think><answer>7</answer>", True, True, "7"),
        ("<think>a</think><answer>7</answer>", False, False, "7"),
        ("<answer>7</answer>", True, False, "7"),
        ("7", True, False, None),
    ],
)
def test_hfrrf_pays_no_answer_without_its_format(
    response: str, finished: bool, format_right: bool, answer: str | None
) -> None:
    submission = Submission(response, "7", finished=finished)
    assert RewardSpec(name="weighted").answer_of(submission) == (format_right, answer)
    assert RewardSpec(name="hfrrf").answer_of(submission) == (format_right, answer if format_right else None)


def test_rewards_of_right_and_wrong() -> None:
    cases = [(False, False), (False, True), (True, False), (True, True)]
    assert [RewardSpec(name="hfrrf").reward(*case) for case in cases] == [0, 0, 0, 1]
    assert [RewardSpec(name="weighted").reward(*case) for case in cases] == [0, 0.5, 0.5, 1]
    bee = RewardSpec(name="weighted", format="boxed", format_weight=0.2, accuracy_weight=0.8)
    assert [bee.reward(*case) for case in cases] == [0, 0.8, 0.2, 1]


def test_a_run_says_how_its_responses_are_paid() -> None:
    told = {"name": "weighted", "format": "boxed", "kind": "number", "format_weight": 0.2, "accuracy_weight": 0.8}
    config = RewardConfig(**told, relative_tolerance=1e-2, absolute_tolerance=0.5)
    assert RewardSpec.of_config(config) == RewardSpec(**told, tolerance=Tolerance(1e-2, 0.5))
    assert RewardSpec.of_config(RewardConfig()) == RewardSpec(format="think")
    spec = RewardSpec.of_config(RewardConfig(relative_tolerance=1e-2))
    assert [spec.judge()(answer, "2.00", "") for answer in ("2.02", "2.03")] == [1, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "hfrf"}, ["reward 'hfrf'", "hfrrf, weighted", "megatron_mm.rewards"]),
        ({"format": "r1"}, ["format 'r1'", "boxed, think, think_boxed, vision_r1"]),
        ({"kind": "letters"}, ["kind of answer 'letters'", "auto, choice, exact, math, number, text"]),
    ],
)
def test_unknown_names_are_told(fields: dict[str, str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        RewardSpec(**fields)  # pyright: ignore[reportArgumentType]
    assert all(word in str(error.value) for word in words)


def test_a_plugin_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch, "def pay(response, reference, question):\n    return len(response) / 2\n")
    spec = RewardSpec(name="planted")
    assert spec.is_plugin
    assert spec.judge()("abc", "", "") == 1.5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", ["reward 'planted' (planted_reward:pay)", "no_such_module"]),
        ("1 / 0", ["ZeroDivisionError"]),
        ("def other():\n    pass", ["pay"]),
        ("pay = 3", ["of type int", "function of (response, reference, question)"]),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: list[str]
) -> None:
    install_plugin(tmp_path, monkeypatch, source)
    with pytest.raises(InputError) as error:
        load_plugin("planted")
    assert all(word in str(error.value) for word in words)
