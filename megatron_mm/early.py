"""What can be known to be wrong with a command before torch is imported, which takes seconds.

The commands call these functions first. What they find would be found later as well, by the code that does the work.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_mm.checkpoint.paths import find, newest, step_of
from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import check_layout
from megatron_mm.config.load import differences
from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.index import INDEX, TOKENIZER, Index
from megatron_mm.files import HF_CONFIG, refuse_existing, refuse_unwritable
from megatron_mm.telemetry.configs import CONFIG

# Of a config: what a run learns depends on them.
_LEARNING = ("precision", "seed", "model", "train", "optim", "rl")


def check_run(config: RunConfig, num_ranks: int) -> None:
    """Look at layout, directories, data and start of a run on `num_ranks` ranks.

    Raises:
        InputError: the layout does not fit; data or the checkpoint to start from are missing; the run directory cannot
            be one; rewards have unknown names; or the run is done, with other settings.
    """
    check_layout(config, num_ranks)
    refuse_unwritable(config.run_dir, "run_dir")
    _check_done(config)
    if config.init_from is not None and not (config.init_from / HF_CONFIG).is_file():
        find(config.init_from)
    check_data(config)
    if config.rl is not None:
        from megatron_mm.grading.rewards import RewardSpec  # which takes a second or two to import

        RewardSpec.of_config(config.rl.reward)


def check_data(config: RunConfig, split: str = "train") -> None:
    """Look at the prepared data set that a config names, where it lies on this machine.

    Raises:
        InputError: there is none, or the blend names parts that it does not hold.
    """
    if config.data.path is None:
        raise InputError("data.path is not given; add data.path=DIR, a directory that `megatron-mm data prepare` wrote")
    index = _index(config.data.path)
    if index is not None:
        for pattern in config.data.blend:
            index.parts_like(pattern, split)


def check_preparation(config: PrepareConfig, directory: Path) -> None:
    """Look at the tokenizer and the sources of a data set that is to be prepared.

    Raises:
        InputError: one of them is missing, or the directory cannot be made.
    """
    if not (config.tokenizer / "tokenizer.json").is_file():
        raise InputError(
            f"tokenizer: no tokenizer.json in {config.tokenizer}; give the directory of a Qwen3-style tokenizer"
        )
    for source in config.sources:
        for name, path in (("path", source.path), ("pictures", source.pictures)):
            if path is not None and not path.exists():
                raise InputError(f"{name} {path} of source {source.name} does not exist; correct it")
    refuse_unwritable(directory, "the directory to write")


def check_evaluation(model: Path, data: str, report: Path) -> None:
    """Look at what held-out questions are asked of, and at where the report is to be written.

    Raises:
        InputError: there is no model or no held-out data, or the report cannot be written.
    """
    if not (model / HF_CONFIG).is_file():
        raise InputError(f"no model in {model} ({HF_CONFIG} is missing); make it with `megatron-mm export`")
    index = _index(data)
    if index is not None:
        index.ranges("heldout")
    if report.is_dir():
        raise InputError(f"report {report} cannot be written: it is a directory; name a file in it")
    refuse_unwritable(report.parent, "the report's directory")


def check_import(run_dir: Path, directories: Iterable[Path]) -> None:
    """Look at the directories of Hugging Face weights, and at where the checkpoint is to be written.

    Raises:
        InputError: a directory holds no weights, or the one to write exists or cannot be made.
    """
    refuse_existing(run_dir)
    refuse_unwritable(run_dir, "the run directory")
    for directory in directories:
        if not (directory / HF_CONFIG).is_file():
            raise InputError(f"no model in {directory} ({HF_CONFIG} is missing)")


def check_export(run: Path, directory: Path) -> None:
    """Look at the run that is to be exported.

    Raises:
        InputError: it has no checkpoint, or the directory to write exists or cannot be made.
    """
    refuse_existing(directory)
    refuse_unwritable(directory, "the directory to write")
    find(run)


def check_weights(path: Path) -> None:
    """Raise `InputError` if a path is neither a Hugging Face directory nor a run or checkpoint."""
    if not (path / HF_CONFIG).is_file() and not any(path.glob("*.safetensors*")):
        find(path)


def _index(path: str) -> Index | None:
    """The index of a data set on this machine, None where it lies elsewhere."""
    if "://" in path:
        return None
    index = Index(Path(path) / INDEX)
    if not (Path(path) / TOKENIZER / "tokenizer.json").is_file():
        raise InputError(f"no tokenizer.json in {os.path.join(path, TOKENIZER)}; prepare the data again")
    return index


def _check_done(config: RunConfig) -> None:
    """A run that is done does nothing when it is started again: whoever changed a setting should know."""
    checkpoint, file = newest(config.run_dir), config.run_dir / CONFIG
    step = None if checkpoint is None else step_of(checkpoint)
    if step is None or step < config.train.steps or not file.is_file():
        return
    changed = differences(file, config, _LEARNING)
    if changed:
        raise InputError(
            f"{config.run_dir} is done after {step} steps, and settings are others now: {'; '.join(changed[:5])}. Give "
            "another run_dir, or raise train.steps to go on"
        )
