"""Which answers are equal: the labelled pairs, and what their number cannot tell."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.grading.answers import KINDS, Expected, bare, equal, exact_match, settled
from megatron_mm.grading.keeper import Limits
from megatron_mm.grading.quantities import Tolerance
from megatron_mm.grading.rewards import RewardSpec, Submission

PAIRS = [
    json.loads(line) for line in (Path(__file__).with_name("pairs.jsonl")).read_text(encoding="utf-8").splitlines()
]
# Of issue and docs: what the set must hold, and how well the grader must agree with it.
MIN_PAIRS, MIN_UNEQUAL_SHARE, MIN_AGREEMENT, MAX_FALSE_PAY = 300, 0.4, 0.995, 0.003


def test_the_labelled_set_is_what_it_says() -> None:
    assert len(PAIRS) >= MIN_PAIRS
    assert sum(not pair["equal"] for pair in PAIRS) / len(PAIRS) >= MIN_UNEQUAL_SHARE
    keys = [(pair["answer"], pair["reference"], pair["kind"], pair.get("question")) for pair in PAIRS]
    assert len(set(keys)) == len(keys)
    for pair in PAIRS:
        assert pair["kind"] in KINDS
        assert pair["source"].startswith("by hand")


def test_the_grader_agrees_with_the_labels() -> None:
    wrong = []
    for pair in PAIRS:
        expected = Expected(pair["reference"], pair.get("question", ""))
        if equal(pair["answer"], expected, pair["kind"]) != pair["equal"]:
            wrong.append(pair)
            print("disagrees:", json.dumps(pair, ensure_ascii=False))
    assert 1 - len(wrong) / len(PAIRS) >= MIN_AGREEMENT
    assert sum(not pair["equal"] for pair in wrong) / sum(not pair["equal"] for pair in PAIRS) <= MAX_FALSE_PAY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["7", "B", r"\frac{1}{2}", "12 cm", "(1,2)", "a grey wolf", "x>3"])
def test_what_is_equal_to_the_letter_is_right(kind: str, text: str) -> None:
    if kind == "number" and text in ("B", "(1,2)", "a grey wolf", "x>3"):
        assert not equal(text, Expected(text), kind)
    else:
        assert equal(text, Expected(text), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_never_right(kind: str) -> None:
    assert not equal("", Expected(""), kind)
    assert not equal(" \n", Expected("7"), kind)


def test_exact_match_minds_only_white_space() -> None:
    assert exact_match(" 7 3\n", "7  3")
    assert not exact_match("73", "7 3")


@pytest.mark.parametrize(
    ("answer", "reference", "tolerance", "is_equal"),
    [
        ("22.6", "22.62", Tolerance(), False),
        ("22.6", "22.62", Tolerance(relative=1e-3), True),
        ("22.6", "22.62", Tolerance(absolute=0.02), True),
        ("22.6", "22.62", Tolerance(absolute=0.01), False),
        ("2.26 cm", "0.02262 m", Tolerance(relative=1e-3), True),
        # The reference's unit is the tolerance's.
        ("2.26 cm", "0.02262 m", Tolerance(absolute=0.02), True),
        ("0.02262 m", "2.26 cm", Tolerance(absolute=0.001), False),
        ("0.3333333", "1/3", Tolerance(), True),
        ("0.333333", "1/3", Tolerance(), False),
        ("1234567.0", "1234568", Tolerance(), False),
        # Counts are exact, whatever is allowed.
        ("2023", "2024", Tolerance(relative=0.01), False),
        ("1/3", "1/4", Tolerance(absolute=1.0), False),
    ],
)
@pytest.mark.parametrize("kind", ["number", "auto"])
def test_tolerance(answer: str, reference: str, tolerance: Tolerance, is_equal: bool, kind: str) -> None:
    assert equal(answer, Expected(reference, tolerance=tolerance), kind) == is_equal


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer> $7$ </answer>", "7"),
        (r"$\boxed{7}$.", "7"),
        (r"**The answer is \(7\)**", "7"),
        ("Final Answer: 7", "7"),
        ("$3$ and $4$", "$3$ and $4$"),
        (r"\boxed{\text{B}}", "B"),
        ("$" * 40, "$" * 40),
        ("...", "..."),
        (r"So, $x = \boxed{7}$.", "7"),
        ("**Answer:** 7", "7"),
        ("**Answer**: **7**", "7"),
        ("**Final Answer:** $7$", "7"),
        ("**The answer is** 7.", "7"),
        ("**Answer: 7**", "7"),
        ("The correct option is **B**.", "B"),
        ("Therefore, the correct choice is: (B).", "(B)"),
        (r"$\$7$", r"\$7"),
        (r"\boxed{7", r"\boxed{7"),
    ],
)
def test_wrappings_come_off(text: str, inside: str) -> None:
    assert bare(text) == inside


STEPS = "We have $a=3$ and $b=4$,\nso $c=\\sqrt{9+16}=5$.\n\n"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (STEPS + r"$$\boxed{5}$$", "5", "3"),
        (STEPS * 50 + r"Therefore, the answer is \boxed{5}.", "5", "4"),
        (r"So, $c = \boxed{5}$ cm.", "5 cm", "6 cm"),
        (r"So the answer is \boxed{B}.", "B", "A"),
        ("**Answer:** B", "B", "A"),
        ("**Final Answer:** 14", "14", "4"),
        ("The correct option is **B**.", "B", "A"),
    ],
)
def test_what_stands_around_an_answer_does_not_count(text: str, right: str, wrong: str) -> None:
    spec = RewardSpec(format="think")
    submission = Submission(f"<think>\na\n</think>\n\n{text}", right)
    format_right, answer = spec.answer_of(submission)
    assert format_right
    assert answer is not None
    assert len(answer) < Limits().answer_chars
    assert spec.judge()(answer, right, "")
    assert not spec.judge()(answer, wrong, "")


@pytest.mark.parametrize(
    ("question", "reference", "right", "wrong"),
    [
        ("Which?\nA) red\nB) blue", "blue", ["B", "b)", "blue"], ["A", "red", "green"]),
        ("Which? (A) red (B) dark blue (C) blue", "C", ["blue", "C. blue"], ["dark blue", "B", "C. red"]),
        # Not options: letters that leave some out.
        ("Points\nA. 3\nC. 4", "4", ["4"], ["C"]),
    ],
)
def test_options_come_from_the_question(question: str, reference: str, right: list[str], wrong: list[str]) -> None:
    assert [answer for answer in right if not equal(answer, Expected(reference, question))] == []
    assert [answer for answer in wrong if equal(answer, Expected(reference, question))] == []


@pytest.mark.parametrize(
    ("answer", "reference", "is_equal"),
    [
        ("3m", "3 m", True),  # stuck together it is a variable or a unit, and the other side says which
        ("3m", "3", False),
        ("5 mm", "5 m", False),
        ("2 squared meters", "2 m^2", False),  # nobody writes that
        ("2 meters squared", "2 m^2", True),
        ("1/0", "1/0 m", False),
        ("1e400", "1e401", False),
    ],
)
def test_units(answer: str, reference: str, is_equal: bool) -> None:
    assert equal(answer, Expected(reference), "number") == is_equal


@given(st.integers(0, 120), st.integers(0, 120), st.sampled_from(sorted(KINDS)), st.sampled_from(["{}", " {} "]))
def test_what_is_settled_at_once_is_what_the_comparison_says(one: int, other: int, kind: str, form: str) -> None:
    for question in ("How many?", "Which?\nA. 7\nB. 8"):
        expected = Expected(str(other), question)
        said = settled(form.format(one), expected, kind)
        assert said in (None, equal(form.format(one), expected, kind))
        if kind == "auto" and question == "How many?":
            assert said is not None


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("7.0", "7"), ("7", "7.0"), ("-7", "7"), ("07", "7"), ("7" * 19, "7"), ("\N{ARABIC-INDIC DIGIT SEVEN}", "7")],
)
def test_what_is_no_plain_integer_is_not_settled(answer: str, reference: str) -> None:
    assert settled(answer, Expected(reference)) is None
