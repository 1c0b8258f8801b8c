"""The plan's parameters of each module, whole and on every rank, are those of the model that is built."""

import pytest

from megatron_mm.config.schema import MODULES, RunConfig
from megatron_mm.models.freeze import module_of
from megatron_mm.models.vlm import build_skeleton
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.planning.parameters import Held, model_parameters, stage_parameters
from tests.layouts import EP2, EXPERTS, PP2, SP, TP2, Overrides
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

UNTIED: Overrides = {"model__language__tied_embeddings": "false"}
# 130 rows are padded to 256.
PADDED: Overrides = {"model__language__vocab_size": 130}
LAYOUTS: dict[int, list[Overrides]] = {
    1: [PADDED, UNTIED, EXPERTS, {"model__projector__pre_norm": "false", "model__vision__drop_last_layers": 1}],
    2: [
        PADDED | SP,
        UNTIED | TP2 | {"model__vision__parallel": "data"},
        PP2,
        UNTIED | PP2 | {"parallel__virtual_pipeline": 2},
        EP2,
        EXPERTS | SP,
    ],
    4: [TP2 | PP2, EP2 | PP2],
}


def _held(configs: list[RunConfig]) -> list[tuple[int, Held]]:
    """Stage and parameters of this rank, of each config."""
    platform, found = get_platform("cpu"), []
    with state.process_group(platform):
        for config in configs:
            with state.model_parallel(config.parallel, 0) as groups:
                dense, experts = dict.fromkeys(MODULES, 0), 0
                for chunk in build_skeleton(config, platform, groups):
                    for name, parameter in chunk.named_parameters():
                        if getattr(parameter, "allreduce", True):
                            dense[module_of(name)] += parameter.numel()
                        else:
                            experts += parameter.numel()
                found.append((groups.pp.rank(), Held(dense, experts)))
    return found


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_rank_holds_what_the_plan_says(num_ranks: int) -> None:
    configs = [tiny_config(**overrides) for overrides in LAYOUTS[num_ranks]]
    for rank in run_on_ranks(_held, num_ranks, configs):
        for overrides, config, (stage, held) in zip(LAYOUTS[num_ranks], configs, rank, strict=True):
            assert held == stage_parameters(config, stage), f"{overrides}, stage {stage}"
            if num_ranks == 1:
                whole = model_parameters(config.model, padded=True)
                assert {**held.dense, "language": held.dense["language"] + held.experts} == whole
