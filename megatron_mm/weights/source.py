"""Directories of weights as one mapping under our names, read in parts; complete and fitting, or refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import ModelConfig
from megatron_mm.weights.files import StoredTensor, Weight, check_types, open_directory, same_bits
from megatron_mm.weights.mapping import Readable
from megatron_mm.weights.names import Kind, not_of_the_model, our_names
from megatron_mm.weights.stream import check_tensors, dtype_name
from megatron_mm.weights.tables import EMBEDDING, OUTPUT, model_table, projector_table


@dataclass(frozen=True, slots=True)
class Source:
    """Weights of a model, ready to be read.

    Attributes:
        tensors: by our name; all of `dtype`.
        notes: what was left out, added or changed, a line each, for the user.
    """

    tensors: Mapping[str, Readable]
    dtype: torch.dtype
    notes: tuple[str, ...]


def open_source(
    directories: Mapping[Kind, Path],
    model: ModelConfig,
    *,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Source:
    """Open the weights of `model` in one whole directory, or in one of the ViT and one of the language model.

    Args:
        untie: whether the directories tie the output layer to the embedding and the model does not; it starts equal.
        dtype: to convert to; None keeps the directories', which must then be one.
        seed: of the projector and the newline vector, where they are freshly drawn (separate directories).

    Raises:
        InputError: as `open_directory`; or tensors are missing, left over, of another shape, of several dtypes, or of
            none that weights have. Values that are no numbers are refused when they are read.
    """
    where = " and ".join(str(directory) for directory in directories.values())
    stored: dict[str, StoredTensor] = {}
    for kind, directory in directories.items():
        in_directory = open_directory(directory)
        names = our_names(in_directory, kind, str(directory))
        stored |= {ours: in_directory[theirs] for ours, theirs in names.items()}
    notes = _left_out(stored, model)
    if model.language.tied_embeddings and OUTPUT in stored:
        _check_tied(stored.pop(OUTPUT), stored.get(EMBEDDING), dtype)
        notes.append(f"left out {OUTPUT}: it repeats {EMBEDDING}")
    if untie and OUTPUT not in stored and EMBEDDING in stored:
        stored[OUTPUT] = stored[EMBEDDING]
        notes.append(f"made {OUTPUT} of {EMBEDDING}: the model does not tie them")
    dtype = _dtype(stored, dtype, where)
    casts = sorted({dtype_name(tensor.dtype) for tensor in stored.values() if tensor.dtype != dtype})
    if casts:
        notes.append(f"converted {', '.join(casts)} to {dtype_name(dtype)}")
    tensors: dict[str, Readable] = {name: Weight(tensor, dtype) for name, tensor in stored.items()}
    table = model_table(model)
    if "whole" not in directories:
        # Drawn when the rest is known to fit: of a wrong config its shapes would be wrong as well.
        fresh = projector_table(model.projector, model.vision.hidden_size, model.language.hidden_size)
        drawn = {rule.hf for rule in fresh}
        check_tensors([rule for rule in table if rule.hf not in drawn], tensors, where)
        tensors |= dict(fresh_projector(model, dtype, seed))
        notes.append(f"drew projector and image_newline from seed {seed}")
    check_tensors(table, tensors, where)
    return Source(tensors, dtype, tuple(notes))


def _left_out(stored: dict[str, StoredTensor], model: ModelConfig) -> list[str]:
    """Take out what is no part of the model, and return a note for each.

    Raises:
        InputError: what is left is not of types that weights have.
    """
    notes, of_model = [], {name for rule in model_table(model) for name in rule.hf}
    for name, tensor in list(stored.items()):
        what = None if name in of_model else not_of_the_model(name, tensor.dtype, model.vision.used_layers)
        if what is not None:
            notes.append(f"left out {stored.pop(name).name}: {what}")
    check_types(stored)
    return notes


def fresh_projector(model: ModelConfig, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A projector and a newline vector as models/projector.py and models/fusion.py draw them, whatever the layout."""
    generator = torch.Generator().manual_seed(seed)
    narrow, wide = model.vision.hidden_size, model.language.hidden_size
    for rule in projector_table(model.projector, narrow, wide):
        ((name,), (shape,)) = rule.hf, rule.shapes
        if name.endswith("bias"):
            tensor = torch.zeros(shape)
        elif "pre_norm" in name:
            tensor = torch.ones(shape)
        else:
            std = model.projector.init_std if len(shape) == 2 else wide**-0.5
            tensor = torch.randn(shape, generator=generator) * std
        yield name, tensor.to(dtype)


def _check_tied(output: StoredTensor, embedding: StoredTensor | None, wanted: torch.dtype | None) -> None:
    """Compare an output layer with the embedding that it should repeat, in the dtype that both are converted to."""
    if embedding is None:
        return  # which is named among what is missing
    if wanted is None and output.dtype != embedding.dtype:
        raise InputError(
            f"{output.file} holds an output layer ({output.name}) of {dtype_name(output.dtype)}, and the embedding it "
            f"repeats is {dtype_name(embedding.dtype)}; pass --dtype, or remove it"
        )
    everything = (slice(None),)
    dtype = wanted or output.dtype
    same = output.shape == embedding.shape
    if not same or not same_bits(output[everything].to(dtype), embedding[everything].to(dtype)):
        raise InputError(
            f"{output.file} holds an output layer ({output.name}) that differs from the embedding, though the config "
            "ties them; pass model.language.tied_embeddings=false to keep it"
        )


def _dtype(stored: Mapping[str, StoredTensor], wanted: torch.dtype | None, where: str) -> torch.dtype:
    seen: dict[torch.dtype, str] = {}
    for name, tensor in stored.items():
        seen.setdefault(tensor.dtype, name)
    examples = ", ".join(f"{name} is {dtype_name(dtype)}" for dtype, name in seen.items())
    if wanted is not None:
        return wanted
    if len(seen) > 1:
        raise InputError(
            f"{where} holds tensors of several types ({examples}); pass --dtype bfloat16, which rounds, or --dtype "
            "float32"
        )
    (dtype,) = seen or {torch.float32}
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"{where}: {examples}; we train in float32 or bfloat16, so pass --dtype with one of them")
    return dtype
