"""The table run over a live, sharded model, both ways. One parameter is whole at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.models.language import first_expert
from megatron_mm.models.vision import POSITIONS, fitted_positions
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.weights.mapping import Rule

LAYERS = "language.decoder.layers."
EXPERTS = "mlp.experts.local_experts."


def parameters_by_name(chunks: Sequence[VisionLanguageModel]) -> dict[str, Tensor]:
    """This rank's parameters, layers and experts numbered over the whole model instead of the chunk and the rank."""
    return {
        _global_name(name, chunk.language.decoder.layers): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _global_name(name: str, layers: Any) -> str:
    if not name.startswith(LAYERS):
        return name
    place, rest = name.removeprefix(LAYERS).split(".", 1)
    layer = layers[int(place)]
    if rest.startswith(EXPERTS):
        expert, rest = rest.removeprefix(EXPERTS).split(".", 1)
        rest = f"{EXPERTS}{first_expert(layer) + int(expert)}.{rest}"
    return f"{LAYERS}{layer.layer_number - 1}.{rest}"


@torch.no_grad()
def to_hf(chunks: Sequence[VisionLanguageModel], table: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) on every rank; all ranks must run it together."""
    parameters, groups = parameters_by_name(chunks), chunks[0].groups
    device = next(chunks[0].parameters()).device
    # An expert lies on one expert-parallel rank of its stage, everything else on all of them.
    expert_ranks = _owners((name for name in parameters if EXPERTS in name), groups.ep)
    stages = _owners((*parameters, *expert_ranks), groups.pp)
    for rule in table:
        shard = parameters.get(rule.megatron)
        if rule.megatron in expert_ranks:
            shard = _from_owner(expert_ranks[rule.megatron], shard, device, groups.ep)
        shard = _from_owner(stages[rule.megatron], shard, device, groups.pp)
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


def _owners(names: Iterable[str], group: dist.ProcessGroup) -> dict[str, int]:
    """First rank of the group that has each of the names."""
    of_ranks: list[list[str] | None] = [None] * group.size()
    dist.all_gather_object(of_ranks, list(names), group=group)
    return {name: rank for rank in reversed(range(len(of_ranks))) for name in of_ranks[rank] or ()}


def _from_owner(owner: int, shard: Tensor | None, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """The shard that rank `owner` of the group holds, on every rank of it."""
    if group.size() == 1:
        assert shard is not None
        return shard
    source = dist.get_global_rank(group, owner)
    mine = group.rank() == owner
    form = [(shard.shape, shard.dtype) if mine and shard is not None else None]
    dist.broadcast_object_list(form, source, group=group)
    assert form[0] is not None
    shape, dtype = form[0]
    buffer = shard.detach().clone() if mine and shard is not None else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(buffer, source, group=group)
    return buffer


def _gather(shard: Tensor, rule: Rule, groups: ProcessGroupCollection) -> list[Tensor]:
    """The shards of all tensor-parallel ranks."""
    if rule.axis is None or groups.tp.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(groups.tp.size())]
    dist.all_gather(shards, shard.contiguous(), group=groups.tp)
    return shards
