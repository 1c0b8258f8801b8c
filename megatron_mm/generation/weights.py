"""The weights that a vLLM worker computes with: writing over them, and reading them back to be compared.

On the CPU vLLM packs matrices for its kernels and drops the originals. A packed one is packed anew when all of its rows
have come, and is read by what it makes of the unit vectors: one term of every sum is not zero then, so nothing is
rounded.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

Index = tuple[slice, ...]

# What vLLM 0.26 and 0.32 keep below each other in one parameter, of Qwen3 and SigLIP.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker holds of a Hugging Face tensor.

    Attributes:
        index: of the part in the whole tensor.
        module: of vLLM's that holds it.
        leaf: the module's parameter.
        rows: of the parameter; it may hold several tensors below each other.
        multiplies: whether the module multiplies by it, and so may have packed it.
    """

    index: Index
    module: nn.Module
    leaf: str
    rows: slice
    multiplies: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.parameter.dtype

    @property
    def parameter(self) -> Tensor:
        """Of the module; empty where it was packed and dropped."""
        return getattr(self.module, self.leaf).data

    @property
    def is_packed(self) -> bool:
        """Whether the module may multiply by anything but its parameter: a function that keeps nothing cannot.

        vLLM 0.32 has such a function where oneDNN has no kernel, as for bf16 on CPUs without instructions for it.
        """
        if not self.multiplies:
            return False
        module: Any = self.module
        multiply = module.cpu_linear
        return not isinstance(multiply, FunctionType) or bool(multiply.__closure__ or multiply.__defaults__)

    def read(self) -> Tensor:
        """The part as it is computed with."""
        if not self.is_packed:
            return self.parameter[self.rows]
        module: Any = self.module
        columns = module.embedding_dim if hasattr(module, "embedding_dim") else module.input_size_per_partition
        units = torch.eye(columns, dtype=self.dtype, device=self.parameter.device)
        return module.quant_method.apply(module, units, None)[:, self.rows].T


@torch.no_grad()
def load_weights(parts: Mapping[str, Sequence[Part]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole tensors over what a worker holds of them. What is not among them stays as it is.

    vLLM's own reloading makes every parameter a second time and copies it thrice, and forgets the packed copy of a tied
    output matrix.

    Args:
        parts: of each tensor, by its Hugging Face name.
        tensors: by the same names, each once.
    """
    to_come: dict[nn.Module, list[Part]] = defaultdict(list)
    for part in chain.from_iterable(parts.values()):
        if part.is_packed:
            to_come[part.module].append(part)
    matrices: dict[nn.Module, Tensor] = {}
    for name, tensor in tensors:
        for part in parts[name]:
            if not part.is_packed:
                part.parameter[part.rows].copy_(tensor[part.index])
                continue
            module = part.module
            if module not in matrices:
                matrices[module] = _matrix_of(module)
            matrices[module][part.rows].copy_(tensor[part.index])
            to_come[module].remove(part)
            if not to_come[module]:
                _pack(module, matrices.pop(module))
    for module, matrix in matrices.items():
        for part in to_come[module]:
            matrix[part.rows].copy_(part.read())
        _pack(module, matrix)


def _matrix_of(module: Any) -> Tensor:
    """The matrix that a module packs; its own where it still has it."""
    held = module.weight.data
    if held.numel():
        return held
    return held.new_empty(module.output_size_per_partition, module.input_size_per_partition)


def _pack(module: Any, matrix: Tensor) -> None:
    module.weight = nn.Parameter(matrix, requires_grad=False)
    module.quant_method.process_weights_after_loading(module)


def find_parts(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
    """What a worker's model holds of each of the tensors with these names and shapes; a tied table is there twice.

    Raises:
        KeyError: the model has no place for a tensor.
    """
    modules = dict(model.named_modules())
    parts = {name: [_part_of(model, modules, name, shape)] for name, shape in shapes.items()}
    output: Any = model.language_model.lm_head
    if not any(part.module is output for (part,) in parts.values()):
        (tied,) = (of_tensor for name, of_tensor in parts.items() if name.endswith("embed_tokens.weight"))
        tied.append(replace(tied[0], module=output, multiplies=hasattr(output, "cpu_linear")))
    return parts


def uncovered(model: Any, parts: Iterable[Part]) -> list[str]:
    """Return the rows of a worker's parameters that none of the parts, or several, are for; a line a parameter.

    Rows are counted, and not names: of a matrix that holds queries, keys and values, one that comes without its keys
    would leave the engine with old ones. Rows that pad the vocabulary are nobody's.
    """
    spans: dict[tuple[int, str], list[slice]] = defaultdict(list)
    for part in parts:
        spans[id(part.module), part.leaf].append(part.rows)
    lines = []
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            num_rows = _num_rows(module, leaf, parameter)
            end, wrong = 0, []
            for start, stop in sorted(rows.indices(num_rows)[:2] for rows in spans[id(module), leaf]):
                if start != end:
                    wrong.append(f"{min(start, end)} to {max(start, end)}")
                end = max(end, stop)
            if end != num_rows:
                wrong.append(f"{end} to {num_rows}")
            if wrong:
                lines.append(f"{path}.{leaf}".removeprefix(".") + f" (of {num_rows} rows: {', '.join(wrong)})")
    return lines


def _num_rows(module: Any, leaf: str, parameter: Tensor) -> int:
    """Return the number of rows that a module's parameter has or, where it was packed and dropped, had."""
    if hasattr(module, "shard_indices"):
        return module.shard_indices.num_org_elements
    if parameter.numel() == 0 and leaf == "weight":
        return module.output_size_per_partition
    return len(parameter) if parameter.dim() else 1


def _part_of(model: Any, modules: dict[str, nn.Module], name: str, shape: tuple[int, ...]) -> Part:
    (path,) = model.hf_to_vllm_mapper.apply_list([name])
    path, _, leaf = path.rpartition(".")
    parent, _, last = path.rpartition(".")
    fused, place = next(((fused, names.index(last)) for fused, names in _FUSED.items() if last in names), (last, 0))
    path = f"{parent}.{fused}" if parent else fused
    if path not in modules or leaf not in dict(modules[path].named_parameters(recurse=False)):
        raise KeyError(f"vLLM's model has no {path}.{leaf} for {name}")
    module: Any = modules[path]
    index, rows = _cut(module, leaf, place, shape)
    # A table is looked up, although it may have been packed as well.
    multiplies = leaf == "weight" and hasattr(module, "cpu_linear") and not path.endswith("embed_tokens")
    return Part(index, module, leaf, rows, multiplies)


def _cut(module: Any, leaf: str, place: int, shape: tuple[int, ...]) -> tuple[Index, slice]:
    """Which part of a whole tensor this rank's module has, and in which rows of its parameter."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    whole, everything = tuple(slice(0, size) for size in shape), slice(None)
    if isinstance(module, VocabParallelEmbedding):
        first, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        return (slice(first, end), *whole[1:]), slice(0, end - first)
    if isinstance(module, QKVParallelLinear):
        queries, keys = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        sizes = [queries, keys, keys]
        part = module.tp_rank if place == 0 else module.tp_rank // module.num_kv_head_replicas
    elif isinstance(module, MergedColumnParallelLinear):
        sizes, part = [size // module.tp_size for size in module.output_sizes], module.tp_rank
    elif isinstance(module, ColumnParallelLinear):
        sizes, part = [shape[0] // module.tp_size], module.tp_rank
    elif isinstance(module, RowParallelLinear) and leaf == "weight":
        columns = shape[1] // module.tp_size
        return (whole[0], slice(module.tp_rank * columns, (module.tp_rank + 1) * columns)), everything
    else:
        return whole, everything
    before, size = sum(sizes[:place]), sizes[place]
    return (slice(part * size, (part + 1) * size), *whole[1:]), slice(before, before + size)
