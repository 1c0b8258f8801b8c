"""What becomes of a checkpoint when training goes on, files rot, disks are full and processes die."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.multiprocessing.spawn import ProcessExitedException

from megatron_mm.checkpoint.paths import newest, partials, step_directory
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.checkpoint.store import content_of, model_state, resume, write
from megatron_mm.checkpoint.verify import find_sound, newest_sound
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import CheckpointConfig, RunConfig
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import Trainee, build_trainee
from tests.checkpoints import DAMAGES, make_checkpoint
from tests.layouts import EXPERTS, PP2, SP
from tests.ranks import run_on_ranks
from tests.runs import wait_until
from tests.tiny import tiny_config

TRAINED = {"train__trained": "[vision, projector, language, embeddings]"}
PROGRESS = {"data_step": 7, "losses": [1.5, 2.0**-30], "rolled_back": False}
# What a rank under a limit of file sizes may write: less than its share of the miniature model.
LIMIT_BYTES = 1_000_000


class _Told(logging.Handler):
    """The warnings of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    told, logger = _Told(), logging.getLogger("megatron_mm.checkpoint")
    logger.addHandler(told)
    try:
        yield told.lines
    finally:
        logger.removeHandler(told)


@contextmanager
def _training(config: RunConfig) -> Iterator[Trainee]:
    with state.model_parallel(config.parallel, config.seed) as groups:
        trainee = build_trainee(config, build_model(config, get_platform("cpu"), groups, image_token=5), groups)
        _train(trainee)
        yield trainee


def _train(trainee: Trainee) -> None:
    """One update with random gradients."""
    for wrapped in trainee.ddp:
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape))  # pyright: ignore
    trainee.optimizer.step()


def _content(checkpoint: Path) -> dict[str, Any]:
    return dist_checkpointing.load_plain_tensors(str(checkpoint))


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    same = {
        name: torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one.keys() & other.keys()
    }
    return sorted({name for name, equal in same.items() if not equal} | (one.keys() ^ other.keys()))


def _save_in_the_background(trainee: Trainee, saver: Saver, step: int) -> int:
    """Save, change everything at once, and poll until it is done: the number of polls."""
    saver.save(step, trainee.chunks, trainee.optimizer, PROGRESS)
    _train(trainee)
    with torch.no_grad():
        for chunk in trainee.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7)
    polls = 0
    while saver.last_saved != step:
        time.sleep(0.01)
        saver.poll()
        polls += 1
    return polls


def _compare(configs: dict[str, RunConfig], run_dir: Path) -> dict[tuple[str, str], Any]:
    """Waited for, in the background, by Megatron-Core alone, and resumed: what differs. Runs on every rank."""
    found: dict[tuple[str, str], Any] = {}
    with state.process_group(get_platform("cpu")):
        for name, config in configs.items():
            where = run_dir / name
            with _training(config) as trainee:
                waited = Saver(where / "waited", CheckpointConfig(asynchronous=False))
                waited.save(1, trainee.chunks, trainee.optimizer, PROGRESS)
                _by_megatron_core(trainee, where / "megatron")
                background = Saver(where / "background", CheckpointConfig())
                assert _save_in_the_background(trainee, background, 1) > 0
                expected = _content(find_sound(where / "waited"))
                found[name, "background"] = _differing(expected, _content(find_sound(where / "background")))
                gathered = _content(where / "megatron")
                found[name, "gathered"] = _differing(expected | {"progress": None}, gathered | {"progress": None})
                # Twice, the second time by the plan of the first.
                progress = resume(find_sound(where / "background"), trainee.chunks, trainee.optimizer)
                for step in (2, 3):
                    background.save(step, trainee.chunks, trainee.optimizer, PROGRESS)
                background.finish()
                for step in (2, 3):
                    again = _content(step_directory(where / "background", step))
                    again["progress"]["step"] = 1
                    found[name, f"resumed, step {step}"] = _differing(expected, again)
                found[name, "progress"] = [] if progress == {**PROGRESS, "step": 1} else progress
    return found


def _by_megatron_core(trainee: Trainee, directory: Path) -> None:
    """As its own `save` writes it, which gathers the optimizer's state."""
    model = model_state(trainee.chunks)
    content = content_of(1, trainee.chunks, trainee.optimizer, PROGRESS)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    content["model"] = model
    content["optimizer"] = trainee.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(content, str(directory))


def test_a_save_in_the_background_is_the_same_though_training_goes_on(tmp_path: Path) -> None:
    overrides: dict[str, dict[str, Any]] = {
        "DP 2, bf16": {"precision": "bf16"},
        "DP 2, fp32": {},
        "TP 2 + SP": {**SP, "precision": "bf16"},
        "PP 2": {**PP2, "precision": "bf16"},
        "ViT on each of TP 2": {**SP, "model__vision__parallel": "data"},
        "experts": EXPERTS,
        "plain optimizer": {"optim__distributed": "false"},
        "ViT frozen": {"train__trained": "[projector, language]"},
    }
    configs = {name: tiny_config(**{**TRAINED, **values}) for name, values in overrides.items()}
    for found in run_on_ranks(_compare, 2, configs, tmp_path):
        assert {way: names for way, names in found.items() if names} == {}


def _newest_sound(run_dirs: list[Path], verify: bool) -> list[tuple[str, list[str]]]:
    """The name of what each run would resume from, or what is said instead, with the warnings. Runs on every rank."""
    found = []
    with state.process_group(get_platform("cpu")):
        for run_dir in run_dirs:
            with _warnings() as told:
                try:
                    checkpoint = newest_sound(run_dir, verify=verify)
                    found.append(("none" if checkpoint is None else checkpoint.name, told))
                except InputError as error:
                    found.append((str(error), told))
    return found


def test_resume_falls_back_from_each_kind_of_damage(tmp_path: Path) -> None:
    for kind, (damage, _) in DAMAGES.items():
        checkpoints = [make_checkpoint(tmp_path / kind, step) for step in (1, 2, 3)]
        damage(checkpoints[-1])
    for run_dir in (tmp_path / "all", tmp_path / "gone"):
        checkpoints = [make_checkpoint(run_dir, step) for step in (1, 2)]
        for checkpoint in checkpoints:
            (checkpoint / "common.pt").unlink()
    for name in ("pointer", "sound"):
        checkpoints = [make_checkpoint(tmp_path / name, step) for step in (1, 2)]
    shutil.rmtree(step_directory(tmp_path / "pointer", 2))
    run_dirs = [tmp_path / name for name in (*DAMAGES, "pointer", "sound", "all", "never")]
    first, second = run_on_ranks(_newest_sound, 2, run_dirs, True)
    assert [name for name, _ in first] == [name for name, _ in second]
    assert not [line for _, told in second for line in told]
    for (kind, (_, expected)), (name, told) in zip(DAMAGES.items(), first, strict=False):
        assert name == "step_00000002", kind
        (line,) = told
        damaged = step_directory(tmp_path / kind, 3)
        assert f"checkpoint {damaged} is damaged: {expected}" in line, kind
        assert "it is step_00000003.damaged now" in line
        assert damaged.with_suffix(".damaged").is_dir()
        assert not damaged.exists()
        assert newest(tmp_path / kind) == step_directory(tmp_path / kind, 2)
    pointer, sound, every, never = first[len(DAMAGES) :]
    assert pointer[0] == "step_00000001"
    assert "names step_00000002, which is not there" in pointer[1][0]
    assert sound == ("step_00000002", [])
    assert "no checkpoint of" in every[0]
    assert len(every[1]) == 2
    assert never == ("none", [])
    # The sizes are compared in any case, contents only where asked; a second start does not begin anew.
    unverified = [make_checkpoint(tmp_path / kind, 3) for kind in ("flipped bit", "cut file")]
    for kind, checkpoint in zip(("flipped bit", "cut file"), unverified, strict=True):
        DAMAGES[kind][0](checkpoint)
    run_dirs = [tmp_path / name for name in ("flipped bit", "cut file", "all")]
    (flipped, cut, again), _ = run_on_ranks(_newest_sound, 2, run_dirs, False)
    assert flipped == ("step_00000003", [])
    assert cut[0] == "step_00000002"
    assert "it is step_00000003.damaged-2 now" in cut[1][0]
    assert "no checkpoint of" in again[0]


@contextmanager
def _limited(is_limited: bool) -> Iterator[None]:
    """A limit of the size of files, on this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _fail(config: RunConfig, run_dir: Path, small_disk: Path) -> dict[str, Any]:
    """What is there, and what is said, after saves that fail on one rank or on all. Runs on every rank."""
    found: dict[str, Any] = {}
    with state.process_group(get_platform("cpu")), _training(config) as trainee:
        saver = Saver(run_dir, CheckpointConfig())
        waiting = Saver(run_dir, CheckpointConfig(asynchronous=False))

        def note(name: str, told: list[str], by: Saver) -> None:
            dist.barrier()
            left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            found[name] = (told, left, by.last_saved)
            dist.barrier()

        def save(by: Saver, step: int, **options: bool) -> None:
            by.save(step, trainee.chunks, trainee.optimizer, PROGRESS, **options)

        save(saver, 1, wait=True)
        with _warnings() as told, _limited(dist.get_rank() == 1):
            save(saver, 2)
            while saver._pending is not None:
                saver.poll()
        note("too large, background", told, saver)
        with _warnings() as told, _limited(dist.get_rank() == 1):
            waiting.last_saved = 1
            save(waiting, 2)
        note("too large, waited for", told, waiting)
        impatient = Saver(run_dir, CheckpointConfig(stall_seconds=5))
        for name, by, number in (("killed", saver, signal.SIGKILL), ("stopped", impatient, signal.SIGSTOP)):
            with _warnings() as told:
                save(by, 2)
                if dist.get_rank() == 1:
                    assert by._pending is not None
                    os.kill(by._pending[2].process_id, number)
                by.finish()
            note(name, told, by)
        with _warnings() as told:
            save(impatient, 2)
            impatient.finish()
        note("after all", told, impatient)
        try:
            content = content_of(3, trainee.chunks, trainee.optimizer, PROGRESS)
            write(run_dir, 3, content, _no_room_for_manifest)
        except InputError as error:
            found["no manifest"] = (str(error), sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
        on_small = Saver(small_disk, CheckpointConfig())
        for name, wait in (("full, background", False), ("full, waited for", True)):
            with _warnings() as told:
                try:
                    save(on_small, 1, wait=wait)
                    on_small.finish()
                except InputError as error:
                    told.append(str(error))
            found[name] = (told, [path.name for path in (small_disk / "checkpoints").iterdir()], on_small.last_saved)
            dist.barrier()
    return found


def _no_room_for_manifest(partial: Path) -> None:
    """The disk is full when the ranks' own files are written."""
    if dist.get_rank() == 0:
        (partial / "manifest.json").symlink_to("/dev/full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)], capture_output=True)
    assert not mounted.returncode, f"this test fills a file system that only root may mount: {mounted.stderr.decode()}"
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_failed_save_is_told_and_leaves_the_one_before(tmp_path: Path, small_disk: Path) -> None:
    first, second = run_on_ranks(_fail, 2, tiny_config(**TRAINED, precision="bf16"), tmp_path / "run", small_disk)
    before = (["latest", "step_00000001"], 1)
    for name, reason in (
        ("too large, background", "rank 1: [Errno 27] File too large"),
        ("too large, waited for", "rank 1: [Errno 27] File too large"),
        ("killed", "rank 1: the process that wrote was killed by signal 9 (SIGKILL)"),
        ("stopped", "rank 1: the process that wrote stood still for 5 s (checkpoint.stall_seconds) and was killed"),
    ):
        ((line,), *left), (quiet, *_) = first[name], second[name]
        assert reason in line, name
        assert f"checkpoint {step_directory(tmp_path / 'run', 2)} could not be written" in line
        assert "training goes on, step_00000001 is kept, and the next save tries again" in line
        assert tuple(left) == before, name
        assert quiet == []
    assert first["after all"] == ([], ["latest", "step_00000001", "step_00000002"], 2)
    for found in (first, second):
        message, left = found["no manifest"]
        assert "step_00000003 could not be written: rank 0: [Errno 28] No space left on device" in message
        assert left == ["latest", "step_00000001", "step_00000002"]
    for name in ("full, background", "full, waited for"):
        (line,), left, last = first[name]
        assert "[Errno 28] No space left on device" in line
        assert "the checkpoint takes about 0.013 GB, 0.00" in line
        assert (left, last) == ([], None)
    assert "make room or mend the disk" in second["full, waited for"][0][0]


def _killed_while_writing(config: RunConfig, run_dir: Path) -> None:
    """Ends all ranks, by SIGKILL, while each has a writer that is stopped in the middle. Runs on every rank."""
    with state.process_group(get_platform("cpu")), _training(config) as trainee:
        saver = Saver(run_dir, CheckpointConfig())
        saver.save(1, trainee.chunks, trainee.optimizer, PROGRESS, wait=True)
        saver.save(2, trainee.chunks, trainee.optimizer, PROGRESS)
        assert saver._pending is not None
        _, snapshot, write = saver._pending
        while not (snapshot.directory / f"__{dist.get_rank()}_0.distcp").exists():
            pass
        os.kill(write.process_id, signal.SIGSTOP)
        (run_dir / f"writer_{dist.get_rank()}").write_text(str(write.process_id))
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def _start_again(config: RunConfig, run_dir: Path) -> str:
    """What the next start resumes from. Runs on every rank."""
    with state.process_group(get_platform("cpu")):
        found = newest_sound(run_dir, verify=True)
        Saver(run_dir, config.checkpoint)
        return "" if found is None else found.name


def test_killed_ranks_leave_the_checkpoint_before_and_no_writers(tmp_path: Path) -> None:
    config = tiny_config(**TRAINED, precision="bf16")
    # Writers that lived on would keep this waiting, for they hold what it waits for.
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(_killed_while_writing, 2, config, tmp_path)
    writers = [int((tmp_path / f"writer_{rank}").read_text()) for rank in range(2)]
    wait_until(lambda: not any(map(_lives, writers)), seconds=60)
    assert newest(tmp_path) == step_directory(tmp_path, 1)
    assert [path.name.startswith("step_00000002.partial-") for path in partials(tmp_path)] == [True]
    assert run_on_ranks(_start_again, 2, config, tmp_path) == ["step_00000001"] * 2
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000001"]


def _lives(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
