"""The SigLIP ViT: patches, learned positions, pre-norm layers; no pooling head, no final norm (R-4B, vLLM rvl.py)."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_mm.config.schema import VisionConfig
from megatron_mm.models.specs import block_spec


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
            block_spec(config, backend, causal=False, stage=0),
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
