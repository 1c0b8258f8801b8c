"""Checkpoint -> Hugging Face directory."""

from pathlib import Path

import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.convert.checkpoint_weights import CheckpointWeights
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.files import refuse_existing
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.export import SHARD_BYTES, Format, check_format, write_directory


def export_run(
    run: Path,
    directory: Path,
    form: Format = Format.R4B,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the newest checkpoint of a run, whatever layout trained it, as a Hugging Face directory.

    Args:
        run: run directory, or a checkpoint in one.
        dtype: to convert to; None keeps the checkpoint's.
        shard_bytes: largest size of a file.

    Raises:
        InputError: the run has no checkpoint or config, the directory exists, or the format cannot hold the model.
    """
    refuse_existing(directory)
    with state.process_group(get_platform("cpu")):
        weights = CheckpointWeights(run)
        check_format(weights.model, form)
        tokenizer = ChatTokenizer(weights.run_dir / TOKENIZER)
        dtype = dtype or weights.dtype
        tensors = ((name, weights[name].to(dtype)) for name in weights)
        write_directory(directory, weights.model, tokenizer, tensors, dtype, form, shard_bytes)
