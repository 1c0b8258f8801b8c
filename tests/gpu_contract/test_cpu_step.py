"""Training on the CPU where a GPU machine's packages are installed: its GPUs are hidden, or it is a login node."""

from pathlib import Path

import pytest

from tests.runs import metrics, train

pytestmark = pytest.mark.gpu_contract


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps(precision: str, digits: Path, tmp_path: Path) -> None:
    train(
        "mini/stage3",
        digits,
        tmp_path / "run",
        1,
        "platform=cpu",
        "model.language.vocab_size=384",
        "train.steps=2",
        f"precision={precision}",
    )
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"] > 0 for line in lines)
