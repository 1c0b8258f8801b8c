"""Qwen3 as Megatron-Core's GPTModel, with an output layer that works on the trained tokens only."""

from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mm.config.loss_blocks import vocab_block
from megatron_mm.config.schema import LanguageConfig
from megatron_mm.models.blockwise_loss import VocabShard, blockwise_losses
from megatron_mm.models.entropy import vocab_parallel_entropy
from megatron_mm.models.rotary import rotary_angles
from megatron_mm.models.specs import block_spec


class LanguageModel(GPTModel):
    """A GPTModel whose logits and losses are made for the tokens at the places `loss_mask` alone.

    Most tokens of a multimodal sample are placeholders and prompt; their logits over a vocabulary of 150,000 would
    take more memory and time than the layers before them.

    Attributes:
        makes_entropies: besides each loss the entropy of its distribution, which costs another set of logits.
        temperature: of the distributions that losses and entropies are of.
        never_drawn: a token that these distributions leave out.
    """

    makes_entropies = False
    temperature = 1.0
    never_drawn: int | None = None

    def __init__(self, config: TransformerConfig, language: LanguageConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.num_tokens = language.vocab_size
        # Angles are made for each token (`_preprocess`), not for all positions up to the longest sample.
        self.position_embedding_type = "none"
        if self.post_process and config.sequence_parallel:
            # The whole sequence is gathered here, to pick from; the output layer takes it as it comes.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = True
        self._prepare_experts()

    @torch.no_grad()
    def _prepare_experts(self) -> None:
        """Mark the experts as such, and draw each one's weights from its own seed, whichever rank holds it."""
        layers: Any = self.decoder.layers
        for layer in layers:
            experts: Any = layer.mlp.experts.local_experts if self.config.num_moe_experts is not None else []
            for local, expert in enumerate(experts):
                number = first_expert(layer) + local
                seed = np.random.SeedSequence([torch.initial_seed(), layer.layer_number, number]).generate_state(1)
                for parameter in expert.parameters():
                    # With one expert-parallel rank, Megatron-Core would take them for dense parameters, whose
                    # gradients are not summed over tensor-parallel ranks.
                    setattr(parameter, "allreduce", False)  # noqa: B010 (unknown to the type)
                    if not self.config.perform_initialization:
                        continue
                    generator = torch.Generator(parameter.device).manual_seed(int(seed[0]))
                    parameter.normal_(std=self.config.init_method_std, generator=generator)

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called by name)
        self, *, position_ids: Tensor, **kwargs: Any
    ) -> tuple[Any, ...]:
        """As GPTModel's, with the rotary angles of tokens at positions `position_ids`, int64 [S], of their samples."""
        decoder_input, _, *rest = super()._preprocess(position_ids=position_ids, **kwargs)
        return decoder_input, rotary_angles(position_ids, self.rotary_pos_emb.inv_freq), *rest

    def _postprocess(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called by name)
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Hidden states [S, B, H] -> logits [B, S, V / ranks], or losses [B, S], or of the tokens at `loss_mask` [N].

        `loss_mask` is int64 [N], see models/packing.py places_of; then labels are those tokens' alone.

        With `makes_entropies` losses have a last dimension of two: the loss, and the entropy of the distribution. V is
        the padded vocabulary; logits of the padding are minus infinity. Other stages than the last pass the hidden
        states on.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Gradients come back whole from the output layer, so the gather only cuts them again.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if loss_mask is None:
            hidden_states = hidden_states.transpose(0, 1)  # [B, S, H]
        else:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, loss_mask)  # [N, H]
        if labels is None:
            return self._logits(hidden_states, weight)
        block = vocab_block(labels.numel(), self.output_layer.output_size_per_partition)
        if block < self.output_layer.output_size_per_partition:
            return self._blockwise_losses(hidden_states, weight, labels, block)
        logits = self._logits(hidden_states, weight)
        if self.never_drawn is not None and 0 <= self._row(self.never_drawn) < logits.shape[-1]:
            logits[..., self._row(self.never_drawn)] = -torch.inf
        if not self.makes_entropies:
            return vocab_parallel_cross_entropy(self._tempered(logits), labels)
        # First, since the loss works in place.
        entropies = vocab_parallel_entropy(self._tempered(logits), self.pg_collection.tp)
        return torch.stack([vocab_parallel_cross_entropy(self._tempered(logits), labels), entropies], -1)

    def _logits(self, hidden_states: Tensor, weight: Tensor | None) -> Tensor:
        """Logits [..., V / ranks] of hidden states [..., H]; those of the padding are minus infinity."""
        logits, _ = self.output_layer(hidden_states, weight=weight)
        if self._num_rows() < logits.shape[-1]:
            logits[..., self._num_rows() :] = -torch.inf
        return logits

    def _blockwise_losses(self, hidden_states: Tensor, weight: Tensor | None, labels: Tensor, block: int) -> Tensor:
        """The losses without the logits of all tokens at once."""
        layer: Any = self.output_layer
        shard = VocabShard(
            group=self.pg_collection.tp,
            first=self._first_token(),
            num_rows=self._num_rows(),
            block=block,
            temperature=self.temperature,
            never_drawn=None if self.never_drawn is None else self._row(self.never_drawn),
            sums_hidden_grad=layer.allreduce_dgrad,
        )
        losses = blockwise_losses(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            layer.weight if weight is None else weight,
            labels.reshape(-1),
            shard,
            with_entropies=self.makes_entropies,
        )
        return losses.view(*labels.shape, *losses.shape[1:])

    def _first_token(self) -> int:
        """The token that this rank's first row of the output layer stands for."""
        return self.pg_collection.tp.rank() * self.output_layer.output_size_per_partition

    def _row(self, token: int) -> int:
        """The output layer's row of a token; negative or too large where another rank has it."""
        return token - self._first_token()

    def _num_rows(self) -> int:
        """Rows of this rank's output layer that stand for tokens and do not pad the vocabulary."""
        return min(max(self._row(self.num_tokens), 0), self.output_layer.output_size_per_partition)

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


def first_expert(layer: Any) -> int:
    """Number among all experts of the first that this rank holds of a layer."""
    return layer.mlp.experts.ep_group.rank() * layer.mlp.experts.num_local_experts


def build_language_model(
    config: TransformerConfig,
    language: LanguageConfig,
    backend: str,
    groups: ProcessGroupCollection,
    *,
    first: bool,
    last: bool,
    chunk: int | None,
) -> LanguageModel:
    """One model chunk of this rank's pipeline stage of a Qwen3.

    Args:
        first: holds the embedding.
        last: holds the output layer.
        chunk: number of the chunk where the stage has several.
    """
    return LanguageModel(
        config,
        language,
        block_spec(config, backend, groups.pp.rank(), causal=True, chunk=chunk),
        language.padded_vocab_size,
        language.max_positions,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        rotary_base=int(language.rope_theta),
        share_embeddings_and_output_weights=language.tied_embeddings,
        # The whole sequence is needed to put image features in; it is scattered afterwards.
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
        vp_stage=chunk,
    )
