"""Parameters of each module: over the whole model, and on a rank of a pipeline stage."""

from dataclasses import dataclass

from megatron_mm.config.layout import pipeline_split
from megatron_mm.config.schema import MODULES, ModelConfig, Module, RunConfig


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters that one rank holds, by module; experts, which other ranks share out, by themselves."""

    dense: dict[Module, int]
    experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.dense.values()) + self.experts

    def trained(self, modules: tuple[Module, ...]) -> "Held":
        """Those of the modules that learn."""
        dense: dict[Module, int] = {module: number for module, number in self.dense.items() if module in modules}
        return Held(dense, self.experts if "language" in modules else 0)


def model_parameters(model: ModelConfig, *, padded: bool = False) -> dict[Module, int]:
    """Parameters of the whole model by module; embeddings are the input table and, untied, the output's.

    Args:
        padded: count the rows of the vocabulary that only fill it up.
    """
    language = model.language
    rows = language.padded_vocab_size if padded else language.vocab_size
    return {
        "vision": _vision(model, 1),
        "projector": _projector(model, 1),
        "language": language.num_layers * (_language_layer(model, 1) + _experts(model, 1)) + language.hidden_size,
        "embeddings": rows * language.hidden_size * (1 if language.tied_embeddings else 2),
    }


def stage_parameters(config: RunConfig, stage: int) -> Held:
    """Parameters on a rank of pipeline stage `stage`, with the padding of the vocabulary and with copies of others'.

    The tied embedding lies on the first and the last stage.
    """
    parallel, model, language = config.parallel, config.model, config.model.language
    tensor = parallel.tensor
    num_layers = sum(pipeline_split(config)[stage :: parallel.pipeline])
    first, last = stage == 0, stage == parallel.pipeline - 1
    table = language.padded_vocab_size * language.hidden_size // tensor
    num_tables = first + (last and not (first and language.tied_embeddings))
    dense: dict[Module, int] = dict.fromkeys(MODULES, 0)
    if first:
        dense["vision"] = _vision(model, tensor if model.vision.parallel == "tensor" else 1)
        dense["projector"] = _projector(model, tensor)
    dense["language"] = num_layers * _language_layer(model, tensor) + last * language.hidden_size
    dense["embeddings"] = num_tables * table
    return Held(dense, num_layers * _experts(model, parallel.expert))


def _vision(model: ModelConfig, ranks: int) -> int:
    """Of the ViT on one of `ranks` ranks; biases of what is cut by rows, norms and tables are whole on each."""
    vision = model.vision
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    cut = (4 * hidden**2 + 3 * hidden) + (2 * hidden * ffn + ffn)
    whole = 2 * hidden + 2 * 2 * hidden
    patches = 3 * vision.patch_size**2 * hidden + hidden
    return vision.used_layers * (cut // ranks + whole) + patches + vision.patches_per_tile * hidden


def _projector(model: ModelConfig, ranks: int) -> int:
    """Of the projector and the vector that ends a row of patches."""
    narrow, wide = model.vision.hidden_size, model.language.hidden_size
    norm = 2 * narrow if model.projector.pre_norm else 0
    return norm + (narrow * wide + wide + wide**2) // ranks + wide + wide


def _language_layer(model: ModelConfig, ranks: int) -> int:
    """Of one layer but its experts; the router is whole on each rank."""
    language = model.language
    attention = 2 * (language.num_heads + language.num_kv_heads) * language.head_dim * language.hidden_size
    norms = 2 * language.hidden_size + 2 * language.head_dim
    if language.experts is not None:
        return attention // ranks + norms + language.experts.num_experts * language.hidden_size
    return (attention + 3 * language.hidden_size * language.ffn_hidden_size) // ranks + norms


def _experts(model: ModelConfig, ranks: int) -> int:
    """Of the experts of one layer, whole ones of which are shared out over `ranks` ranks."""
    language = model.language
    if language.experts is None:
        return 0
    return language.experts.num_experts // ranks * 3 * language.hidden_size * language.experts.ffn_hidden_size
