"""Faults that a converter, a disk or a hand may put into a directory of weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_mm.weights.files import INDEX
from megatron_mm.weights.tables import LANGUAGE, PROJECTOR, VISION

Tensors = dict[str, torch.Tensor]
VISION_LAYERS, LAYERS = f"{VISION}encoder.layers.", f"{LANGUAGE}layers."


def _file_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"][name]


def _change(directory: Path, *names: str, how: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Replace tensors by what `how` makes of them."""
    read = []
    for name in names:
        with safe_open(_file_of(directory, name), framework="pt") as file:
            read.append(file.get_tensor(name).clone())
    for name, tensor in zip(names, how(*read), strict=True):
        path = _file_of(directory, name)
        content = _content(path)
        content[name] = tensor.clone().contiguous()
        save_file(content, path, metadata={"format": "pt"})


def _content(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)


def _swap(*names: str) -> Callable[[Path], None]:
    return lambda directory: _change(directory, *names, how=lambda one, other: (other, one))


def _one_ulp(tensor: torch.Tensor) -> tuple[torch.Tensor]:
    tensor[3] = torch.nextafter(tensor[3], torch.full_like(tensor[3], torch.inf))
    return (tensor,)


def _exchange_layers(directory: Path) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        names = [name for name in _content(file) if name.startswith(f"{LAYERS}1.")]
        for name in names:
            _swap(name, name.replace(f"{LAYERS}1.", f"{LAYERS}2."))(directory)


def _drop(directory: Path, name: str) -> None:
    path = _file_of(directory, name)
    content = _content(path)
    del content[name]
    save_file(content, path, metadata={"format": "pt"})
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"][name]
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _truncate(directory: Path) -> None:
    path = _file_of(directory, f"{LANGUAGE}norm.weight")
    path.write_bytes(path.read_bytes()[:-100])


def _lie(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    here = index["weight_map"][f"{LANGUAGE}norm.weight"]
    index["weight_map"][f"{LANGUAGE}norm.weight"] = next(file for file in files if file != here)
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


ATTENTION = f"{VISION_LAYERS}0.self_attn."
MLP = f"{LAYERS}1.mlp."
# Name -> (what it does to a directory, the tensors that differ then).
VALUES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a zeroed tensor": (
        lambda directory: _change(directory, f"{MLP}down_proj.weight", how=lambda tensor: (tensor * 0,)),
        {f"{MLP}down_proj.weight"},
    ),
    "q and k swapped": (
        _swap(f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight"),
        {f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight"},
    ),
    "gate and up swapped": (
        _swap(f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"),
        {f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"},
    ),
    "a transposed square matrix": (
        lambda directory: _change(directory, f"{PROJECTOR}linear_2.weight", how=lambda tensor: (tensor.T,)),
        {f"{PROJECTOR}linear_2.weight"},
    ),
    "one row changed by one ulp": (
        lambda directory: _change(directory, f"{LANGUAGE}embed_tokens.weight", how=_one_ulp),
        {f"{LANGUAGE}embed_tokens.weight"},
    ),
    "a dropped bias": (
        lambda directory: _drop(directory, f"{ATTENTION}v_proj.bias"),
        {f"{ATTENTION}v_proj.bias"},
    ),
    "two layers exchanged": (
        _exchange_layers,
        {
            f"{LAYERS}{layer}.{name}.weight"
            for layer in (1, 2)
            for name in (
                *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
                *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
                *("input_layernorm", "post_attention_layernorm"),
            )
        },
    ),
}
# Name -> (what it does to a directory, what the message says).
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (lambda directory: sorted(directory.glob("*.safetensors"))[1].unlink(), "names files that are"),
    "a truncated file": (_truncate, "is cut off or damaged"),
    "an index that lies": (_lie, f"{LANGUAGE}norm.weight is said to be in"),
}
