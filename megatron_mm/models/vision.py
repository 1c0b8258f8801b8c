"""The SigLIP ViT: patches, learned positions, pre-norm layers; no pooling head, no final norm (R-4B, vLLM rvl.py)."""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_mm.config.schema import VisionConfig
from megatron_mm.models.specs import block_spec
from megatron_mm.parallel.state import without_tensor_parallelism

# Name of the position table in VisionLanguageModel.
POSITIONS = "vision.position_embedding.weight"

logger = logging.getLogger(__name__)


class VisionModel(MegatronModule):
    """Tiles [T, 3, h, w] -> features [T, P, H of the ViT]."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, backend: str, groups: ProcessGroupCollection):
        super().__init__(config)
        self.patch_size = vision.patch_size
        self.covered = vision.patches_per_side * vision.patch_size
        patch_values = 3 * vision.patch_size**2
        # The patch convolution of SigLIP as a linear layer on unfolded patches.
        self.patch_embedding = torch.nn.Linear(patch_values, config.hidden_size, dtype=config.params_dtype)
        self.position_embedding = torch.nn.Embedding(
            vision.patches_per_tile, config.hidden_size, dtype=config.params_dtype
        )
        # As transformers' SiglipPreTrainedModel: positions 1/sqrt(width), patches LeCun-normal.
        torch.nn.init.normal_(self.position_embedding.weight, std=config.hidden_size**-0.5)
        torch.nn.init.trunc_normal_(self.patch_embedding.weight, std=patch_values**-0.5)
        torch.nn.init.zeros_(self.patch_embedding.bias)
        self.encoder = TransformerBlock(
            config,
            block_spec(config, backend, causal=False),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
            pg_collection=groups,
        )

    def forward(self, tiles: Tensor) -> Tensor:
        tiles = tiles[:, :, : self.covered, : self.covered].to(self.patch_embedding.weight.dtype)
        # [T, 3 * patch^2, P] -> [T, P, H]
        patches = F.unfold(tiles, self.patch_size, stride=self.patch_size).transpose(1, 2)
        positions = torch.arange(patches.shape[1], device=patches.device)
        # Submodules are called, never read: with overlapped parameter gathering only a call waits for fresh weights.
        x = self.patch_embedding(patches) + self.position_embedding(positions)
        x = self.encoder(hidden_states=x.transpose(0, 1).contiguous(), attention_mask=None)
        return x.transpose(0, 1)


class SharedOutVisionModel(VisionModel):
    """A whole ViT on each rank of the tensor-parallel group, and the batch's tiles shared out over the ranks."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, backend: str, groups: ProcessGroupCollection):
        super().__init__(config, vision, backend, without_tensor_parallelism(groups))
        self.groups = groups
        first: Any = dist.get_global_rank(groups.tp, 0)
        for parameter in self.parameters():
            # The layers were made for a group of one rank, which they think they are cut over.
            setattr(parameter, "tensor_model_parallel", False)  # noqa: B010 (unknown to the type)
            # Megatron-Core averages the gradients of exactly the parameters so marked over the tensor-parallel ranks.
            setattr(parameter, "average_gradients_across_tp_domain", True)  # noqa: B010
            if not parameter.is_meta:
                dist.broadcast(parameter.data, first, group=groups.tp)

    def forward(self, tiles: Tensor) -> Tensor:
        rank, ranks = self.groups.tp.rank(), self.groups.tp.size()
        share, rest = divmod(len(tiles), ranks)
        assert not rest, f"{len(tiles)} tiles cannot be shared out over {ranks} ranks"
        mine = super().forward(tiles[rank * share : (rank + 1) * share])
        # The gradients of the gathered features are the same on every rank, and the way back sums them: each share's
        # come out `ranks` times too large, which the average over the ranks takes off again.
        return gather_from_sequence_parallel_region(mine, group=self.groups.tp)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """As VisionModel's, with the ranks named as replicas of one another."""
        state = super().sharded_state_dict(*args, **kwargs)
        for entry in nested_values(state):
            if isinstance(entry, ShardedBase):
                entry.replica_id = (0, self.groups.tp.rank(), self.groups.dp_cp.rank())
        return state


def fitted_positions(table: Tensor, num_patches: int, source: str) -> Tensor:
    """A position table for another tile size, as transformers' SiglipVisionEmbeddings.interpolate_pos_encoding.

    Args:
        table: [P, H] for a square of patches.
        num_patches: P of the square it is wanted for.
        source: where the table comes from, for the warning that it was interpolated.

    Returns:
        [num_patches, H] in the table's dtype, interpolated bicubically; the table itself where it fits.
    """
    old, new = math.isqrt(len(table)), math.isqrt(num_patches)
    if old == new or old * old != len(table):
        return table
    logger.warning("%s: the position table of %d x %d patches is interpolated to %d x %d", source, old, old, new, new)
    plane = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, (new, new), mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).reshape(num_patches, -1).to(table.dtype)
