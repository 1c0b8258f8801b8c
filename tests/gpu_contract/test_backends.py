"""Both layer backends build the same model: names, shapes, marks, and what a checkpoint says of each parameter."""

from typing import Any

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_mm.checkpoint.store import model_state
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel, build_skeleton
from megatron_mm.parallel import state
from megatron_mm.parallel.platform.cpu import CpuPlatform
from tests.gpu_contract.gpu_stand_in import TransformerEnginePlatform, seen_gpu
from tests.layouts import EXPERTS
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu_contract

# What Megatron-Core's optimizer, gradient sums and clipping ask a parameter for.
MARKS = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "allreduce",
    "average_gradients_across_tp_domain",
    "shared",
)
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


@pytest.mark.parametrize("case", CASES)
def test_backends_build_the_same_model(case: str) -> None:
    num_ranks, config = CASES[case]
    for differences, num_parameters in run_on_ranks(_differences, num_ranks, config):
        assert num_parameters > 0
        assert not differences


def _differences(config: RunConfig) -> tuple[list[str], int]:
    local_platform, gpu_platform = CpuPlatform(), TransformerEnginePlatform()
    with state.process_group(local_platform), state.model_parallel(config.parallel, seed=0) as groups:
        local = _described(build_skeleton(config, local_platform, groups))
        with seen_gpu():
            gpu = _described(build_skeleton(config, gpu_platform, groups))
    differences = [
        f"{name}: {local.get(name)} by the local backend, {gpu.get(name)} by Transformer Engine's"
        for name in sorted(local.keys() | gpu.keys())
        if local.get(name) != gpu.get(name)
    ]
    return differences, len(local)


def _described(chunks: list[VisionLanguageModel]) -> dict[str, str]:
    """Whatever has a name in the model or in its checkpoint, and all that is to be the same of it."""
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            marks = {mark: getattr(parameter, mark) for mark in MARKS if hasattr(parameter, mark)}
            found[f"parameter {name}"] = f"{tuple(parameter.shape)} {parameter.dtype} {marks}"
    for entry in nested_values(model_state(chunks)):
        pieces: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in nested_values(pieces):
            assert isinstance(piece, ShardedTensor), f"{piece} is no tensor"
            place = (piece.global_shape, piece.global_offset, piece.axis_fragmentations, piece.replica_id)
            found[f"checkpoint {piece.key} at {piece.global_offset}"] = f"{piece.dtype} {piece.local_shape} of {place}"
    return found
