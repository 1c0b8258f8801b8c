# ruff: noqa: RUF001 - the characters are the matter
"""Which characters are read as plainer ones."""

import time

import pytest

from megatron_mm.grading.characters import plain_characters


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("（Ｂ）　５％", "(B) 5%"),
        ("x²", "x^2"),
        ("10⁻¹²", "10^{-12}"),
        ("H₂SO₄", "H_2SO_4"),
        ("a₁₀²", "a_{10}^2"),
        ("3–5 — −7", "3-5 - -7"),
        ("∠A = 20 ℃", r"\angle A = 20 °C"),
        ("½ 3⅛ é 七 \U0001f600", "1/2 3 1/8 é 七 \U0001f600"),
    ],
)
def test_plain_characters(text: str, plain: str) -> None:
    assert plain_characters(text) == plain


@pytest.mark.parametrize("unit", ["²", "²₂", "Ｂ", "a", "\ud800"])
def test_a_million_characters_take_no_time(unit: str) -> None:
    started = time.process_time()
    plain_characters(unit * (1_000_000 // len(unit)))
    assert time.process_time() - started < 5
