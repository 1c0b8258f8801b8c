"""Two sets of weights, each a Hugging Face directory or a checkpoint, compared to the bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_mm.config.json_files import read_json_object
from megatron_mm.convert.checkpoint_weights import CheckpointWeights
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.files import INDEX, SINGLE, check_types, open_directory, same_bits
from megatron_mm.weights.hf_config import CONFIG, read_whole
from megatron_mm.weights.mapping import Readable
from megatron_mm.weights.names import Kind, not_of_the_model, our_names
from megatron_mm.weights.sizes import numel
from megatron_mm.weights.stream import dtype_name
from megatron_mm.weights.tables import EMBEDDING, OUTPUT

EVERYTHING = (slice(None),)
_KINDS: dict[str, Kind] = {
    "siglip": "vision",
    "siglip_vision_model": "vision",
    "qwen3": "language",
    "qwen3_moe": "language",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What a comparison found.

    Attributes:
        num_tensors, num_values: compared.
        differences: a line for each tensor that is missing, extra, or different in shape, type or values.
        notes: a line for each tensor that one side has beside the model, and that was not compared.
    """

    num_tensors: int
    num_values: int
    differences: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    path: Path
    tensors: Mapping[str, Readable]
    num_vision_layers: int | None


def verify(one: Path, other: Path, *, subset: bool = False) -> Report:
    """Compare every tensor of `one` with that of `other`.

    Args:
        subset: `other` may hold more.

    Raises:
        InputError: one of them is neither, or cannot be read.
    """
    with state.process_group(get_platform("cpu")):
        a, b = _open(one), _open(other)
        known = [side.num_vision_layers for side in (a, b) if side.num_vision_layers is not None]
        num_vision_layers = min(known, default=10**9)
        differences, notes = [], []
        for here, there in ((a, b), (b, a)):
            for name in here.tensors.keys() - there.tensors.keys():
                what = _beside_the_model(name, here, num_vision_layers)
                if what is not None:
                    notes.append(f"{name}: {what}; in {here.path} only")
                elif here is a or not subset:
                    differences.append(f"{name}: missing in {there.path}")
        # A checkpoint reads a whole parameter at a time, so it says in which order.
        ordered, others = (b, a) if isinstance(b.tensors, CheckpointWeights) else (a, b)
        shared = [name for name in ordered.tensors if name in others.tensors]
        num_values = 0
        for name in shared:
            mine, theirs = a.tensors[name], b.tensors[name]
            difference = _difference(mine, theirs)
            if difference is not None:
                differences.append(f"{name}: {difference}")
            num_values += numel(mine.shape)
    return Report(len(shared), num_values, tuple(sorted(differences)), tuple(sorted(notes)))


def _open(path: Path) -> _Side:
    if not (path / CONFIG).is_file() and not (path / INDEX).is_file() and not (path / SINGLE).is_file():
        weights = CheckpointWeights(path)
        return _Side(path, weights, weights.model.vision.used_layers)
    kind: Kind = "whole"
    num_vision_layers = None
    if (path / CONFIG).is_file():
        kind = _KINDS.get(str(read_json_object(path / CONFIG).get("model_type")), "whole")
        if kind == "whole":
            num_vision_layers = read_whole(path).model.vision.used_layers
    stored = open_directory(path)
    tensors = {ours: stored[theirs] for ours, theirs in our_names(stored, kind, str(path)).items()}
    check_types({name: one for name, one in tensors.items() if not_of_the_model(name, one.dtype, 10**9) is None})
    return _Side(path, tensors, num_vision_layers)


def _beside_the_model(name: str, side: _Side, num_vision_layers: int) -> str | None:
    if name == OUTPUT and EMBEDDING in side.tensors:
        output, embedding = side.tensors[OUTPUT], side.tensors[EMBEDDING]
        if _difference(output, embedding) is None:
            return f"repeats {EMBEDDING}"
    return not_of_the_model(name, side.tensors[name].dtype, num_vision_layers)


def _difference(one: Readable, other: Readable) -> str | None:
    """How two tensors differ, None where they are the same to the bit."""
    if tuple(one.shape) != tuple(other.shape):
        return f"shape {list(one.shape)} against {list(other.shape)}"
    if one.dtype != other.dtype:
        return f"type {dtype_name(one.dtype)} against {dtype_name(other.dtype)}"
    mine, theirs = one[EVERYTHING], other[EVERYTHING]
    return None if same_bits(mine, theirs) else _describe(mine, theirs)


def _describe(one: Tensor, other: Tensor) -> str:
    apart = (one != other) | (one.signbit() != other.signbit())
    first = tuple(apart.nonzero()[0].tolist())
    largest = float((one.double() - other.double()).abs().max())
    count = int(apart.sum())
    if not other.any():
        return f"all zero in the second; {count} of {one.numel()} values differ"
    if not one.any():
        return f"all zero in the first; {count} of {one.numel()} values differ"
    return (
        f"{count} of {one.numel()} values differ, by up to {largest:.3g}; the first is {list(first)}: "
        f"{float(one[first])!r} against {float(other[first])!r}"
    )
