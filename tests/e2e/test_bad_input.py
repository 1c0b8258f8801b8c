"""Bad input ends with one clear message and exit code 2, whichever layer finds it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLEND = "data.blend={digits/easy/thinking: 1}"
SHORT = ["train.steps=2", "train.global_batch=4", "train.micro_batch=2", "optim.warmup_steps=0", "precision=fp32"]


def _megatron_mm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_mm.cli", *arguments], capture_output=True, text=True)


def _assert_refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert result.returncode == 2, result.stderr[-3000:]
    told = [line for line in result.stderr.splitlines() if line.startswith("megatron-mm: ")]
    assert len([line for line in told if "left out" not in line]) == 1, result.stderr
    for part in expected:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_keys_and_values_out_of_range() -> None:
    result = _megatron_mm("train", "mini/stage1", "train.stpes=3", "optim.beta1=2", "--nproc", "2")
    _assert_refused(result, "nearest valid one is train.steps", "optim.beta1: input should be less than 1 (seen: 2)")


def test_overrides_count_on_either_side_of_an_option_and_unknown_options_are_refused() -> None:
    result = _megatron_mm("train", "mini/stage1", "train.stpes=3", "--nproc", "2", "optim.beta1=2")
    _assert_refused(result, "nearest valid one is train.steps", "optim.beta1: input should be less than 1 (seen: 2)")
    unknown = _megatron_mm("train", "mini/stage1", "--nprocs", "2")
    assert unknown.returncode == 2
    assert "unrecognized arguments: --nprocs 2" in unknown.stderr


def test_a_plan_of_reinforcement_learning() -> None:
    result = _megatron_mm("plan", "mini/bpo", "--gpus", "8", "--gpu", "h100", "--host-memory", "40")
    _assert_refused(result, "mini/bpo does not fit the host: a node needs", "more than the 40.0 that it has")


def test_unknown_rewards(digits: Path) -> None:
    names = ["rl.reward.name=accuracy", "rl.reward.format=boxes", "rl.reward.kind=numeral"]
    result = _megatron_mm("rl", "mini/bpo", f"data.path={digits}", "init_from=null", *names, "--nproc", "2")
    _assert_refused(result, "no reward 'accuracy'", "no format 'boxes'", "no kind of answer 'numeral'")


def test_a_layout_that_does_not_divide(digits: Path) -> None:
    layout = ["parallel.tensor=3", "train.global_batch=7"]
    result = _megatron_mm("train", "mini/stage3", f"data.path={digits}", "init_from=null", *layout, "--nproc", "3")
    _assert_refused(
        result,
        "parallel.tensor=3 does not divide model.language.num_heads=4",
        "train.global_batch=7 is not a multiple of train.micro_batch=32",
    )


def test_fp8_without_transformer_engine(digits: Path) -> None:
    arguments = ("train", "mini/stage3", f"data.path={digits}", "init_from=null", "fp8.recipe=delayed")
    _assert_refused(_megatron_mm(*arguments, "--nproc", "2"), "fp8.recipe=delayed needs Transformer Engine and a GPU")
    _assert_refused(_megatron_mm(*arguments, "precision=fp32"), "fp8.recipe=delayed needs precision=bf16, not fp32")


def test_a_missing_checkpoint(digits: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    result = _megatron_mm("train", "mini/stage1", f"data.path={digits}", f"init_from={missing}", "--nproc", "2")
    _assert_refused(result, f"no checkpoint in {missing}; give a run directory")
    _assert_refused(_megatron_mm("export", str(missing), str(tmp_path / "out")), f"no checkpoint in {missing}")


def test_missing_data(tmp_path: Path) -> None:
    result = _megatron_mm("train", "mini/language", f"data.path={tmp_path}", "--nproc", "2")
    _assert_refused(
        result, f"no prepared data in {tmp_path} (index.arrow is missing); make it with `megatron-mm data prepare`"
    )


@pytest.mark.parametrize("arguments", [("data.num_workers=1",), ("--nproc", "2")], ids=["in a worker", "on 2 ranks"])
def test_damaged_data_ends_the_run(digits: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for shard in data.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for position in range(0, len(content), 512):
            if content[position : position + 4] == b"\x89PNG":
                content[position : position + 4] = b"none"
        shard.write_bytes(content)
    run = [f"data.path={data}", f"run_dir={tmp_path / 'run'}", "init_from=null", BLEND, *SHORT, "parallel.tensor=1"]
    result = _megatron_mm("train", "mini/stage3", *run, *arguments)
    _assert_refused(result, "samples cannot be used, more than data.max_broken=0.001", "digits-easy.tar at byte")


def test_a_run_goes_on_with_its_own_samples_only(digits: Path, tmp_path: Path) -> None:
    run = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}", "init_from=null", *SHORT, "parallel.tensor=1"]
    begun = _megatron_mm("train", "mini/stage3", *run, BLEND)
    assert begun.returncode == 0, begun.stderr
    others = "data.blend={digits/easy/thinking: 1, digits/hard/thinking: 1}"
    result = _megatron_mm("train", "mini/stage3", *run, others, "train.steps=4")
    _assert_refused(result, "was begun with other data, or with another blend, seed, global batch")
    assert _megatron_mm("train", "mini/stage3", *run, BLEND, "train.steps=4").returncode == 0
    # It is done now. Started once more it does nothing, and that is no answer to other settings.
    done = [*run, BLEND, "train.steps=4"]
    assert _megatron_mm("train", "mini/stage3", *done, "telemetry.tensorboard=false").returncode == 0
    result = _megatron_mm("train", "mini/stage3", *done, "optim.lr=5e-4")
    _assert_refused(result, "is done after 4 steps, and settings are others now: optim.lr was", "another run_dir")
    assert "lr: 0.0005" not in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_a_model_directory_that_is_none(digits: Path, tmp_path: Path) -> None:
    result = _megatron_mm("evaluate", str(tmp_path), str(digits), str(tmp_path / "report.json"))
    _assert_refused(result, "config.json is missing")


def test_the_doctor_finds_this_machine_whole() -> None:
    result = _megatron_mm("doctor")
    assert result.returncode == 0, result.stdout
    assert "megatron-core 0.16.1" in result.stdout
