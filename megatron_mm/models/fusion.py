"""Image features into the places of the image tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.chat.images import Downscale
from megatron_mm.config.errors import InputError


class ImageFusion(MegatronModule):
    """Orders projected features as chat/images.py says, adds row ends, and writes them over the placeholders."""

    def __init__(self, config: TransformerConfig, image_token: int):
        super().__init__(config)
        self.image_token = image_token
        # One learned vector after each row of the high-resolution grid; LLaVA-NeXT draws it at 1/sqrt(H).
        scale = config.hidden_size**-0.5
        self.image_newline = torch.nn.Parameter(torch.randn(config.hidden_size, dtype=config.params_dtype) * scale)

    def forward(
        self, embeddings: Tensor, ids: Tensor, features: Tensor, order: Tensor, downscales: Sequence[Downscale] = ()
    ) -> Tensor:
        """Replace placeholders.

        Args:
            embeddings: [S, B, H].
            ids: [B, S].
            features: [T, P, H], projected.
            order: int64 [N], for each placeholder in (batch, sequence) order its row: of the flattened features, or
                T * P for the newline, or from T * P + 1 on of the downscaled features.
            downscales: whose results, flattened and behind each other, are the downscaled features.

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
        rows = features.flatten(0, 1)
        downscaled = [_downscaled(rows, downscale) for downscale in downscales]
        rows = torch.cat([rows, self.image_newline[None].to(rows.dtype), *downscaled])
        merged = embeddings.transpose(0, 1).masked_scatter(is_image.unsqueeze(-1), rows[order].to(embeddings.dtype))
        return merged.transpose(0, 1).contiguous()


def _downscaled(rows: Tensor, downscale: Downscale) -> Tensor:
    """Bilinear, without antialiasing, as transformers' and vLLM's pack_image_features: [rows * columns, H]."""
    plane = rows[downscale.plane].permute(2, 0, 1)[None]
    return F.interpolate(plane, downscale.size, mode="bilinear")[0].flatten(1).transpose(0, 1)
