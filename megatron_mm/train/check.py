"""What can be known to be wrong with a run before a rank is started. Without Megatron-Core."""

from pathlib import Path

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint.paths import find
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER, PreparedData
from megatron_mm.early import check_run
from megatron_mm.files import HF_CONFIG
from megatron_mm.parallel.platform import get_platform

# Fingerprint of the samples of a run, in its directory.
DATA_PLAN = "data_plan.txt"


def check_inputs(config: RunConfig, num_ranks: int) -> None:
    """Look at layout, data and checkpoint of a run on `num_ranks` ranks.

    Raises:
        InputError: the layout does not fit, the machine lacks what the config asks for, data or the checkpoint to start
            from are missing, or they have different tokenizers; rewards have unknown names; or the run is done, with
            other settings.
    """
    check_run(config, num_ranks)
    platform = get_platform(config.platform)
    fault = None if config.fp8.recipe == "none" else platform.fp8_fault(config.fp8.recipe)
    if fault is not None:
        raise InputError(fault)
    assert config.data.path is not None
    data = PreparedData(config.data.path)
    if config.init_from is not None:
        _check_tokenizer(config.init_from, data)


def check_data_plan(run_dir: Path, fingerprint: str) -> None:
    """See that a run that goes on meets the samples that it would have met.

    Args:
        run_dir: of a run with a checkpoint.
        fingerprint: of the sequence of global batches, see `data.plan`.

    Raises:
        InputError: the run was begun with another sequence.
    """
    file = run_dir / DATA_PLAN
    begun = file.read_text(encoding="utf-8").strip() if file.is_file() else "none"
    if begun != fingerprint:
        raise InputError(
            f"{run_dir} was begun with other data, or with another blend, seed, global batch, rendering or packing "
            f"({DATA_PLAN}: {begun}, now {fingerprint}): its steps would meet other samples. Undo the change, or begin "
            f"another run with init_from={run_dir}"
        )


def _check_tokenizer(init_from: Path, data: PreparedData) -> None:
    """The weights must know the data's ids; they may know more."""
    is_hf = (init_from / HF_CONFIG).is_file()
    directory = init_from if is_hf else find(init_from).parent.parent / TOKENIZER
    if not (directory / "tokenizer.json").is_file():
        return
    ours, theirs = (ChatTokenizer(where).hf.get_vocab() for where in (data.tokenizer_directory, directory))
    other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"the data of {data.path} was prepared with another tokenizer than init_from={init_from} has: {other!r} is "
            f"token {ours[other]} in the data and {theirs.get(other, 'none')} there; prepare the data with the latter's"
        )
