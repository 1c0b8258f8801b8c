"""Validation and exports of a run that goes on: right, and without a trace in what is trained."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mm.checkpoint import paths
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.convert.exporting import export_run
from megatron_mm.convert.verify import verify
from megatron_mm.train.loop import train
from tests.checkpoints import assert_same, content
from tests.ranks import run_on_ranks
from tests.runs import metrics
from tests.tiny import digits_config

LOOKS = {"train__validate_every": 2, "train__validate_batches": 3, "checkpoint__export_every": 2}


def _config(digits: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    values = {
        "data__blend": "{digits/easy/thinking: 1, digits/hard/non_thinking: 3}",
        "train__log_every": 4,
        "checkpoint__save_every": 2,
        "checkpoint__keep_last": 9,
    }
    return digits_config(digits, run_dir, **{**values, **overrides})


def test_validation_and_exports_leave_no_trace(digits: Path, tmp_path: Path) -> None:
    plain, looking = tmp_path / "plain", tmp_path / "looking"
    run_on_ranks(train, 2, _config(digits, plain, parallel__tensor=2))
    run_on_ranks(train, 2, _config(digits, looking, parallel__tensor=2, **LOOKS))
    assert_same(content(plain), content(looking))
    # The same held-out batches, whoever works on them.
    alone = tmp_path / "alone"
    run_on_ranks(train, 1, _config(digits, alone, **LOOKS))
    lines, expected = metrics(looking), metrics(alone)
    assert [line["step"] for line in lines] == [2, 4]
    for line, other in zip(lines, expected, strict=True):
        losses = {name: value for name, value in line.items() if name.startswith("validation/")}
        names = ["loss", "loss/digits/easy/thinking", "loss/digits/hard/non_thinking"]
        assert list(losses) == [f"validation/{name}" for name in names]
        assert losses == pytest.approx({name: other[name] for name in losses}, abs=1e-4)
        whole, *parts = losses.values()
        assert min(parts) < whole < max(parts)
    # It is held out: what is learned shows there too, and is another loss than the training batch's.
    assert lines[1]["validation/loss"] < lines[0]["validation/loss"]
    assert lines[1]["validation/loss"] != lines[1]["loss"]
    assert metrics(plain)[-1].keys() == {name for name in lines[1] if not name.startswith("validation/")}

    exported = looking / "exports" / "step_00000002"
    run_on_ranks(export_run, 1, paths.step_directory(looking, 2), tmp_path / "converted")
    report = run_on_ranks(verify, 1, exported, tmp_path / "converted")[0]
    assert not report.differences
    assert not (looking / "exports" / "step_00000004").exists()  # the end of a run is its checkpoint


def _refusal(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        train(config)
    return str(error.value)


def test_validation_needs_held_out_samples_of_the_blend(digits: Path, tmp_path: Path) -> None:
    ((message),) = run_on_ranks(
        _refusal, 1, _config(digits, tmp_path, data__blend="{digits-text/easy/thinking: 1}", **LOOKS)
    )
    assert "holds out no sample of data.blend's parts" in message
