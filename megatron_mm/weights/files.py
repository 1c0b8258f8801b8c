"""Directories of safetensors files: checked as a whole when opened, read in parts, written in shards with an index."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.config.json_files import is_lfs_pointer, read_json_object
from megatron_mm.weights.mapping import Shape
from megatron_mm.weights.sizes import groups_up_to, numel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_"
# Files that run code when they are read.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# By the names that safetensors gives them; others cannot be read by torch.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
_OF_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. Indexing reads that part of it and no more; the file is open only meanwhile."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_slice(self.name)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file} cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor as a model takes it: in that dtype, every value that is read a number."""

    tensor: StoredTensor
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        stored = self.tensor[index]
        values = stored.to(self.dtype)
        finite = values.isfinite()
        if not finite.all():
            wrong = int(finite.numel() - finite.sum())
            were = int(finite.numel() - stored.isfinite().sum())
            raise InputError(
                f"{self.tensor.file}: {self.tensor.name} has {wrong} of {finite.numel()} values that are "
                + ("NaN or infinite; copy or make the model again" if were else f"too large for {self.dtype}")
            )
        return values


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by its name there; the headers of all files are read, the tensors not.

    Raises:
        InputError: no safetensors (pickle files are not read), a file is missing, cut off or damaged, or the index says
            something else than the files.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give one that holds config.json and safetensors files")
    files = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    if not files and not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise InputError(
                f"{directory} holds pickle files ({', '.join(pickles)}), which run code when they are read; save the "
                "model as safetensors first (transformers' save_pretrained does)"
            )
        raise InputError(f"no safetensors file in {directory}")
    adapters = [file.name for file in files if file.name.startswith(_ADAPTER)]
    if adapters:
        raise InputError(
            f"{directory} holds an adapter ({', '.join(adapters)}), which changes what the model computes; merge it "
            "into the model (peft's merge_and_unload) and save that, or remove it"
        )
    in_files = {file.name: _header(file) for file in files}
    if index.is_file():
        _check_index(index, in_files)
    elif re.search(r"-of-0*([2-9]|[1-9]\d+)\.safetensors$", files[0].name):
        raise InputError(f"{directory} holds {files[0].name}, one of several files, but no {INDEX}; copy it as well")
    elif len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(
            f"{directory} holds {names}, and no {INDEX} that says what is in which; remove what is not of the model"
        )
    found: dict[str, StoredTensor] = {}
    for tensors in in_files.values():
        found |= tensors
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        if is_lfs_pointer(file):
            raise InputError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut off or damaged ({error}); copy it again") from None
    others = {name: dtype for name, (_, dtype) in found.items() if dtype not in _DTYPES}
    if others:
        raise InputError(f"{file} holds tensors of types that cannot be read: {others}; dequantise the model first")
    return {name: StoredTensor(file, name, shape, _DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def check_types(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `InputError` naming what is no weight by its type, as the tensors of quantised models are."""
    found = [tensor for tensor in tensors.values() if tensor.dtype not in _OF_WEIGHTS]
    others = [f"{tensor.name} in {tensor.file} is {tensor.dtype}" for tensor in found]
    if others:
        shown = [*others[:5], f"and {len(others) - 5} more"] if len(others) > 6 else others
        raise InputError("\n".join(["types that are not supported; dequantise the model first:", *shown]))


def _check_index(index: Path, in_files: dict[str, dict[str, StoredTensor]]) -> None:
    try:
        listed: dict[str, str] = read_json_object(index)["weight_map"]
        wanted = {str(file) for file in listed.values()}
    except (KeyError, AttributeError) as error:
        raise InputError(f"{index} is no index of safetensors files: {error!r}; copy it again") from None
    missing = sorted(wanted - in_files.keys())
    if missing:
        raise InputError(f"{index} names files that are missing: {', '.join(missing)}; copy them as well")
    held = {name: file for file, tensors in in_files.items() for name in tensors}
    faults = [f"{name} is said to be in {file}, and is in {held.get(name, 'none')}" for name, file in listed.items()]
    faults = [fault for fault, (name, file) in zip(faults, listed.items(), strict=True) if held.get(name) != file]
    faults += [f"{name} in {file} is not listed" for name, file in held.items() if name not in listed]
    twice = [name for file, tensors in in_files.items() for name in tensors if held[name] != file]
    faults += [f"{name} is in two files" for name in twice]
    if faults:
        raise InputError("\n".join([f"{index} does not fit the files:", *sorted(faults), "make or copy it anew"]))


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Sequence[tuple[str, Shape]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write tensors into files of at most `shard_bytes` (or one tensor), each read back and compared, and an index.

    Args:
        directory: exists.
        tensors: in the order of `shapes`; one file's are in memory at a time.
        shapes: names and shapes of all of them.
        dtype: of all of them.

    Raises:
        InputError: what was read back differs from what was written.
    """
    shards = list(groups_up_to(shard_bytes, shapes, lambda entry: numel(entry[1]) * dtype.itemsize))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    stream = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        content: dict[str, Tensor] = {}
        for name, shape in shard:
            found, tensor = next(stream)
            assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), f"{found} came for {name}"
            # Views of a bucket or of the model would change, or write more than themselves.
            content[name] = tensor.detach().to("cpu", copy=True).contiguous()
        _write_checked(directory / file, content)
    left = next(stream, None)
    assert left is None, f"{left[0] if left else ''} is not in the plan"
    if len(shards) > 1:
        size = sum(numel(shape) for _, shape in shapes) * dtype.itemsize
        listed = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        content_of_index = {"metadata": {"total_size": size}, "weight_map": listed}
        (directory / INDEX).write_text(json.dumps(content_of_index, indent=2) + "\n", encoding="utf-8")


def _write_checked(file: Path, content: dict[str, Tensor]) -> None:
    save_file(content, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it private
    written = _header(file)
    wrong = [name for name, tensor in content.items() if not same_bits(written[name][(slice(None),)], tensor)]
    if wrong:
        raise InputError(f"{file} holds other values than were written for {wrong}; check the disk")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype agree to the bit, NaN and signed zeros included."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
