"""Peak memory of training steps on a GPU against the plan's."""

import pytest
import torch

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import train_step
from tests.gpu.conftest import Measured
from tests.memory import IMAGE_TOKEN, Batched, batch_of, predicted
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.gpu

PACK = Batched((1024, 2048, 1024), 4, 1024)
# Of what was measured; docs/plan.md promises 15% on the CPU. To be set when it is first measured: workspaces of cuBLAS
# and cuDNN are not planned.
TOLERANCE = 0.2


def _config(recompute: str) -> RunConfig:
    return load_config(
        "r4b/stage3",
        overrides=[
            "model.language.preset=qwen3-0.6b",
            "model.vision.preset=siglip2-base-patch16-384",
            "model.vision.parallel=tensor",
            "parallel.tensor=1",
            "init_from=null",
            "optim.warmup_steps=0",
            "data.max_sequence_tokens=4096",
            "train.global_batch=1",
            f"train.recompute={recompute}",
        ],
    )


def _peak(config: RunConfig) -> int:
    """Most bytes that tensors take in a second step; the first makes the optimizer's state."""
    platform = get_platform("cuda")
    with state.process_group(platform), state.model_parallel(config.parallel, config.seed) as groups:
        chunks = build_model(config, platform, groups, IMAGE_TOKEN)
        trainee = build_trainee(config, chunks, groups, overlap=platform.overlaps_collectives)
        batches = [batch_of(config, PACK)]
        train_step(trainee, batches, platform.device())
        torch.cuda.reset_peak_memory_stats()
        train_step(trainee, batches, platform.device())
        return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_steps_memory_is_as_planned(recompute: str, measured: Measured) -> None:
    config = _config(recompute)
    (peak,) = run_on_ranks(_peak, 1, config)
    planned = predicted(config, 1, PACK, "te")
    measured(f"planned {planned / 2**30:.2f} GiB, off by", abs(planned / peak - 1), TOLERANCE)
