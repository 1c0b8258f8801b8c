"""What ranks measure: our model against transformers' classes, and one training step, in any layout."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import StepBatches
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import forward_backward, train_step
from megatron_mm.weights.stream import from_hf, to_hf
from megatron_mm.weights.tables import model_table
from tests.tiny import IMAGE_TOKEN, r4b_tensors, reference_models, tiny_config

# The last is long enough for the fused attention kernel.
TEXT_SHAPES = ((1, 64), (3, 5), (2, 17), (1, 300))
NUM_TILES = (1, 3)


def _gather_vocabulary(logits: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """[B, S, V / ranks] -> [B, S, V]."""
    shards = [torch.empty_like(logits) for _ in range(groups.tp.size())]
    dist.all_gather(shards, logits.contiguous(), group=groups.tp)
    return torch.cat(shards, -1)


def against_transformers(platform_name: str, configs: list[RunConfig]) -> list[dict[str, float]]:
    """Largest absolute differences of each config's layout. Runs on every rank."""
    platform = get_platform(platform_name)
    found = []
    with state.process_group(platform), torch.no_grad():
        for config in configs:
            siglip, qwen = reference_models(config)
            tensors = r4b_tensors(config, siglip, qwen)
            with state.model_parallel(config.parallel, config.seed) as groups:
                model = build_model(config, platform, groups, IMAGE_TOKEN)
                table = model_table(config.model)
                from_hf(model, table, tensors)
                returned = dict(to_hf(model, table))
                exact = returned.keys() == tensors.keys() and all(
                    torch.equal(tensors[name], tensor) for name, tensor in returned.items()
                )
                found.append({"weights": 0.0 if exact else 1.0, **_differences(model, siglip, qwen, groups)})
    return found


def _differences(
    model: VisionLanguageModel, siglip: torch.nn.Module, qwen: torch.nn.Module, groups: ProcessGroupCollection
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(7)
    assert model.vision is not None
    vision, logits = 0.0, 0.0
    for num_tiles in NUM_TILES:
        tiles = torch.randn(num_tiles, 3, 32, 32, generator=generator)
        # Our ViT stops before the final norm, as R-4B's does in vLLM.
        theirs = siglip(tiles, output_hidden_states=True).hidden_states[-1]
        vision = max(vision, float((model.vision(tiles) - theirs).abs().max()))
    for shape in TEXT_SHAPES:
        # Above the image token, so that no placeholder is among them.
        ids = torch.randint(IMAGE_TOKEN + 1, 128, shape, generator=generator)
        ours = _gather_vocabulary(model(ids), groups)
        logits = max(logits, float((ours - qwen(ids).logits).abs().max()))
    return {"vision": vision, "logits": logits}


def one_step(
    platform_name: str, configs: list[RunConfig], tensors: dict[str, torch.Tensor]
) -> list[tuple[float, float, float]]:
    """(loss before, gradient norm, loss after one update) of each config's layout. Runs on every rank."""
    platform = get_platform(platform_name)
    found = []
    with state.process_group(platform):
        for config in configs:
            assert config.data.path is not None
            tokenizer = ChatTokenizer(config.data.path / TOKENIZER)
            with state.model_parallel(config.parallel, config.seed) as groups:
                model = build_model(config, platform, groups, tokenizer.control("<image>"))
                from_hf(model, model_table(config.model), tensors)
                trainee = build_trainee(config, model, groups)
                dataset = StepBatches(config, tokenizer, state.data_rank(), state.data_ranks())
                first = train_step(trainee, dataset[0], platform.device())
                trainee.ddp.zero_grad_buffer()
                loss_sum, num_tokens = forward_backward(trainee, dataset[0], platform.device()).tolist()
                found.append((first.loss, first.grad_norm, loss_sum / num_tokens))
    return found


def layout_configs(digits: Path) -> dict[str, RunConfig]:
    """A step of the miniature task in each layout: the same eight samples, whatever the layout."""
    parts = ("easy/thinking", "hard/thinking", "hard/non_thinking", "caption/non_thinking")
    base = {
        "data__path": digits,
        "data__blend": "{" + ", ".join(f"digits/{part}: 1" for part in parts) + "}",
        "data__text_only": "false",
        "model__language__vocab_size": 384,
        "train__global_batch": 8,
        "train__micro_batch": 2,
        "train__trained": "[vision, projector, language]",
    }
    layouts = {
        "single": {},
        "TP 2": {"parallel__tensor": 2},
        "TP 2 + SP": {"parallel__tensor": 2, "parallel__sequence": "true"},
        "PP 2": {"parallel__pipeline": 2},
        "DP 2": {},
    }
    return {name: tiny_config(**base, **layout) for name, layout in layouts.items()}
