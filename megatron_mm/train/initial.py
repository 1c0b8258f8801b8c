"""The weights that a run starts from."""

from collections.abc import Sequence
from pathlib import Path

from megatron_mm.checkpoint import store
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.weights.hf_config import CONFIG, check_bridged, read_whole
from megatron_mm.weights.source import open_source
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table


def load_initial(config: RunConfig, path: Path, chunks: Sequence[VisionLanguageModel]) -> None:
    """Fill the model from a run, a checkpoint, or a Hugging Face directory, of which a rank reads its own parts only.

    Raises:
        InputError: the weights are of another model, of another precision, or damaged.
    """
    if not (path / CONFIG).is_file():
        store.load_weights(path, chunks)
        return
    found = read_whole(path).model
    check_bridged(found, config.model, fresh_projector=False)
    untie = found.language.tied_embeddings and not config.model.language.tied_embeddings
    source = open_source({"whole": path}, config.model, untie=untie)
    from_hf(chunks, model_table(config.model), source.tensors, str(path))
