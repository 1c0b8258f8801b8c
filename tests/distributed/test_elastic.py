"""A run that was cut off goes on in another layout as if it had been in it from the beginning."""

import shutil
from pathlib import Path

import numpy as np

from megatron_mm.checkpoint import paths
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.train.loop import train
from tests.ranks import run_on_ranks
from tests.runs import SHORT, metrics

# fp32 (of SHORT), since layouts agree to within rounding, which bf16 has much of.
STEPS = 100
LAYOUTS = {"DP 2": (2, ()), "PP 2": (2, ("parallel.pipeline=2",)), "DP 4": (4, ())}


def _config(digits: Path, run_dir: Path, *overrides: str) -> RunConfig:
    given = [f"data.path={digits}", f"run_dir={run_dir}", f"train.steps={STEPS}", "checkpoint.save_every=50"]
    return load_config("mini/stage3", overrides=[*SHORT, *given, *overrides])


def test_a_run_goes_on_in_another_layout(digits: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_on_ranks(train, 4, _config(digits, whole, "parallel.tensor=2"))
    expected = np.array([line["loss"] for line in metrics(whole)])
    # As if it had been killed between the middle and the end.
    first = shutil.copytree(whole, tmp_path / "first")
    shutil.rmtree(paths.step_directory(first, STEPS))
    paths.point_to(paths.step_directory(first, STEPS // 2))
    for name, (num_ranks, layout) in LAYOUTS.items():
        run_dir = shutil.copytree(first, tmp_path / name.replace(" ", "_"))
        run_on_ranks(train, num_ranks, _config(digits, run_dir, *layout))
        lines = metrics(run_dir)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        losses = np.array([line["loss"] for line in lines])
        assert (losses[:50] == expected[:50]).all()
        difference = np.abs(losses[50:] - expected[50:]).max()
        assert 0 < difference < 1e-4, name
    # It learns, or that losses agree would say little.
    assert expected[-10:].mean() < expected[:10].mean() - 0.5
