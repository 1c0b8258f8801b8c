"""The weights that a run began with stay what they were, though the run that they come from goes on."""

from pathlib import Path

import pytest

from megatron_mm.checkpoint.manifest import Manifest
from megatron_mm.checkpoint.paths import point_to, step_directory
from megatron_mm.config.errors import InputError
from megatron_mm.train.initial import initial_weights
from tests.tiny import tiny_config


def _checkpoint(run_dir: Path, step: int) -> Path:
    directory = step_directory(run_dir, step)
    directory.mkdir(parents=True)
    Manifest.of(directory).write_text(Manifest(step, {}).to_json(), encoding="utf-8")
    point_to(directory)
    return directory


def test_a_run_goes_on_with_the_checkpoint_that_it_began_with(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "other", 10)
    config = tiny_config(init_from=tmp_path / "other", run_dir=tmp_path)
    assert initial_weights(config, begins=True, writes=True) == first
    newer = _checkpoint(tmp_path / "other", 20)
    assert initial_weights(config, begins=False, writes=True) == first
    assert initial_weights(config, begins=True, writes=False) == newer  # of a run that begins now
    assert initial_weights(config, begins=False, writes=True) == first


def test_a_checkpoint_that_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "other", 10)
    config = tiny_config(init_from=tmp_path / "other", run_dir=tmp_path)
    initial_weights(config, begins=True, writes=True)
    Manifest.of(first).write_text(Manifest(11, {}).to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"began with .*other.*manifest is .* no more"):
        initial_weights(config, begins=False, writes=True)
    Manifest.of(first).unlink()
    with pytest.raises(InputError, match=r"\(none\): copy that checkpoint back"):
        initial_weights(config, begins=False, writes=True)


def test_other_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    assert initial_weights(tiny_config(run_dir=tmp_path), begins=True, writes=True) is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    config = tiny_config(init_from=tmp_path / "model", run_dir=tmp_path)
    for begins in (True, False):
        assert initial_weights(config, begins=begins, writes=True) == tmp_path / "model"
