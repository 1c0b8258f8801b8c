"""Image features into the places of the image tokens."""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.config.errors import InputError


class ImageFusion(MegatronModule):
    """Orders projected features as chat/images.py says, adds row ends, and writes them over the placeholders."""

    def __init__(self, config: TransformerConfig, image_token: int):
        super().__init__(config)
        self.image_token = image_token
        # One learned vector after each row of the high-resolution grid; LLaVA-NeXT draws it at 1/sqrt(H).
        scale = config.hidden_size**-0.5
        self.image_newline = torch.nn.Parameter(torch.randn(config.hidden_size, dtype=config.params_dtype) * scale)

    def forward(self, embeddings: Tensor, ids: Tensor, features: Tensor, order: Tensor) -> Tensor:
        """Replace placeholders.

        Args:
            embeddings: [S, B, H].
            ids: [B, S].
            features: [T, P, H], projected.
            order: int64 [N], for each placeholder in (batch, sequence) order its row of the flattened features, or
                T * P for the newline.

        Returns:
            [S, B, H].

        Raises:
            InputError: the number of placeholders differs from the number of features.
        """
        is_image = ids == self.image_token
        num_placeholders = int(is_image.sum())
        if num_placeholders != order.numel():
            raise InputError(
                f"the batch holds {num_placeholders} image tokens but {order.numel()} image features; the ids were "
                "not made from these pictures with this model's tile_grids"
            )
        rows = torch.cat([features.flatten(0, 1), self.image_newline[None].to(features.dtype)])
        merged = embeddings.transpose(0, 1).masked_scatter(is_image.unsqueeze(-1), rows[order].to(embeddings.dtype))
        return merged.transpose(0, 1).contiguous()
