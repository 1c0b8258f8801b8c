"""Whole kinds of answers: ten variants or more of each, right ones and wrong ones near them, and other inputs."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.grading.answers import Expected, equal

ROWS = [json.loads(line) for line in Path(__file__).with_name("kinds.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = sorted({row["kind"] for row in ROWS})
MIN_VARIANTS = 10


@pytest.mark.parametrize("kind", KINDS)
def test_variants(kind: str) -> None:
    rows = [row for row in ROWS if row["kind"] == kind]
    assert len(rows) >= MIN_VARIANTS
    assert len(Counter(row["equal"] for row in rows)) == 2, "a kind needs right and wrong variants"
    wrong = [
        row for row in rows if equal(row["answer"], Expected(row["reference"], row.get("question", ""))) != row["equal"]
    ]
    assert wrong == []


@settings(deadline=None)
# Not e: 2e+1 is a number.
@given(st.sampled_from("abcdfghjkmnpqrstuvwxyz"), st.integers(2, 9))
def test_a_capital_is_another_variable(letter: str, factor: int) -> None:
    one, other = rf"{factor}{letter}+1", rf"{factor}{letter.upper()}+1"
    assert equal(rf"1+{factor}{letter}", Expected(one))
    assert not equal(other, Expected(one))


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(2, 9))
def test_white_space_makes_a_mixed_number(whole: int, over: int, under: int) -> None:
    mixed, glued = f"{whole} {over}/{under}", f"{whole}{over}/{under}"
    assert equal(rf"\frac{{{whole * under + over}}}{{{under}}}", Expected(mixed))
    assert not equal(glued, Expected(mixed))
    assert not equal(mixed, Expected(glued))


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(20, 300))
def test_small_values_differ(base: int, power: int) -> None:
    value = rf"\frac{{1}}{{{base}^{{{power}}}}}"
    assert equal(f"{base}^{{-{power}}}", Expected(value))
    assert not equal(f"{base}^{{-{power + 1}}}", Expected(value))
    assert not equal("0", Expected(value))


@settings(deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50))
def test_an_equation_says_a_value_only_if_it_is_true(value: int, other: int) -> None:
    assert equal(f"{other}={value}", Expected(str(value))) == (value == other)
    assert not equal(f"2x={value}", Expected(str(value)))
    assert not equal(f"x^2={value}", Expected(str(value)))
    assert equal(f"x={value}", Expected(str(value), "Find x."))
    assert not equal(f"y={value}", Expected(str(value), "Find x."))


@settings(deadline=None)
@given(st.from_regex(r"[A-Z]{1,2}[0-9]{1,3}", fullmatch=True))
def test_codes_are_no_products(code: str) -> None:
    letters, digits = code.rstrip("0123456789"), code.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert equal(code.lower(), Expected(code, "Which seat is it?"))
    assert not equal(digits + letters, Expected(code, "Which seat is it?"))
    assert not equal(digits + letters, Expected(code))
