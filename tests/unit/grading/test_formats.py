"""Which responses have a format, and what their answer is."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.chat.modes import TRIGGERS, Mode
from megatron_mm.grading.formats import FORMATS, last_box

# As recipes of Vision-R1 write the format down; slow, so it is only what ours is compared with.
_PATTERN = re.compile(
    r"\A\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>\s*\Z",
    re.DOTALL,
)
_PIECES = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "a", "7", "<", "think>", "Final Answer:", "**"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think><answer>7</answer>", "7"),
        ("<think> Okay. </think><answer> Final Answer:C </answer>", "C"),
        ("\n<think>\na\n</think>\n\n<answer>\n7\n</answer>\n", "7"),
        ("<think></think><answer>7</answer>", "7"),
        ("<think>a</think><answer>**Final Answer:** 7</answer>", "7"),
        ("<think>a</think><answer>final answer 7</answer>", "7"),
        ("<think>a</think><answer></answer>", ""),
        ("<think>a < b</think><answer>x<3</answer>", "x<3"),
        ("<think>a</think><answer>7</answer>.", None),
        ("So: <think>a</think><answer>7</answer>", None),
        ("<think>a</think> so <answer>7</answer>", None),
        ("<think>a</think><answer>7", None),
        ("<think>a</think>7", None),
        ("<answer>7</answer>", None),
        ("<think>a<answer>7</answer>", None),
        ("<answer>7</answer><think>a</think>", None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", None),
        ("<think>a</think><think>b</think><answer>7</answer>", None),
        ("<think><think>a</think></think><answer>7</answer>", None),
        ("<think>a</think><answer><answer>7</answer></answer>", None),
        ("<think>a <answer>6</answer></think><answer>7</answer>", None),
        ("<think>a</think><answer>7</think></answer>", None),
        ("<THINK>a</THINK><ANSWER>7</ANSWER>", None),
        ("", None),
        ("7", None),
    ],
)
def test_vision_r1(response: str, answer: str | None) -> None:
    assert FORMATS["vision_r1"].strict(response) == answer


@given(st.lists(st.sampled_from(_PIECES), max_size=14).map("".join))
def test_splitting_finds_what_the_pattern_finds(response: str) -> None:
    match = _PATTERN.match(response)
    assert (FORMATS["vision_r1"].strict(response) is None) == (match is None)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_without_tags_may_stand_inside(thought: str, answer: str) -> None:
    found = FORMATS["vision_r1"].strict(f"<think>{thought}</think><answer>{answer}</answer>")
    assert found is not None
    assert found in answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>6</answer> no: <answer> Final Answer: 7 </answer>", "7"),
        ("<think>a</think><answer>7</answer>.", "7"),
        ("<answer>7", None),
        ("7</answer>", None),
        ("7", None),
    ],
)
def test_vision_r1_kept_in_part(response: str, answer: str | None) -> None:
    assert FORMATS["vision_r1"].loose(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\n\n</think>\n\n7", "7"),
        ("<think>\nreason\n</think>\n\n7", "7"),
        ("<think>\nreason\n</think>7", "7"),
        ("<think>\nreason\n</think>\n\n<answer>7</answer>", "7"),
        ("<think>\nreason\n</think>\n\n", None),
        ("<think>\nreason, cut o", None),
        ("reason</think>7", None),
        ("7", None),
        ("Well, <think>\n\n</think>\n\n7", None),
        ("<think>a</think><think>b</think>7", None),
        ("<think>a<think>b</think>7", None),
        ("<think>a</think>7</think>8", None),
        ("<think>a</think>7<think>b", None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", None),
        (r"<think>a</think>Therefore, the answer is \boxed{7}.", "7"),
        (r"<think>\boxed{6}</think>7", "7"),
        (r"<think>a</think>First \boxed{6}, then $\fbox{7}$, done.", "7"),
        (r"<think>a</think><answer>So \boxed{7}.</answer>", "7"),
        # No box: it does not close, or nothing is in it.
        (r"<think>a</think>\boxed{7", r"\boxed{7"),
        (r"<think>a</think>7 \boxed{}", r"7 \boxed{}"),
    ],
)
def test_think(response: str, answer: str | None) -> None:
    assert FORMATS["think"].strict(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7", "7"),
        (r"So \boxed{7}.", "7"),
        (r"a</think>So \boxed{7}.", "7"),
        (r"<think>a</think><think>\boxed{7}", None),
        ("", None),
    ],
)
def test_think_kept_in_part(response: str, answer: str | None) -> None:
    assert FORMATS["think"].loose(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{6} or \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x^{2^{3}}} done", "x^{2^{3}}"),
        (r"\fbox {7}", "7"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"<think>\boxed{6}</think>\boxed{7}", "7"),
        (r"\boxed{7", None),
        (r"\boxed{6} \boxed{7", None),
        (r"\boxed 7", None),
        (r"<think>\boxed{7}", None),
        (r"<think>\boxed{7}</think>", None),
        (r"<think>\boxed{7}</think> seven", None),
        (r"<think>a</think><think>\boxed{7}", None),
        ("7", None),
        ("", None),
    ],
)
def test_boxed(response: str, answer: str | None) -> None:
    assert FORMATS["boxed"].strict(response) == answer


def test_think_boxed_asks_for_both() -> None:
    strict = FORMATS["think_boxed"].strict
    assert strict("<think>\na\n</think>\n\nSo \\boxed{7}.") == "7"
    assert strict("So \\boxed{7}.") is None
    assert strict("<think>\na\n</think>\n\nSo 7.") is None
    assert strict("<think>\n\\boxed{7}\n</think>\n\nSo 7.") is None


@given(st.text(alphabet="{}\\boxed", max_size=30))
def test_a_box_has_balanced_braces(text: str) -> None:
    inside = last_box(text)
    if inside is not None:
        plain = re.sub(r"\\.", "", inside)
        assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "<",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<think></think>",
        "{",
        "}",
        "\\",
        "\\boxed{",
        "**",
    ],
)
def test_a_million_characters_take_no_time(name: str, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    for response in (text, f"<think>{text}</think><answer>{text}</answer>", f"<think>\n\n</think>\n\n{text}"):
        started = time.process_time()
        FORMATS[name].strict(response)
        FORMATS[name].loose(response)
        # Tenths of a second; what backtracks takes minutes.
        assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("mode", "completion"),
    [(Mode.THINKING, "reason\n</think>\n\n7"), (Mode.NON_THINKING, "\n\n7"), (Mode.AUTO, "\n\n</think>\n\n7")],
)
def test_think_reads_what_follows_a_trigger(mode: Mode, completion: str) -> None:
    assert FORMATS["think"].strict(TRIGGERS[mode] + completion) == "7"
