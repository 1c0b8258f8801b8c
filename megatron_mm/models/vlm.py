"""ViT -> projector -> language model as one module that Megatron-Core's schedules can drive."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.chat.images import Downscale
from megatron_mm.config.layout import sequence_multiple, tile_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.fusion import ImageFusion, image_places
from megatron_mm.models.language import build_language_model
from megatron_mm.models.megatron_config import language_config, projector_config, vision_config
from megatron_mm.models.packing import packed_sequence, places_of, positions_in_samples, zigzag
from megatron_mm.models.projector import Projector
from megatron_mm.models.vision import SharedOutVisionModel, VisionModel
from megatron_mm.parallel.platform import Platform, to_device


@dataclass(frozen=True, slots=True)
class Pictures:
    """The tiles of a batch and where their features go.

    Attributes:
        tiles: float [T, 3, h, w], normalised.
        order: int64 [N], see ImageFusion.
        downscales: see ImageFusion.
    """

    tiles: Tensor
    order: Tensor
    downscales: tuple[Downscale, ...] = ()


class VisionLanguageModel(MegatronModule):
    """One model chunk of this rank's pipeline stage: ViT, projector and embedding live in the first of all chunks.

    Args:
        language: Megatron-Core's config of the language model, shared by all chunks of the rank.
        chunk: number of the chunk where the stage has several.
    """

    def __init__(
        self,
        config: RunConfig,
        language: TransformerConfig,
        platform: Platform,
        groups: ProcessGroupCollection,
        image_token: int,
        chunk: int | None,
    ):
        super().__init__(language)
        self.groups = groups
        last_chunk = config.parallel.virtual_pipeline - 1
        # What Megatron-Core's schedules and gradient finalisation ask a model for.
        self.pre_process = groups.pp.rank() == 0 and chunk in (None, 0)
        self.post_process = groups.pp.rank() == groups.pp.size() - 1 and chunk in (None, last_chunk)
        self.vp_stage = chunk
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = config.model.language.tied_embeddings
        self.image_token = image_token

        self.sequence_multiple, self.tile_multiple = sequence_multiple(config), tile_multiple(config)

        # Whether ViT and projector take part in batches without an image too. Delayed scaling, which exchanges the
        # layers' maxima with other ranks in the order in which the layers first ran, needs it, and so do collectives
        # that begin as soon as gradients are there (train/assemble.py).
        self.encodes_blank_tile = config.fp8.recipe == "delayed"
        self.vision = self.projector = self.fusion = None
        backend = platform.layer_backend
        if self.pre_process:
            vision, projector = config.model.vision, config.model.projector
            vision_model = VisionModel if vision.parallel == "tensor" else SharedOutVisionModel
            self.vision = vision_model(vision_config(config, platform), vision, backend, groups)
            self.projector = Projector(
                projector_config(config, platform), vision.hidden_size, backend, groups, pre_norm=projector.pre_norm
            )
            self.fusion = ImageFusion(language)
            # Encoded if a batch has no image and `encodes_blank_tile` is true.
            side = vision.image_size
            self.register_buffer("blank_tile", torch.zeros(1, 3, side, side), persistent=False)
        self.language = build_language_model(
            language,
            config.model.language,
            backend,
            groups,
            first=self.pre_process,
            last=self.post_process,
            chunk=chunk,
        )

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, which Megatron-Core keeps equal on the first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Take the hidden states of the chunk before."""
        self.language.set_input_tensor(input_tensor)

    def forward(
        self,
        ids: Tensor,
        pictures: Pictures | None = None,
        starts: Tensor | None = None,
        labels: Tensor | None = None,
        trained: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        All arguments but `pictures` lie in host memory. What their values decide, such as how many tokens are trained,
        is decided there, so the host never waits for the device; this chunk takes to its device what it needs.

        Args:
            ids: int64 [B, S].
            pictures: of the whole batch, on the device; None where it has none.
            starts: int32 [samples + 1], where each sample of a pack begins, and the end; then B is 1.
            labels: int64 [B, S]; None asks for logits.
            trained: bool [B, S], the tokens whose loss is wanted; None wants all.

        Returns:
            From the last chunk the loss of each token [B, S] or of the trained ones [N] in (batch, sequence) order, or
            logits [B, S, V / tensor ranks]; from the others hidden states [S, B, H]. With context parallelism S and N
            are of this rank's part of the sequence.

        Raises:
            ValueError: S is not what this layout and precision can share out.
            InputError: see `image_places`.
        """
        if ids.shape[1] % self.sequence_multiple:
            raise ValueError(
                f"a sequence of {ids.shape[1]} tokens cannot be shared out; pad it to a multiple of "
                f"{self.sequence_multiple} (config/layout.py sequence_multiple)"
            )
        device = next(self.parameters()).device
        bounds = [0, ids.shape[1]] if starts is None else starts.tolist()
        positions, part = positions_in_samples(bounds), None
        if self.config.context_parallel_size > 1:
            part = zigzag(bounds, self.groups.cp.rank(), self.groups.cp.size())
            positions = positions[part]
            labels = None if labels is None else labels[:, part]
            trained = None if trained is None else trained[:, part]
        places = None
        if not self.post_process:
            labels = None
        elif labels is not None and trained is not None:
            labels, places = labels[trained], to_device(places_of(trained), device)
        embeddings = self._embed(ids, pictures, part, device) if self.pre_process else None
        return self.language(
            None,
            to_device(positions, device),
            None,
            decoder_input=embeddings,
            labels=None if labels is None else to_device(labels, device),
            loss_mask=places,
            packed_seq_params=None if starts is None else packed_sequence(starts, device),
        )

    def _embed(self, ids: Tensor, pictures: Pictures | None, part: Tensor | None, device: torch.device) -> Tensor:
        """Return [S, B, H]: embeddings with features over the placeholders, of the tokens `part` if it is given."""
        assert self.fusion is not None
        places = image_places(ids, self.image_token, 0 if pictures is None else pictures.order.numel())
        places = to_device(places, device)
        # Placeholders are overwritten below; the lookup itself works on any id of the vocabulary.
        embeddings = self.language.embedding(input_ids=to_device(ids, device), position_ids=None)  # [S, B, H]
        if pictures is not None:
            features = self._features(pictures.tiles)
            embeddings = self.fusion(embeddings, places, features, pictures.order, pictures.downscales)
        elif self.encodes_blank_tile:
            blank: Any = self.blank_tile
            features = self._features(blank)
            order = torch.empty(0, dtype=torch.int64, device=device)
            # A true zero that keeps ViT and projector in the graph.
            embeddings = self.fusion(embeddings, places, features, order) + 0 * features.sum()
        if part is not None:
            embeddings = embeddings.index_select(0, to_device(part, device))
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.groups.tp)
        if self.training and self.config.recompute_granularity == "full" and not embeddings.requires_grad:
            # Where nothing before the layers learns, recomputed layers would get no gradients for their own weights:
            # a checkpoint's output asks for gradients only where its input does.
            embeddings.requires_grad_()
        return embeddings

    def _features(self, tiles: Tensor) -> Tensor:
        """Return what the language model sees of tiles: [T, P, H]."""
        assert self.vision is not None
        assert self.projector is not None
        return self.projector(self.vision(padded_tiles(tiles, self.tile_multiple)))[: len(tiles)]


def padded_tiles(tiles: Tensor, multiple: int) -> Tensor:
    """Tiles [T, 3, h, w] with blank ones behind them up to a multiple."""
    missing = -len(tiles) % multiple
    return F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else tiles


def build_model(
    config: RunConfig, platform: Platform, groups: ProcessGroupCollection, image_token: int
) -> list[VisionLanguageModel]:
    """This rank's chunks of the model, one unless the pipeline is interleaved, with fresh weights, on its device."""
    return [chunk.to(platform.device()) for chunk in _chunks(config, platform, groups, image_token)]


def build_skeleton(config: RunConfig, platform: Platform, groups: ProcessGroupCollection) -> list[VisionLanguageModel]:
    """The chunks that `build_model` would make, on torch's meta device: names and shapes without memory."""
    with torch.device("meta"):
        return _chunks(config, platform, groups, image_token=0)


def _chunks(
    config: RunConfig, platform: Platform, groups: ProcessGroupCollection, image_token: int
) -> list[VisionLanguageModel]:
    language = language_config(config, platform)
    num_chunks = config.parallel.virtual_pipeline
    numbers = range(num_chunks) if num_chunks > 1 else [None]
    return [VisionLanguageModel(config, language, platform, groups, image_token, number) for number in numbers]
