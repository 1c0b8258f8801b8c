"""Qwen3 as Megatron-Core's GPTModel."""

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_mm.config.schema import LanguageConfig
from megatron_mm.models.specs import block_spec


def build_language_model(
    config: TransformerConfig,
    language: LanguageConfig,
    backend: str,
    groups: ProcessGroupCollection,
    *,
    first: bool,
    last: bool,
) -> GPTModel:
    """This rank's pipeline stage of a Qwen3; `first` holds the embedding, `last` the output layer."""
    return GPTModel(
        config,
        block_spec(config, backend, causal=True, stage=groups.pp.rank()),  # pyright: ignore
        language.vocab_size,
        language.max_positions,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        rotary_base=int(language.rope_theta),
        share_embeddings_and_output_weights=language.tied_embeddings,
        # The whole sequence is needed to put image features in; it is scattered afterwards.
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
    )
