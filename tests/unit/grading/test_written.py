"""What is compared as it is written, and what stays to be computed."""

import time

import pytest

from megatron_mm.grading.written import equal_as_written


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("3 cm - 5 cm", "3-5 cm"),
        ("3-5", "3-5 cm"),
        ("-5 to 10", "-5-10"),
        ("10-20 m s^{-2}", "10 to 20 m/s^2"),
        (r"20^\circ-30^\circ", "20-30"),
        (r"\$10-\$20", "$10-20"),
        ("$10$-$20$", "10-20"),
        ("1990s-2000s", "1990s - 2000s"),
        ("quotient 7, remainder 3", "7 R 3"),
        ("4 to 3", "4:3"),
        ("2:4:6", "1:2:3"),
        ("8 am-5 pm", "8 am - 5 pm"),
    ],
)
def test_another_way_to_write_the_same(answer: str, reference: str) -> None:
    assert equal_as_written(answer, reference) is True
    assert equal_as_written(reference, answer) is True


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("3-5 cm", "3-5 m"),
        ("$10-$20", "10-20 euros"),
        ("10-20", "10-20-30"),
        ("-10-10", "10-10"),
        ("10-20 m s^{-2}", "20-30 m s^{-2}"),
        ("1990s-2000s", "1980s-1990s"),
        ("8-9 am", "8-9 pm"),
        ("8-9 am", "8-9"),
        ("555-0123", "555-123"),
        ("3-5", "(3,5)"),
        ("6-5", "1"),
        ("3 R 7", "7 R 3"),
        ("2:4:3", "2:3:4"),
    ],
)
def test_what_differs_as_it_is_written(answer: str, reference: str) -> None:
    assert equal_as_written(answer, reference) is False
    assert equal_as_written(reference, answer) is False


def test_only_the_reference_needs_a_base() -> None:
    assert equal_as_written("1011", "1011_2") is True
    assert equal_as_written("3_7", "3") is False


@pytest.mark.parametrize(
    "text",
    [
        "-5", "3/4", "6:8", "1.5", "x-3", "2x-3", "3-5m", "3 m - 5", "5-2i", r"5-2\sqrt{3}", r"1-\frac{1}{3}",
        "2^{10}-1", "10^{-3}", "1e-5", "3+5", "x_1", "A_1", "A_{16}", r"\log_2 8", "AB", "A-C", "", "-", "--", "to",
    ],
)  # fmt: skip
def test_what_is_computed(text: str) -> None:
    assert equal_as_written(text, "7") is None


@pytest.mark.parametrize(
    "unit", ["1", " ", "-", "1-", "1 - ", "1/", "1.", "1:", "1:00", "A1", "A", "A(", "1_", "to ", "$", "1 m", "1,000"]
)
def test_a_hundred_thousand_characters_take_no_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for one in (text, f"1{text}", f"1-{text}", f"{text}-1"):
        started = time.process_time()
        equal_as_written(one, "10-20")
        assert time.process_time() - started < 5, one[:10]
