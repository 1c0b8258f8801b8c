"""The run directory over several starts and roll-backs, on a full disk, on a terminal, in TensorBoard and W&B."""

import importlib
import json
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.telemetry.run import Telemetry
from tests.tiny import tiny_config


def _config(run_dir: Path, **overrides: object) -> RunConfig:
    return tiny_config(**{"run_dir": run_dir, "train__steps": 100, "telemetry__tensorboard": "false", **overrides})


def _telemetry(run_dir: Path, first_step: int = 0, **overrides: object) -> Telemetry:
    return Telemetry(_config(run_dir, **overrides), writes=True, first_step=first_step)


def _log(telemetry: Telemetry, attempt: float, *steps: int) -> None:
    for step in steps:
        telemetry.log(step, {"loss": attempt + step, "loss/ocr/thinking": 2.0})


def _lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def _losses(run_dir: Path) -> dict[int, float]:
    lines = _lines(run_dir)
    losses = {line["step"]: line["loss"] for line in lines}
    assert len(losses) == len(lines), "a step is there twice"
    return losses


def _scalars(run_dir: Path, tag: str = "loss") -> dict[int, float]:
    accumulator = EventAccumulator(str(run_dir / "logs"))
    accumulator.Reload()
    events = accumulator.Scalars(tag)
    assert len({event.step for event in events}) == len(events), "a step is there twice"
    return {event.step: event.value for event in events}


def test_starts_and_roll_backs_leave_each_step_once(tmp_path: Path) -> None:
    first = _telemetry(tmp_path, telemetry__tensorboard="true")
    _log(first, 0, 1, 2, 3, 4)
    # Killed: never closed. The next start goes on after step 2.
    second = _telemetry(tmp_path, 2, telemetry__tensorboard="true")
    _log(second, 100, 3, 4, 5, 6)
    second.rewind(4)
    _log(second, 200, 5, 6, 7)
    second.close()
    expected = {1: 1, 2: 2, 3: 103, 4: 104, 5: 205, 6: 206, 7: 207}
    assert _losses(tmp_path) == expected
    # The first writer's thread writes on its own.
    first.close()
    assert _scalars(tmp_path) == expected
    assert set(_scalars(tmp_path, "loss/ocr/thinking").values()) == {2.0}
    # A start from nothing, in a directory in which no checkpoint was made.
    third = _telemetry(tmp_path, telemetry__tensorboard="true")
    _log(third, 300, 1)
    third.close()
    assert _losses(tmp_path) == _scalars(tmp_path) == {1: 301}


def test_configs_of_earlier_starts_are_kept_where_they_differ(tmp_path: Path) -> None:
    for rate in (1, 1, 2, 2, 1, 3):
        _telemetry(tmp_path, optim__lr=rate * 1e-3).close()
    rates = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))["optim"]["lr"] for path in tmp_path.glob("*.yaml")
    }
    assert rates == {"config.1.yaml": 1e-3, "config.2.yaml": 2e-3, "config.3.yaml": 1e-3, "config.yaml": 3e-3}


def test_a_start_killed_between_two_configs_loses_none_and_keeps_none_twice(tmp_path: Path) -> None:
    _telemetry(tmp_path, optim__lr=1e-3).close()
    (tmp_path / "config.1.yaml").write_bytes((tmp_path / "config.yaml").read_bytes())
    _telemetry(tmp_path, optim__lr=2e-3).close()
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["config.1.yaml", "config.yaml"]


def test_warnings_are_recorded_with_both_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = _telemetry(tmp_path, 7)
    telemetry.warn("first")
    _log(telemetry, 0, 8)
    telemetry.warn("second")
    telemetry.warn("third", step=9)
    telemetry.close()
    other = Telemetry(_config(tmp_path / "other"), writes=False, first_step=0)
    other.warn("nothing")
    _log(other, 0, 1)
    other.rewind(0)
    other.say("nothing")
    other.close()
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"megatron-mm: {text}" for text in ("first", "second", "third")]
    assert "nothing" not in told.out
    assert not (tmp_path / "other").exists()
    events = _lines(tmp_path, "events.jsonl")
    assert [(event["step"], event["text"]) for event in events] == [(7, "first"), (8, "second"), (9, "third")]
    clocks = [event["monotonic_seconds"] for event in events]
    assert clocks == sorted(clocks)
    assert all(event["time"] > 1e9 for event in events)


def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = _telemetry(tmp_path, telemetry__tensorboard="true")
    _log(telemetry, 0, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        _log(telemetry, 0, 2, 3, 4)
        telemetry.rewind(3)
        telemetry.warn("while nothing can be written")
        assert list(_losses(tmp_path)) == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    _log(telemetry, 0, 4, 5)
    telemetry.close()
    assert list(_losses(tmp_path)) == [1, 2, 3, 4, 5]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-mm: metrics.jsonl")]
    assert "training goes on" in warnings[0]
    assert "with the 2 lines that waited" in warnings[1]
    assert len(warnings) == 2
    assert "while nothing can be written" in [event["text"] for event in _lines(tmp_path, "events.jsonl")]


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"run_dir .*file/run cannot be written: Not a directory; choose another"):
        _telemetry(tmp_path / "file" / "run")


def test_output_that_nobody_takes_ends_no_run(tmp_path: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        result = subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], stdout=full, stderr=full)
    # Python itself says at the end that something could not be printed.
    assert result.returncode in (0, 120)
    assert [line["step"] for line in _lines(tmp_path)] == [20, 100]


SHOW = """
import sys
from pathlib import Path
from megatron_mm.telemetry.run import Telemetry
from tests.tiny import tiny_config
config = tiny_config(run_dir=sys.argv[1], train__steps=100, telemetry__tensorboard="false")
telemetry = Telemetry(config, writes=True, first_step=10)
telemetry.say("a greeting [with brackets]")
telemetry.log(20, {"loss": 2.5, "grad_norm": 1.0, "loss/ocr/thinking": 7.75})
telemetry.warn("a warning")
telemetry.log(100, {"loss": 1.5, "grad_norm": 1.0, "reward": 0.75, "reward/thinking": 1.0,
    "heldout/accuracy": 0.25, "heldout/think_rate": 0.5, "validation/loss": 1.25})
telemetry.done("the next command")
telemetry.close()
"""


def test_plain_lines_where_nobody_looks(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    greeting, first, last, end = result.stdout.splitlines()
    assert greeting == "a greeting [with brackets]"
    assert first.startswith("tiny  step 20/100  loss 2.5  grad_norm 1  0:00:0")
    figures = "loss 1.5  validation/loss 1.25  reward 0.75  heldout/accuracy 0.25  heldout/think_rate 0.5  grad_norm 1"
    assert figures in last
    figures = "loss 1.5, validation/loss 1.25, reward 0.75, heldout/accuracy 0.25, heldout/think_rate 0.5"
    assert end == f"done: {tmp_path} (step 100, {figures}); next: the next command"
    assert last.endswith("(0:00:00 left)")
    assert "\x1b" not in result.stdout
    assert result.stderr == "megatron-mm: a warning\n"


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, str(tmp_path)], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 240)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
    assert process.wait() == 0, shown
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode())  # without colours and moves of the cursor
    lines = plain.replace("\r", "\n").splitlines()
    assert any("20/100" in line and "loss 2.5" in line and "━" in line for line in lines), lines
    assert any("100/100" in line and "loss 1.5" in line for line in lines)
    assert "a greeting [with brackets]" in lines
    assert "megatron-mm: a warning" in lines
    assert [line for line in lines if line][-1].startswith(f"done: {tmp_path} (step 100, loss 1.5, ")


WANDB = """
import sys
from megatron_mm.telemetry.run import Telemetry
from tests.tiny import tiny_config
config = tiny_config(run_dir=sys.argv[1], telemetry__tensorboard="false", telemetry__wandb="offline")
telemetry = Telemetry(config, writes=True, first_step=int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, int(sys.argv[2]) + 4):
    telemetry.log(step, {"loss": float(step), "loss/ocr/thinking": 2.0})
telemetry.close()
"""


def test_wandb_offline_goes_on_with_its_run(tmp_path: Path) -> None:
    # Neither a network nor an account: their names lead nowhere.
    environment = {**os.environ, "WANDB_BASE_URL": "http://localhost:9", "HOME": str(tmp_path / "home")}
    environment.pop("WANDB_API_KEY", None)
    for first_step in (0, 2):
        command = [sys.executable, "-c", WANDB, str(tmp_path / "run"), str(first_step)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    (number,) = {file.stem.removeprefix("run-") for file in files}
    assert (tmp_path / "run" / "wandb_id").read_text(encoding="utf-8").strip() == number
    assert [_wandb_losses(file) for file in files] == [{1: 1.0, 2: 2.0, 3: 3.0}, {3: 3.0, 4: 4.0, 5: 5.0}]


def _wandb_losses(file: Path) -> dict[int, float]:
    """What a small W&B file holds: LevelDB's log format, 7 bytes of its own in front, with protocol buffers in it."""
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, losses, position = file.read_bytes(), {}, 7
    assert len(data) < 2**15  # beyond, records are cut at blocks
    while position + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, position + 4)
        assert kind == 1  # a whole one
        record = protocol.Record.FromString(data[position + 7 : position + 7 + length])
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            losses[items["step"]] = items["loss"]
            assert items["loss/ocr/thinking"] == 2.0
        position += 7 + length
    return losses
