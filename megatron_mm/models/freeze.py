"""Which modules learn, under the names that the config gives them."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch.nn import Parameter

from megatron_mm.config.schema import MODULES, Module
from megatron_mm.models.vlm import VisionLanguageModel

# The newline vector is learned with the projector: both stand between the ViT and the language model.
_PREFIXES: dict[str, Module] = {
    "vision.": "vision",
    "projector.": "projector",
    "fusion.": "projector",
    "language.embedding.": "embeddings",
    "language.output_layer.": "embeddings",
    "language.": "language",
}


def module_of(name: str) -> Module:
    """The module that a parameter of VisionLanguageModel belongs to."""
    return next(module for prefix, module in _PREFIXES.items() if name.startswith(prefix))


def freeze_all_but(chunks: Sequence[VisionLanguageModel], trained: Iterable[str]) -> None:
    """Let only the modules `trained` learn. Call before Megatron-Core's DDP makes its gradient buffers."""
    trained = set(trained)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(module_of(name) in trained)


def num_trained(chunks: Sequence[VisionLanguageModel]) -> dict[str, int]:
    """Trained parameters of each module over the whole model, padding of the vocabulary included; all ranks call it."""
    groups = chunks[0].groups
    device = next(chunks[0].parameters()).device
    dense, experts = torch.zeros(2, len(MODULES), dtype=torch.int64, device=device)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            if not getattr(parameter, "allreduce", True):
                experts[MODULES.index(module_of(name))] += parameter.numel() * groups.ep.size()
            elif _is_counted(parameter, groups.tp):
                dense[MODULES.index(module_of(name))] += parameter.numel()
    dist.all_reduce(dense, group=groups.mp)
    dist.all_reduce(experts, group=groups.pp)
    return dict(zip(MODULES, (dense + experts).tolist(), strict=True))


def _is_counted(parameter: Parameter, tensor_group: dist.ProcessGroup) -> bool:
    """Whether this rank's part is no copy of another's, be it of a tensor-parallel rank or of the tied embedding."""
    is_copy = getattr(parameter, "shared", False)
    return not is_copy and param_is_not_tensor_parallel_duplicate(parameter, tensor_group)
