"""Directories of safetensors: what is refused, and what a write leaves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mm.config.errors import InputError
from megatron_mm.weights.files import INDEX, SINGLE, check_types, open_directory, same_bits, write_shards

SHAPES = [("a", (4, 8)), ("b", (16,)), ("c", (2, 8))]
TENSORS = {name: torch.randn(shape) for name, shape in SHAPES}


def _refusal(directory: Path) -> str:
    with pytest.raises(InputError) as raised:
        open_directory(directory)
    return str(raised.value)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    message = _refusal(tmp_path)
    assert "pickle files (pytorch_model.bin), which run code" in message
    assert "save the model as safetensors first" in message


def test_what_is_no_directory_of_weights_is_refused(tmp_path: Path) -> None:
    assert "is not a directory" in _refusal(tmp_path / "nothing")
    assert f"no safetensors file in {tmp_path}" in _refusal(tmp_path)


@pytest.mark.parametrize("names", [("model-00001-of-00002",), ("model-00001-of-00002", "model-00002-of-00002")])
def test_several_files_want_an_index(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert f"but no {INDEX}; copy it as well" in _refusal(tmp_path)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(2)}, tmp_path / SINGLE)
    with pytest.raises(InputError) as raised:
        check_types(open_directory(tmp_path))
    assert str(raised.value).splitlines() == [
        "types that are not supported; dequantise the model first:",
        f"a in {tmp_path / SINGLE} is torch.int8",
    ]


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), SHAPES, torch.float32, shard_bytes=128)
    (tmp_path / INDEX).write_text("{}", encoding="utf-8")
    assert "is no index of safetensors files" in _refusal(tmp_path)


def test_what_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), SHAPES, torch.float32, shard_bytes=128)
    save_file({"d": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "more.safetensors")
    message = _refusal(tmp_path)
    assert "d in more.safetensors is not listed" in message
    assert "a is in two files" in message


def test_shards_are_no_larger_than_asked_and_listed(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), SHAPES, torch.float32, shard_bytes=128)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 256}, "weight_map": {"a": first, "b": second, "c": second}}
    found = open_directory(tmp_path)
    assert all(torch.equal(found[name][(slice(None),)], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(found["a"][(slice(None), slice(2, 5))], TENSORS["a"][:, 2:5])


def test_one_file_has_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), SHAPES, torch.float32, shard_bytes=10**6)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
    assert load_file(tmp_path / SINGLE).keys() == TENSORS.keys()


def test_a_tensor_that_was_not_planned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b came for a"):
        write_shards(tmp_path, [("b", TENSORS["b"])], SHAPES, torch.float32, shard_bytes=10**6)
    with pytest.raises(AssertionError, match="d is not in the plan"):
        write_shards(tmp_path, [*TENSORS.items(), ("d", TENSORS["b"])], SHAPES, torch.float32, shard_bytes=10**6)


def test_bits_are_compared_not_numbers() -> None:
    nan, zero = torch.tensor([torch.nan]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero.bfloat16(), -zero.bfloat16())
