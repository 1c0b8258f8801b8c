"""Steps that go wrong, one planted fault each: what is skipped, what is rolled back, what a run says when it ends."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_mm.checkpoint import paths
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel import state
from megatron_mm.train.learning import Learning
from megatron_mm.train.loop import train
from megatron_mm.train.run import Place
from megatron_mm.train.step import CrossEntropy, StepResult
from tests.checkpoints import content
from tests.ranks import run_on_ranks
from tests.runs import metrics
from tests.tiny import digits_config


def _config(digits: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    values = {
        "train__steps": 12,
        "train__log_every": 1,
        "checkpoint__save_every": 4,
        "checkpoint__keep_last": 20,
        "guard__spike_window": 4,
        "guard__max_skips": 2,
    }
    return digits_config(digits, run_dir, **{**values, **overrides})


def _plant(wrong: Callable[[int], float | None], rank: int) -> None:
    """Multiply the losses of the data steps for which `wrong` says a number, on one rank."""
    take, make = Learning.take_step, CrossEntropy.__call__
    now = {"data_step": 0}

    def take_step(self: Learning, place: Place, **keywords: Any) -> tuple[StepResult, int]:
        now["data_step"] = place.data_step + 1
        return take(self, place, **keywords)

    def minimise(self: CrossEntropy, losses: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        factor = wrong(now["data_step"]) if state.data_rank() == rank else None
        return make(self, losses if factor is None else losses * factor, *arguments)

    Learning.take_step, CrossEntropy.__call__ = take_step, minimise  # pyright: ignore[reportAttributeAccessIssue]


def _train_with_losses_times(factors: dict[int, float], config: RunConfig) -> str:
    """What the run says if it is refused, with factors on the losses of some steps on rank 1. Runs on every rank."""
    _plant(factors.get, rank=1)
    try:
        train(config)
    except InputError as error:
        return str(error)
    return ""


def _events(run_dir: Path) -> list[str]:
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _weights(run_dir: Path, number: int) -> dict[str, Any]:
    """The model's tensors in the checkpoint of a step."""
    paths.pointer(run_dir).write_text(paths.step_directory(run_dir, number).name, encoding="utf-8")
    return {name: value for name, value in content(run_dir).items() if name.endswith(("weight", "bias"))}


def test_a_step_of_nan_is_skipped_and_counted(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path, checkpoint__save_every=1, train__steps=8, guard__max_skips=5)
    assert run_on_ranks(_train_with_losses_times, 2, {5: math.nan}, config) == ["", ""]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [line["data_step"] for line in lines] == list(range(1, 9))
    assert [line["skipped_updates"] for line in lines] == [0] * 4 + [1] * 4
    assert [event for event in _events(tmp_path) if "step 5: no update, since the loss is nan" in event]
    # While a run is not steady there is no checkpoint; the next one shows a single update since the one before.
    saved = [number for number in range(1, 9) if paths.step_directory(tmp_path, number).is_dir()]
    assert saved == [1, 2, 3, 4, 6, 7, 8]
    skipping = {name: value for name, value in _weights(tmp_path, 8).items() if isinstance(value, Tensor)}
    assert skipping
    assert all(value.isfinite().all() for value in skipping.values())


def test_without_an_update_nothing_changes(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path, train__steps=4, checkpoint__save_every=2)
    run_on_ranks(_train_with_losses_times, 2, {3: math.nan, 4: math.inf}, _with(config, "guard", max_skips=5))
    before, after = _weights(tmp_path, 2), _weights(tmp_path, 4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _with(config: RunConfig, section: str, **update: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=update)})


def test_spikes_in_a_row_roll_back_and_pass_over_their_data(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path)
    assert run_on_ranks(_train_with_losses_times, 2, {6: 1e4, 7: 1e4}, config) == ["", ""]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # Back to the checkpoint of step 4, and on behind the data of step 7.
    assert [line["data_step"] for line in lines] == [1, 2, 3, 4, *range(8, 16)]
    assert [line["rollbacks"] for line in lines] == [0] * 4 + [1] * 8
    assert lines[-1]["skipped_updates"] == 2
    (rolled,) = [event for event in _events(tmp_path) if "back to step 4" in event]
    assert "2 updates in a row were skipped; back to step 4, and the data of 3 steps are passed over" in rolled


def test_roll_backs_that_do_not_help_end_the_run(digits: Path, tmp_path: Path) -> None:
    factors = dict.fromkeys(range(6, 100), math.nan)
    config = _with(_config(digits, tmp_path), "guard", max_rollbacks=2)
    for message in run_on_ranks(_train_with_losses_times, 2, factors, config):
        assert "2 updates in a row were skipped up to step 6" in message
        assert "the last one since the loss is nan, and 2 roll-backs did not help; lower optim.lr" in message
    # What was good is still there.
    assert paths.newest(tmp_path) == paths.step_directory(tmp_path, 4)


def test_nothing_to_go_back_to_ends_the_run(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path, checkpoint__save_every=100)
    for message in run_on_ranks(_train_with_losses_times, 2, {1: math.nan, 2: math.nan}, config):
        assert "and there is no checkpoint yet" in message


def _train_counting(factors: dict[int, float], config: RunConfig) -> int:
    """What the work of a run remembers at its end, where it counts its steps. Runs on every rank."""
    _plant(factors.get, rank=0)
    take, counted = Learning.take_step, {"steps": 0}

    def take_step(self: Learning, place: Place, **keywords: Any) -> tuple[StepResult, int]:
        counted["steps"] += 1
        return take(self, place, **keywords)

    Learning.take_step = take_step  # pyright: ignore[reportAttributeAccessIssue]
    Learning.state = lambda _: dict(counted)  # pyright: ignore[reportAttributeAccessIssue]
    Learning.load = lambda _, state: counted.update(state)  # pyright: ignore[reportAttributeAccessIssue]
    train(config)
    return counted["steps"]


def test_what_the_work_remembers_goes_on_with_the_run(digits: Path, tmp_path: Path) -> None:
    first = _config(digits, tmp_path, train__steps=4, checkpoint__save_every=2)
    assert run_on_ranks(_train_counting, 1, {}, first) == [4]
    # Back from step 8 to step 6, where it had counted as many.
    second = _config(digits, tmp_path, train__steps=10, checkpoint__save_every=2)
    assert run_on_ranks(_train_counting, 1, {7: math.nan, 8: math.nan}, second) == [10]


def _train_while_the_clock_jumps(config: RunConfig) -> None:
    """A day back, then two on. Runs on every rank."""
    take, clock, jumps = Learning.take_step, time.time, {3: -86400.0, 6: 172800.0}

    def take_step(self: Learning, place: Place, **keywords: Any) -> tuple[StepResult, int]:
        offset = sum(seconds for number, seconds in jumps.items() if place.step >= number)
        time.time = lambda: clock() + offset
        return take(self, place, **keywords)

    Learning.take_step = take_step  # pyright: ignore[reportAttributeAccessIssue]
    train(config)


def test_a_clock_that_jumps_changes_nothing(digits: Path, tmp_path: Path) -> None:
    run_on_ranks(_train_while_the_clock_jumps, 2, _config(digits, tmp_path))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 3600
    for line in lines:
        timed = {name: value for name, value in line.items() if name.startswith("time/") or "per_second" in name}
        assert len(timed) > 3
        assert all(0 <= value < 1e9 for value in timed.values()), timed
        assert line["time/step"] < 3600
    assert paths.newest(tmp_path) == paths.step_directory(tmp_path, 12)


def _out_of_memory(config: RunConfig) -> str:
    """What a run says whose third micro-batch does not fit. Runs on every rank."""
    run, calls = VisionLanguageModel.forward, []

    def forward(self: VisionLanguageModel, *arguments: Any, **keywords: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more.")
        return run(self, *arguments, **keywords)

    VisionLanguageModel.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError) as error:
        train(config)
    return str(error.value)


def test_out_of_memory_names_the_shapes(digits: Path, tmp_path: Path) -> None:
    ((message),) = run_on_ranks(_out_of_memory, 1, _config(digits, tmp_path, data__packed="true"))
    assert message.startswith("out of memory in a micro-batch of 1 x ")
    assert "tokens (" in message
    assert "trained tokens); lower train.micro_batch, data.max_sequence_tokens or data.max_pack_tiles" in message
    assert message.endswith("CUDA out of memory. Tried to allocate 20.00 GiB.")


# Megatron-Core gathers optimizer states to one rank in it, which nothing here does.
UNUSED_GROUP = "EXPERT_DATA_PARALLEL_GROUP_GLOO"


def _patience(config: RunConfig) -> set[float]:
    """Seconds that collectives of the groups of more ranks than this one wait. Runs on every rank."""
    take, found = Learning.take_step, set[float]()

    def take_step(self: Learning, place: Place, **keywords: Any) -> tuple[StepResult, int]:
        for group in distributed_c10d._world.pg_map:
            options: Any = group._get_backend(torch.device("cpu")).options
            if group.size() > 1 and group.group_desc != UNUSED_GROUP:
                found.add(options._timeout.total_seconds())
        return take(self, place, **keywords)

    Learning.take_step = take_step  # pyright: ignore[reportAttributeAccessIssue]
    train(config)
    return found


def test_no_collective_gives_up_before_the_watchdog(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path, train__steps=1, guard__hang_seconds=7200)
    for seconds in run_on_ranks(_patience, 2, config):
        assert min(seconds) > 7200
