"""Checkpoints go from one platform to another and back to the bit, and a run that was cut off goes on."""

import shutil
from pathlib import Path

import pytest

from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.checkpoint import paths, store
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.loop import train
from tests.checkpoints import assert_same, content
from tests.gpu.conftest import Measured
from tests.ranks import run_on_ranks
from tests.runs import metrics
from tests.tiny import digits_config

PLATFORMS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 4
# Atomic additions in another order, in bf16. To be set when it is first measured; the CPU's sums are always the same.
RESUMED_TOLERANCE = {"cpu": 0.0, "cuda": 0.02}


def _config(platform: str, digits: Path, run_dir: Path) -> RunConfig:
    # A head of 64 for Transformer Engine's kernels.
    return digits_config(
        digits,
        run_dir,
        platform=platform,
        model__language__head_dim=64,
        precision="bf16",
        train__steps=STEPS,
        train__log_every=1,
        checkpoint__save_every=STEPS // 2,
        checkpoint__keep_last=2,
    )


def _rewritten(config: RunConfig, source: Path) -> None:
    """Read the newest checkpoint of a run into model and optimizer, and write what they then hold to config.run_dir."""
    assert config.data.path is not None
    platform, tokenizer = get_platform(config.platform), PreparedData(config.data.path).tokenizer()
    with state.process_group(platform), state.model_parallel(config.parallel, config.seed) as groups:
        trainee = build_trainee(config, build_model(config, platform, groups, tokenizer.control(IMAGE)), groups)
        checkpoint = paths.newest(source)
        assert checkpoint is not None
        progress = store.resume(checkpoint, trainee.chunks, trainee.optimizer)
        config.run_dir.mkdir()
        step = progress.pop("step")
        store.write(config.run_dir, step, store.content_of(step, trainee.chunks, trainee.optimizer, progress))


def _on(platform: str, function: object, *arguments: object) -> None:
    run_on_ranks(function, 1, *arguments, hides_gpus=platform == "cpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("other", PLATFORMS)
def test_a_checkpoint_of_a_cpu_goes_to_another_platform_and_back(digits: Path, tmp_path: Path, other: str) -> None:
    run, there, back = tmp_path / "run", tmp_path / "there", tmp_path / "back"
    _on("cpu", train, _config("cpu", digits, run))
    _on(other, _rewritten, _config(other, digits, there), run)
    _on("cpu", _rewritten, _config("cpu", digits, back), there)
    expected = content(run)
    assert_same(expected, content(there))
    assert_same(expected, content(back))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_run_that_was_cut_off_goes_on(digits: Path, tmp_path: Path, platform: str, measured: Measured) -> None:
    whole, cut = _config(platform, digits, tmp_path / "whole"), _config(platform, digits, tmp_path / "cut")
    _on(platform, train, whole)
    shutil.copytree(whole.run_dir, cut.run_dir)
    shutil.rmtree(paths.step_directory(cut.run_dir, STEPS))
    paths.pointer(cut.run_dir).write_text(paths.step_directory(cut.run_dir, STEPS // 2).name, encoding="utf-8")
    _on(platform, train, cut)
    expected, resumed = metrics(whole.run_dir), metrics(cut.run_dir)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected]
    for name in ("loss", "grad_norm"):
        differences = [abs(line[name] - other[name]) for line, other in zip(resumed, expected, strict=True)]
        measured(f"largest difference of {name} after resuming", max(differences), RESUMED_TOLERANCE[platform])
