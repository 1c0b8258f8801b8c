"""The weights that a vLLM worker computes with: loading them, and reading them back to be compared.

On the CPU vLLM packs matrices for its kernels and drops the originals, so a packed one is read by what it makes of the
unit vectors. One term of every sum is not zero then, so nothing is rounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
        name: of the tensor.
        index: of the part in the whole tensor.
        module: of vLLM's that holds it.
        leaf: the module's parameter.
        rows: of the parameter; it may hold several tensors below each other.
        multiplies: whether the module multiplies by it, and so may have packed it.
    """

    name: str
    index: Index
    module: nn.Module
    leaf: str
    rows: slice
    multiplies: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return getattr(self.module, self.leaf).dtype

    def read(self) -> Tensor:
        """The part as it is computed with."""
        parameter = getattr(self.module, self.leaf)
        if not self.multiplies or not _is_packed(self.module):
            return parameter.data[self.rows]
        module: Any = self.module
        columns = module.embedding_dim if hasattr(module, "embedding_dim") else module.input_size_per_partition
        units = torch.eye(columns, dtype=parameter.dtype, device=parameter.device)
        return module.quant_method.apply(module, units, None)[:, self.rows].T


def _is_packed(module: Any) -> bool:
    """Whether it may multiply by anything but its parameter: a function that keeps nothing of its own cannot.

    vLLM 0.32 has such a function where oneDNN has no kernel, as for bf16 on CPUs without instructions for it.
    """
    multiply = module.cpu_linear
    return not isinstance(multiply, FunctionType) or bool(multiply.__closure__ or multiply.__defaults__)


def load_weights(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Bring whole tensors, by their Hugging Face names, into a worker; all ranks of its group do it together."""
    worker.reload_weights(weights_iterator=tensors)
    # A tied output matrix is no layer of its own to vLLM's reloading, and its packed copy stays what it was.
    output = worker.get_model().language_model.lm_head
    output.quant_method.process_weights_after_loading(output)


def find_parts(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """What a worker's model holds of the tensors with these names and shapes; a tied table is there twice.

    Raises:
        KeyError: the model has no place for a tensor.
    """
    modules = dict(model.named_modules())
    parts = [_part_of(model, modules, name, shape) for name, shape in shapes.items()]
    output: Any = model.language_model.lm_head
    if not any(part.module is output for part in parts):
        (table,) = (part for part in parts if part.name.endswith("embed_tokens.weight"))
        parts.append(replace(table, module=output, multiplies=hasattr(output, "cpu_linear")))
    return parts


def uncovered(model: Any, parts: Iterable[Part]) -> list[str]:
    """Parameters of a worker's model that no part belongs to."""
    known = {(id(part.module), part.leaf) for part in parts}
    return [
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if (id(module), leaf) not in known
    ]


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
    return Part(name, index, module, leaf, rows, multiplies)


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
