"""The weights that a run starts from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.checkpoint import store
from megatron_mm.checkpoint.manifest import Manifest
from megatron_mm.checkpoint.paths import find
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.weights.hf_config import CONFIG, check_bridged, read_whole
from megatron_mm.weights.source import open_source
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table

# In the run directory: the checkpoint that the run began with.
INITIAL = "initial.json"


def initial_weights(config: RunConfig, *, begins: bool, writes: bool) -> Path | None:
    """What a run takes its first weights from: of another run the checkpoint that was the newest when this one began.

    Args:
        config: names it.
        begins: whether the run begins now, and the checkpoint is to be remembered.
        writes: whether this rank does that.

    Raises:
        InputError: there is no checkpoint, or not the same any more.
    """
    path, file = config.init_from, config.run_dir / INITIAL
    if path is None or (path / CONFIG).is_file():
        return path
    if begins:
        checkpoint = find(path)
        if writes:
            known = {"checkpoint": str(checkpoint.resolve()), "manifest": _digest(checkpoint)}
            file.write_text(json.dumps(known) + "\n", encoding="utf-8")
        return checkpoint
    known = json.loads(file.read_text(encoding="utf-8"))
    checkpoint = Path(known["checkpoint"])
    found = _digest(checkpoint) if Manifest.of(checkpoint).is_file() else "none"
    if found != known["manifest"]:
        raise InputError(
            f"{config.run_dir} began with {checkpoint}, and compares the policy with it; its manifest is "
            f"{known['manifest'][:12]} no more ({found[:12]}): copy that checkpoint back, or begin another run"
        )
    return checkpoint


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256(Manifest.of(checkpoint).read_bytes()).hexdigest()


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
