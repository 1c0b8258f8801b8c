"""ViT -> projector -> language model as one module that Megatron-Core's schedules can drive."""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.config.schema import RunConfig
from megatron_mm.models.fusion import ImageFusion
from megatron_mm.models.language import build_language_model
from megatron_mm.models.megatron_config import language_config, projector_config, vision_config
from megatron_mm.models.projector import Projector
from megatron_mm.models.vision import VisionModel
from megatron_mm.parallel.platform import Platform


@dataclass(frozen=True, slots=True)
class Pictures:
    """The tiles of a batch and where their features go.

    Attributes:
        tiles: float [T, 3, h, w], normalised.
        order: int64 [N], see ImageFusion.
    """

    tiles: Tensor
    order: Tensor


class VisionLanguageModel(MegatronModule):
    """This rank's part of the model: ViT, projector and embedding live on the first pipeline stage."""

    def __init__(self, config: RunConfig, platform: Platform, groups: ProcessGroupCollection, image_token: int):
        language = language_config(config, platform)
        super().__init__(language)
        self.groups = groups
        # What Megatron-Core's schedules and gradient finalisation ask a model for.
        self.pre_process = groups.pp.rank() == 0
        self.post_process = groups.pp.rank() == groups.pp.size() - 1
        self.vp_stage = None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = config.model.language.tied_embeddings

        self.vision = self.projector = self.fusion = None
        backend = platform.layer_backend
        if self.pre_process:
            vision = config.model.vision
            self.vision = VisionModel(vision_config(config, platform), vision, backend, groups)
            self.projector = Projector(projector_config(config, platform), vision.hidden_size, backend, groups)
            self.fusion = ImageFusion(language, image_token)
            # Run in place of missing pictures, so that every rank's parameters take part in every step.
            side = vision.image_size
            self.register_buffer("blank_tile", torch.zeros(1, 3, side, side), persistent=False)
        self.language = build_language_model(
            language, config.model.language, backend, groups, first=self.pre_process, last=self.post_process
        )

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, which Megatron-Core keeps equal on the first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Take the hidden states of the stage before."""
        self.language.set_input_tensor(input_tensor)

    def forward(self, ids: Tensor, pictures: Pictures | None = None, labels: Tensor | None = None) -> Tensor:
        """Run this stage.

        Args:
            ids: int64 [B, S].
            pictures: of the whole batch; None where it has none.
            labels: int64 [B, S]; None asks for logits.

        Returns:
            On the last stage the loss of each token [B, S], or logits [B, S, V / tensor ranks]; on the others hidden
            states [S, B, H].
        """
        embeddings = self._embed(ids, pictures) if self.pre_process else None
        return self.language(None, None, None, decoder_input=embeddings, labels=labels)

    def _embed(self, ids: Tensor, pictures: Pictures | None) -> Tensor:
        assert self.vision is not None
        assert self.projector is not None
        assert self.fusion is not None
        # Placeholders are overwritten below; the lookup itself works on any id of the vocabulary.
        embeddings = self.language.embedding(input_ids=ids, position_ids=None)  # [S, B, H]
        tiles = self.blank_tile if pictures is None else pictures.tiles
        features = self.projector(self.vision(tiles))  # [T, P, H]
        order = torch.empty(0, dtype=torch.int64, device=ids.device) if pictures is None else pictures.order
        embeddings = self.fusion(embeddings, ids, features, order)
        if pictures is None:
            # A true zero that keeps ViT and projector in the graph: a rank that skipped them would not match the
            # others' gradient collectives.
            embeddings = embeddings + 0 * features.sum()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.groups.tp)
        return embeddings


def build_model(
    config: RunConfig, platform: Platform, groups: ProcessGroupCollection, image_token: int
) -> VisionLanguageModel:
    """This rank's part of the model, with fresh weights, on its device."""
    return VisionLanguageModel(config, platform, groups, image_token).to(platform.device())
