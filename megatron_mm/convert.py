"""From a run's checkpoint to a Hugging Face directory."""

from pathlib import Path

from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.checkpoint.paths import find
from megatron_mm.checkpoint.store import load_weights
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.files import refuse_existing
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.export import check_format, write_directory
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table


def export_run(run_dir: Path, directory: Path) -> None:
    """Write the newest checkpoint of a run, whatever layout trained it, in R-4B's layout.

    Raises:
        InputError: the run has no checkpoint or config, the directory exists, or the format cannot hold the model.
    """
    find(run_dir)
    refuse_existing(directory)  # before minutes of loading
    config = load_config(str(run_dir / "config.yaml"), overrides=["model.vision.parallel=tensor"])
    config = config.model_copy(update={"parallel": ParallelConfig()})
    check_format(config.model)
    assert config.data.path is not None
    platform = get_platform(config.platform)
    tokenizer = ChatTokenizer(config.data.path / TOKENIZER)
    with state.process_group(platform), state.model_parallel(config.parallel, config.seed) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        load_weights(run_dir, chunks)
        write_directory(directory, config.model, tokenizer, to_hf(chunks, model_table(config.model)))
