"""Hugging Face directories of a run that goes on."""

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.parallel import state
from megatron_mm.train.assemble import Trainee
from megatron_mm.weights.export import write_directory
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table


def export(config: RunConfig, step: int, trainee: Trainee, tokenizer: ChatTokenizer) -> str | None:
    """Write RUN/exports/step_N in R-4B's format; all ranks call it together.

    An export that fails, on a full disk for example, does not end the run.

    Returns:
        Why it failed, on the writing rank.
    """
    tensors = to_hf(trainee.chunks, model_table(config.model))
    fault = None
    if state.writes():
        directory = config.run_dir / "exports" / f"step_{step:08d}"
        try:
            if not directory.exists():  # by a run that was killed before its checkpoint
                write_directory(directory, config.model, tokenizer, tensors, DTYPES[config.precision])
        except (InputError, OSError) as error:
            fault = f"no export at step {step}: {error}"
    for _ in tensors:  # the other ranks take part in gathering each
        pass
    return fault
