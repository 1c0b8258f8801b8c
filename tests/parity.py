"""Our ViT and language model against transformers' classes, in any layout."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.stream import from_hf, to_hf
from megatron_mm.weights.tables import model_table
from tests.tiny import IMAGE_TOKEN, r4b_tensors, reference_models

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
            device = platform.device()
            with state.model_parallel(config.parallel, config.seed) as groups:
                chunks = build_model(config, platform, groups, IMAGE_TOKEN)
                table = model_table(config.model)
                from_hf(chunks, table, tensors)
                returned = {name: tensor.cpu() for name, tensor in to_hf(chunks, table)}
                exact = returned.keys() == tensors.keys() and all(
                    torch.equal(tensors[name], tensor) for name, tensor in returned.items()
                )
                num_tokens = config.model.language.vocab_size
                differences = _differences(chunks[0], siglip, qwen, groups, num_tokens, device)
                found.append({"weights": 0.0 if exact else 1.0, **differences})
    return found


def _differences(
    model: VisionLanguageModel,
    siglip: torch.nn.Module,
    qwen: torch.nn.Module,
    groups: ProcessGroupCollection,
    num_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(7)
    assert model.vision is not None
    vision, logits, loss = 0.0, 0.0, 0.0
    for num_tiles in NUM_TILES:
        tiles = torch.randn(num_tiles, 3, 32, 32, generator=generator)
        # Our ViT stops before the final norm, as R-4B's does in vLLM.
        theirs = siglip(tiles, output_hidden_states=True).hidden_states[-1]
        vision = max(vision, float((model.vision(tiles.to(device)).cpu() - theirs).abs().max()))
    for shape in TEXT_SHAPES:
        # Above the image token, so that no placeholder is among them.
        ids = torch.randint(IMAGE_TOKEN + 1, num_tokens, shape, generator=generator)
        labels = torch.randint(num_tokens, shape, generator=generator)
        ours, theirs = _gather_vocabulary(model(ids.to(device)), groups).cpu(), qwen(ids).logits
        assert (ours[..., num_tokens:] == -torch.inf).all(), "padding of the vocabulary can be predicted"
        logits = max(logits, float((ours[..., :num_tokens] - theirs).abs().max()))
        of_tokens = F.cross_entropy(theirs.transpose(1, 2), labels, reduction="none")
        loss = max(loss, float((model(ids.to(device), labels=labels.to(device)).cpu() - of_tokens).abs().max()))
    return {"vision": vision, "logits": logits, "loss": loss}
