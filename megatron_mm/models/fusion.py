"""Image features into the places of the image tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.chat.images import Downscale
from megatron_mm.config.errors import InputError
from megatron_mm.models.packing import places_of


def image_places(ids: Tensor, image_token: int, num_features: int) -> Tensor:
    """Return where the placeholders of images stand: int64 [N], see models/packing.py places_of.

    Args:
        ids: int64 [B, S], in host memory.
        image_token: id of a placeholder.
        num_features: N, what is written over placeholders.

    Raises:
        InputError: the number of placeholders is another.
    """
    places = places_of(ids == image_token)
    if len(places) != num_features:
        raise InputError(
            f"the batch holds {len(places)} image tokens but {num_features} image features; the ids were "
            "not made from these pictures with this model's tile_grids"
        )
    return places


class ImageFusion(MegatronModule):
    """Orders projected features as chat/images.py says, adds row ends, and writes them over the placeholders."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        # One learned vector after each row of the high-resolution grid; LLaVA-NeXT draws it at 1/sqrt(H).
        scale = config.hidden_size**-0.5
        self.image_newline = torch.nn.Parameter(torch.randn(config.hidden_size, dtype=config.params_dtype) * scale)

    def forward(
        self, embeddings: Tensor, places: Tensor, features: Tensor, order: Tensor, downscales: Sequence[Downscale] = ()
    ) -> Tensor:
        """Replace placeholders.

        Args:
            embeddings: [S, B, H].
            places: int64 [N], see `image_places`.
            features: [T, P, H], projected.
            order: int64 [N], for each placeholder in (batch, sequence) order its row: of the flattened features, or
                T * P for the newline, or from T * P + 1 on of the downscaled features.
            downscales: whose results, flattened and behind each other, are the downscaled features.

        Returns:
            [S, B, H].
        """
        rows = features.flatten(0, 1)
        downscaled = [_downscaled(rows, downscale) for downscale in downscales]
        rows = torch.cat([rows, self.image_newline[None].to(rows.dtype), *downscaled])
        # By index, not by mask: the gradient of a masked write waits for the device to count the mask.
        merged = embeddings.flatten(0, 1).index_copy(0, places, rows[order].to(embeddings.dtype))
        return merged.view_as(embeddings)


def _downscaled(rows: Tensor, downscale: Downscale) -> Tensor:
    """Bilinear, without antialiasing, as transformers' and vLLM's pack_image_features: [rows * columns, H]."""
    plane = rows[downscale.plane].permute(2, 0, 1)[None]
    return F.interpolate(plane, downscale.size, mode="bilinear")[0].flatten(1).transpose(0, 1)
