"""HF -> Megatron -> HF is exact in every layout, and so is resharding between any two."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.weights import mapping, stream
from megatron_mm.weights.tables import LANGUAGE
from tests.conversion import (
    EXPERT_LAYOUTS,
    EXPERT_MODEL,
    LAYOUTS,
    MODELS,
    R4B,
    Overrides,
    conversion_config,
    save_with_transformers,
    through_every_layout,
)
from tests.ranks import run_alone, run_on_ranks


def _check(tmp_path: Path, tokenizer: ChatTokenizer, model: Overrides, layouts: dict[str, Overrides]) -> None:
    directory = tmp_path / "model"
    save_with_transformers(directory, conversion_config(**model), tokenizer)
    configs = {name: conversion_config(**{**model, **layout}) for name, layout in layouts.items()}
    for wrong in run_on_ranks(through_every_layout, 4, directory, configs, tmp_path):
        assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_holds_the_files_bits_and_hands_them_to_every_other(
    model: str, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    _check(tmp_path, tokenizer, MODELS[model], LAYOUTS)


def test_layouts_hold_the_files_bits_and_hand_them_to_each_other(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    some = ("one piece", "PP 2 uneven", "TP 2 x PP 2 interleaved", "TP 4, vision data-parallel")
    _check(tmp_path, tokenizer, MODELS["R-4B, tied, fp32"], {name: LAYOUTS[name] for name in some})


def test_models_with_experts(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    _check(tmp_path, tokenizer, EXPERT_MODEL, EXPERT_LAYOUTS)


def _faults() -> dict[str, tuple[object, str, Callable[..., Any]]]:
    """Name -> what is broken: owner, attribute, and what stands there then."""
    take_apart, fill = mapping.FusedQkv.to_hf, stream.shard_of

    def swapped(self: mapping.FusedQkv, shard: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = take_apart(self, shard)
        return (key, query, value) if key.shape == query.shape else (query, key, value)

    def transposed(self: mapping.Rule, shard: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del self
        return (shard.T if shard.ndim == 2 and shard.shape[0] == shard.shape[1] else shard,)

    def of_another_layer(rule: mapping.Rule, *arguments: Any) -> torch.Tensor:
        names = tuple(name.replace(f"{LANGUAGE}layers.1.", f"{LANGUAGE}layers.2.") for name in rule.hf)
        return fill(dataclasses.replace(rule, hf=names), *arguments)

    def zeroed(rule: mapping.Rule, *arguments: Any) -> torch.Tensor:
        return fill(rule, *arguments) * (not rule.megatron.endswith("q_layernorm.weight"))

    def one_ulp(rule: mapping.Rule, *arguments: Any) -> torch.Tensor:
        shard = fill(rule, *arguments).clone()
        if rule.megatron == "fusion.image_newline":
            shard[0] = torch.nextafter(shard[0], torch.tensor(torch.inf))
        return shard

    return {
        "q and k swapped": (mapping.FusedQkv, "to_hf", swapped),
        "gate and up swapped": (mapping.GatedMlp, "to_hf", lambda _, shard: shard.chunk(2)[::-1]),
        "a square matrix transposed": (mapping.Rule, "to_hf", transposed),
        "a layer taken for another": (stream, "shard_of", of_another_layer),
        "a zeroed tensor": (stream, "shard_of", zeroed),
        "one value an ulp off": (stream, "shard_of", one_ulp),
        "rows of the padding kept": (mapping.PaddedVocabulary, "join", lambda _, shards: (shards[0],)),
    }


def _caught(directory: Path, config: RunConfig, folder: Path) -> dict[str, bool]:
    """Whether each fault shows in what goes in and comes out. Runs in a process of its own."""
    found = {"no fault": bool(through_every_layout(directory, {"one piece": config}, folder / "none"))}
    for number, (name, (owner, attribute, broken)) in enumerate(_faults().items()):
        whole = getattr(owner, attribute)
        setattr(owner, attribute, broken)
        found[name] = bool(through_every_layout(directory, {"one piece": config}, folder / str(number)))
        setattr(owner, attribute, whole)
    return found


def test_planted_faults_are_caught(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    config = conversion_config(**R4B)
    save_with_transformers(tmp_path / "model", config, tokenizer)
    caught = run_alone(_caught, tmp_path / "model", config, tmp_path)
    assert not caught.pop("no fault")
    assert all(caught.values()), caught
