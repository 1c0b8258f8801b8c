"""Both layer backends build the same model: names, shapes, marks, and what a checkpoint says of each parameter."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_mm.checkpoint.store import model_state
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel, build_model, build_skeleton
from megatron_mm.parallel import state
from megatron_mm.parallel.platform.cpu import CpuPlatform
from tests.gpu_contract.gpu_stand_in import TransformerEnginePlatform, seen_gpu
from tests.layouts import EXPERTS
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu_contract

# What Megatron-Core's optimizer, gradient sums and clipping ask a parameter for, and take where it does not say.
MARKS: dict[str, Any] = {
    "tensor_model_parallel": False,
    "sequence_parallel": False,
    "allreduce": True,
    "average_gradients_across_tp_domain": False,
    "shared": False,
}
# Of parameters that are tensor-parallel.
PARTITION = ("partition_dim", "partition_stride")
R4B = ("data.path=unused", "init_from=unused", "run_dir=unused")


def _r4b(*overrides: str) -> RunConfig:
    return load_config("r4b/stage3", [], [*R4B, "parallel.tensor=1", "parallel.sequence=false", *overrides])


TWO_RANKS: dict[str, Any] = {"parallel__tensor": 2, "precision": "bf16"}
CASES = {
    "mini": (1, tiny_config(precision="bf16")),
    "mini, fp32, untied": (1, tiny_config(model__language__tied_embeddings=False)),
    "mini, FP8": (1, tiny_config(precision="bf16", fp8__recipe="delayed")),
    "experts": (1, tiny_config(precision="bf16", **EXPERTS)),
    "r4b": (1, _r4b()),
    "mini, tensor 2": (2, tiny_config(**TWO_RANKS)),
    "mini, tensor 2, sequence": (2, tiny_config(**TWO_RANKS, parallel__sequence="true")),
    "mini, tensor 2, tiles shared out": (2, tiny_config(**TWO_RANKS, model__vision__parallel="data")),
    "mini, pipeline 2": (2, tiny_config(parallel__pipeline=2, precision="bf16")),
    "experts, tensor 2, expert 2": (
        2,
        tiny_config(**TWO_RANKS, parallel__sequence="true", **EXPERTS, parallel__expert=2),
    ),
    "r4b, tensor 2, sequence": (2, _r4b("parallel.tensor=2", "parallel.sequence=true")),
}


# Larger than memory: names and shapes alone, since Transformer Engine marks parameters when they get memory.
SKELETONS = ("r4b", "r4b, tensor 2, sequence")


@pytest.mark.parametrize("case", CASES)
def test_backends_build_the_same_model(case: str) -> None:
    num_ranks, config = CASES[case]
    for differences, num_parameters in run_on_ranks(_differences, num_ranks, config, case in SKELETONS):
        assert num_parameters > 0
        assert not differences, "\n".join(differences)


def _differences(config: RunConfig, is_skeleton: bool) -> tuple[list[str], int]:
    def built(platform: CpuPlatform) -> dict[str, str]:
        if is_skeleton:
            return _described(build_skeleton(config, platform, groups), ())
        return _described(build_model(config, platform, groups, image_token=5), MARKS)

    local_platform = CpuPlatform()
    with state.process_group(local_platform), state.model_parallel(config.parallel, seed=0) as groups:
        local = built(local_platform)
        with seen_gpu():
            gpu = built(TransformerEnginePlatform())
    differences = [
        f"{name}: {local.get(name)} by the local backend, {gpu.get(name)} by Transformer Engine's"
        for name in sorted(local.keys() | gpu.keys())
        if local.get(name) != gpu.get(name)
    ]
    return differences, len(local)


def _described(chunks: list[VisionLanguageModel], marks: Collection[str]) -> dict[str, str]:
    """Whatever has a name in the model or in its checkpoint, and all that is to be the same of it."""
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found[f"parameter {name}"] = f"{tuple(parameter.shape)} {parameter.dtype} {_marks(parameter, marks)}"
    for entry in nested_values(model_state(chunks)):
        pieces: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in nested_values(pieces):
            assert isinstance(piece, ShardedTensor), f"{piece} is no tensor"
            place = (piece.global_shape, piece.global_offset, piece.axis_fragmentations, piece.replica_id)
            found[f"checkpoint {piece.key} at {piece.global_offset}"] = f"{piece.dtype} {piece.local_shape} of {place}"
    return found


def _marks(parameter: torch.nn.Parameter, marks: Collection[str]) -> dict[str, Any]:
    found = {mark: getattr(parameter, mark, MARKS[mark]) for mark in sorted(marks)}
    # Experts are whole on their rank (parallel/state.py), so nobody asks where they would be cut.
    if found.get("tensor_model_parallel") and found["allreduce"]:
        found |= {mark: getattr(parameter, mark) for mark in PARTITION}
    return found
