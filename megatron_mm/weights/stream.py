"""The table run over a live, sharded model, both ways. One parameter is whole at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.models.vision import POSITIONS, fitted_positions
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.weights.mapping import Rule


def parameters_by_name(chunks: Sequence[VisionLanguageModel]) -> dict[str, Tensor]:
    """This rank's parameters, layers numbered over the whole model instead of the chunk."""
    prefix = "language.decoder.layers."
    named = {}
    for chunk in chunks:
        layers: Any = chunk.language.decoder.layers
        for name, parameter in chunk.named_parameters():
            if name.startswith(prefix):
                number, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{layers[int(number)].layer_number - 1}.{rest}"
            named[name] = parameter
    return named


@torch.no_grad()
def to_hf(chunks: Sequence[VisionLanguageModel], table: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) on every rank; all ranks must run it together."""
    parameters, groups = parameters_by_name(chunks), chunks[0].groups
    owners = _owning_stages(parameters, groups)
    device = next(chunks[0].parameters()).device
    for rule in table:
        shard = _from_stage(owners[rule.megatron], parameters.get(rule.megatron), device, groups)
        yield from zip(rule.hf, rule.to_hf(rule.join(_gather(shard, rule, groups))), strict=True)


@torch.no_grad()
def from_hf(chunks: Sequence[VisionLanguageModel], table: list[Rule], tensors: Mapping[str, Tensor]) -> None:
    """Copy Hugging Face tensors into this rank's parameters.

    A position table of another tile size is interpolated to the model's, and a warning says so.

    Raises:
        InputError: a tensor is missing, has the wrong shape, or would be left over.
    """
    wanted = {name for rule in table for name in rule.hf}
    missing, unused = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or unused:
        raise InputError(f"the tensors do not fit the model: missing {missing or 'none'}, left over {unused or 'none'}")
    parameters, groups = parameters_by_name(chunks), chunks[0].groups
    for rule in table:
        parameter = parameters.get(rule.megatron)
        if parameter is None:
            continue  # lives on another pipeline stage
        whole = rule.to_megatron([tensors[name] for name in rule.hf])
        if rule.megatron == POSITIONS:
            whole = fitted_positions(whole, len(parameter), rule.hf[0])
        shard = rule.shard(whole, groups.tp.rank(), groups.tp.size())
        if shard.shape != parameter.shape:
            shapes = {name: list(tensors[name].shape) for name in rule.hf}
            raise InputError(f"{shapes} do not fill {rule.megatron}, which takes {list(parameter.shape)} on this rank")
        parameter.copy_(shard)
    last = chunks[-1]
    if last.post_process and not last.pre_process and last.share_embeddings_and_output_weights:
        # The last stage's own copy of the tied embedding.
        (embedding,) = (rule for rule in table if rule.megatron == "language.embedding.word_embeddings.weight")
        whole = tensors[embedding.hf[0]]
        parameters["language.output_layer.weight"].copy_(embedding.shard(whole, groups.tp.rank(), groups.tp.size()))


def _owning_stages(parameters: Mapping[str, Tensor], groups: ProcessGroupCollection) -> dict[str, int]:
    """First pipeline stage that holds each parameter."""
    names: list[list[str] | None] = [None] * groups.pp.size()
    dist.all_gather_object(names, list(parameters), group=groups.pp)
    return {name: stage for stage in reversed(range(len(names))) for name in names[stage] or ()}


def _from_stage(stage: int, shard: Tensor | None, device: torch.device, groups: ProcessGroupCollection) -> Tensor:
    """The shard that `stage` holds, on every stage."""
    if groups.pp.size() == 1:
        assert shard is not None
        return shard
    source = dist.get_global_rank(groups.pp, stage)
    mine = groups.pp.rank() == stage
    form = [(shard.shape, shard.dtype) if mine and shard is not None else None]
    dist.broadcast_object_list(form, source, group=groups.pp)
    assert form[0] is not None
    shape, dtype = form[0]
    buffer = shard.detach().clone() if mine and shard is not None else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(buffer, source, group=groups.pp)
    return buffer


def _gather(shard: Tensor, rule: Rule, groups: ProcessGroupCollection) -> list[Tensor]:
    """The shards of all tensor-parallel ranks."""
    if rule.axis is None or groups.tp.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(groups.tp.size())]
    dist.all_gather(shards, shard.contiguous(), group=groups.tp)
    return shards
