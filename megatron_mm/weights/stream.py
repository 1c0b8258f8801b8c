"""The table run over a live, sharded model, both ways, in bounded memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.models.language import first_expert
from megatron_mm.models.vision import POSITIONS, fitted_positions
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.weights.mapping import Readable, Rule, hf_shapes
from megatron_mm.weights.sizes import groups_up_to, numel

LAYERS = "language.decoder.layers."
EXPERTS = "mlp.experts.local_experts."
EMBEDDING_TABLE, TIED_COPY = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
# Of whole tensors; large enough that a message's start costs nothing, small beside any rank's share of a model.
BUCKET_BYTES = 128 * 2**20
# A parameter that every tensor-parallel rank holds is gathered along with its neighbours up to this size: norms and
# biases stand between all matrices, and would cut the buckets into single tensors.
SMALL = 2**16


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


@dataclass(frozen=True, slots=True)
class _Route:
    """How a parameter comes to all ranks.

    Attributes:
        stage: pipeline stage that has it.
        expert_rank: expert-parallel rank that has it, None where all of them do.
        gathered: whether the shards of all tensor-parallel ranks are wanted.
    """

    stage: int
    expert_rank: int | None
    gathered: bool
    dtype: torch.dtype


@torch.no_grad()
def to_hf(
    chunks: Sequence[VisionLanguageModel],
    table: Sequence[Rule],
    bucket_bytes: int = BUCKET_BYTES,
    own: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) in the order of the table, on every rank; all ranks run it together.

    Parameters travel in buckets. A rank holds one bucket of whole tensors, or one parameter where that is larger, and
    its own part of it a second time. Tensors may be views of buckets or of the model: copy what is kept.

    Args:
        own: parameters, the same on all ranks, of which each tensor-parallel rank only wants what it holds. They are
            not gathered: what belongs to other ranks is not filled in.
    """
    parameters, groups = parameters_by_name(chunks), chunks[0].groups
    device = next(chunks[0].parameters()).device
    ranks = groups.tp.size()
    routes = _routes(parameters, table, groups, own)
    for route, rules in groupby(table, lambda rule: routes[rule.megatron]):
        for bucket in _buckets(rules, ranks, route, bucket_bytes):
            shapes = [rule.shard_shape(ranks) for rule in bucket]
            shards = [parameters.get(rule.megatron) for rule in bucket]
            of_ranks = _exchange(shards, [torch.Size(shape) for shape in shapes], route, device, groups)
            # Emptied as it is handed on, so that the bucket is gone before the next one is made.
            while of_ranks:
                rule, parts = bucket[-len(of_ranks)], of_ranks.pop(0)
                if rule.axis is not None and rule.megatron in own and ranks > 1:
                    yield from _in_place(rule, parts[0], groups.tp.rank(), ranks)
                else:
                    yield from _joined(rule, parts)


@torch.no_grad()
def from_hf(
    chunks: Sequence[VisionLanguageModel], table: Sequence[Rule], tensors: Mapping[str, Readable], where: str = ""
) -> None:
    """Copy Hugging Face tensors into this rank's parameters; of tensors in files only this rank's parts are read.

    A position table of another tile size is interpolated to the model's, and a warning says so.

    Args:
        where: what the tensors are of, for messages.

    Raises:
        InputError: a tensor is missing, has the wrong shape or dtype, or would be left over.
    """
    check_tensors(table, tensors, where)
    parameters, groups = parameters_by_name(chunks), chunks[0].groups
    rank, ranks = groups.tp.rank(), groups.tp.size()
    last, filled = chunks[-1], set[str]()
    for rule in table:
        names = [rule.megatron]
        if rule.megatron == EMBEDDING_TABLE and last.share_embeddings_and_output_weights and last.post_process:
            names.append(TIED_COPY)  # where the last stage is not the first, it has its own copy
        mine = [name for name in names if name in parameters]
        if not mine:
            continue
        shard = shard_of(rule, tensors, rank, ranks)
        for name in mine:
            parameter = parameters[name]
            if shard.dtype != parameter.dtype:
                raise InputError(
                    f"{where} {rule.hf[0]} is {dtype_name(shard.dtype)} and the model {dtype_name(parameter.dtype)}; "
                    "import the weights with --dtype, or set precision to theirs"
                )
            assert shard.shape == parameter.shape, f"{name} is {parameter.shape}, the table makes {shard.shape}"
            parameter.copy_(shard)
            filled.add(name)
    left = parameters.keys() - filled
    assert not left, f"no rule fills {sorted(left)}"


def shard_of(rule: Rule, tensors: Mapping[str, Readable], rank: int, ranks: int) -> Tensor:
    """What tensor-parallel rank `rank` of `ranks` holds of a rule's parameter, position tables fitted."""
    shard = rule.shard([tensors[name] for name in rule.hf], rank, ranks)
    if rule.megatron == POSITIONS:
        ((num_patches, _),) = rule.shapes
        shard = fitted_positions(shard, num_patches, rule.hf[0])
    return shard


def check_tensors(table: Iterable[Rule], tensors: Mapping[str, Readable], where: str = "") -> None:
    """Compare names and shapes of Hugging Face tensors with the table's, and report every difference.

    Raises:
        InputError: a tensor is missing, has the wrong shape, or would be left over.
    """
    shapes = hf_shapes(table)
    positions = {rule.hf[0] for rule in table if rule.megatron == POSITIONS}
    faults = [f"it lacks {name} {list(shapes[name])}" for name in shapes if name not in tensors]
    faults += [f"the model has no {name}" for name in sorted(tensors.keys() - shapes.keys())]
    for name, shape in shapes.items():
        seen = tuple(tensors[name].shape) if name in tensors else shape
        fits = seen == shape or (name in positions and len(seen) == 2 and seen[1] == shape[1])
        if not fits:
            faults.append(f"{name} is {list(seen)}; the model's is {list(shape)}")
    if faults:
        raise InputError("\n".join([f"{where or 'the weights'} do not fit the model:", *faults]))


def dtype_name(dtype: torch.dtype) -> str:
    """As --dtype takes it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def _joined(rule: Rule, of_ranks: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return zip(rule.hf, rule.join(of_ranks if rule.axis is not None else of_ranks[:1]), strict=True)


def _in_place(rule: Rule, shard: Tensor, rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of which one rank's part is filled in."""
    for name, shape, part in zip(rule.hf, rule.shapes, rule.to_hf(shard), strict=True):
        index = rule.index(shape, rank, ranks)
        whole = part.new_empty(shape)
        whole[index] = part[tuple(slice(0, size) for size in whole[index].shape)]
        yield name, whole


def _routes(
    parameters: Mapping[str, Tensor], table: Sequence[Rule], groups: ProcessGroupCollection, own: Collection[str]
) -> dict[str, _Route]:
    """Where each parameter of the table lies; all ranks call it together."""
    mine = {name: (EXPERTS in name, parameter.dtype) for name, parameter in parameters.items()}
    # An expert lies on one expert-parallel rank of its stage, everything else on all of them.
    of_experts: list[Any] = [None] * groups.ep.size()
    dist.all_gather_object(of_experts, list(mine.items()), group=groups.ep)
    experts = {name: rank for rank, held in enumerate(of_experts) for name, (expert, _) in held if expert}
    held = dict(entry for of_rank in of_experts for entry in of_rank)
    of_stages: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(of_stages, (held, experts), group=groups.pp)
    ranks = groups.tp.size()
    cut_modules = {_module(rule) for rule in table if rule.axis is not None} if ranks > 1 else set()
    routes = {}
    for rule in table:
        name = rule.megatron
        stage = next(stage for stage, (held, _) in enumerate(of_stages) if name in held)
        held, experts = of_stages[stage]
        gathered = _module(rule) in cut_modules and (rule.axis is not None or numel(rule.shard_shape(ranks)) <= SMALL)
        gathered &= name not in own
        routes[name] = _Route(stage, experts.get(name), gathered, held[name][1])
    return routes


def _module(rule: Rule) -> str:
    return rule.megatron.split(".", 1)[0]


def _buckets(rules: Iterable[Rule], ranks: int, route: _Route, limit: int) -> Iterator[list[Rule]]:
    """Rules in a row whose parameters, as far as they are gathered, are together at most `limit` bytes, or single."""
    parts = ranks if route.gathered else 1
    return groups_up_to(limit, rules, lambda rule: numel(rule.shard_shape(ranks)) * route.dtype.itemsize * parts)


def _exchange(
    shards: Sequence[Tensor | None],
    shapes: Sequence[torch.Size],
    route: _Route,
    device: torch.device,
    groups: ProcessGroupCollection,
) -> list[list[Tensor]]:
    """Each parameter's shards of all tensor-parallel ranks, or this rank's alone where they are not gathered."""
    here = [shard.detach() for shard in shards if shard is not None]
    travels = groups.pp.size() > 1 or (route.expert_rank is not None and groups.ep.size() > 1)
    if not travels and not route.gathered:
        return [[shard] for shard in here]
    sizes = [shape.numel() for shape in shapes]
    if len(here) == len(shapes):
        buffer = torch.cat([shard.reshape(-1) for shard in here])
    else:
        buffer = torch.empty(sum(sizes), dtype=route.dtype, device=device)
    if route.expert_rank is not None and groups.ep.size() > 1:
        _broadcast(buffer, route.expert_rank, groups.ep)
    if groups.pp.size() > 1:
        _broadcast(buffer, route.stage, groups.pp)
    buffers = [buffer]
    if route.gathered:
        buffers = [torch.empty_like(buffer) for _ in range(groups.tp.size())]
        dist.all_gather(buffers, buffer, group=groups.tp)
    of_ranks = [
        [flat.view(shape) for flat, shape in zip(of_rank.split(sizes), shapes, strict=True)] for of_rank in buffers
    ]
    return [list(parts) for parts in zip(*of_ranks, strict=True)]


def _broadcast(buffer: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(buffer, dist.get_global_rank(group, owner), group=group)
