"""Which rule holds for which tensor of the model. Names on the Hugging Face side are those of the released R-4B."""

from megatron_mm.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_mm.weights.mapping import FusedQkv, GatedMlp, PaddedVocabulary, PatchConvolution, Rule, Shape

VISION = "model.vision_tower.vision_model."
PROJECTOR = "model.multi_modal_projector."
NEWLINE = "model.image_newline"
LANGUAGE = "model.language_model."
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
OUTPUT = "lm_head.weight"


def model_table(model: ModelConfig) -> list[Rule]:
    """Every parameter of VisionLanguageModel, in the order they are exported."""
    return [
        *vision_table(model.vision),
        *projector_table(model.projector, model.vision.hidden_size, model.language.hidden_size),
        *language_table(model.language),
    ]


def vision_table(vision: VisionConfig) -> list[Rule]:
    """SigLIP (transformers' SiglipVisionModel) without pooling head, final norm and dropped layers."""
    cut = vision.parallel == "tensor"
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    kernel = (width, 3, vision.patch_size, vision.patch_size)
    rules: list[Rule] = [
        PatchConvolution("vision.patch_embedding.weight", (f"{VISION}embeddings.patch_embedding.weight",), (kernel,)),
        Rule("vision.patch_embedding.bias", (f"{VISION}embeddings.patch_embedding.bias",), ((width,),)),
        Rule(
            "vision.position_embedding.weight",
            (f"{VISION}embeddings.position_embedding.weight",),
            ((vision.patches_per_tile, width),),
        ),
    ]
    for layer in range(vision.used_layers):
        ours, theirs = f"vision.encoder.layers.{layer}.", f"{VISION}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            column = 0 if cut else None
            # The bias of a row-parallel layer is added once, after the sum over ranks: every rank holds all of it.
            row = 1 if cut and kind == "weight" else None

            def shape(out: int, into: int, kind: str = kind) -> tuple[Shape]:
                return ((out, into) if kind == "weight" else (out,),)

            qkv = tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")
            norm = ((width,),)
            rules += [
                Rule(f"{ours}input_layernorm.{kind}", (f"{theirs}layer_norm1.{kind}",), norm),
                FusedQkv(
                    f"{ours}self_attention.linear_qkv.{kind}",
                    qkv,
                    shape(width, width) * 3,
                    column,
                    head_dim=width // vision.num_heads,
                ),
                Rule(
                    f"{ours}self_attention.linear_proj.{kind}",
                    (f"{theirs}self_attn.out_proj.{kind}",),
                    shape(width, width),
                    row,
                ),
                Rule(f"{ours}pre_mlp_layernorm.{kind}", (f"{theirs}layer_norm2.{kind}",), norm),
                Rule(f"{ours}mlp.linear_fc1.{kind}", (f"{theirs}mlp.fc1.{kind}",), shape(ffn, width), column),
                Rule(f"{ours}mlp.linear_fc2.{kind}", (f"{theirs}mlp.fc2.{kind}",), shape(width, ffn), row),
            ]
    return rules


def projector_table(projector: ProjectorConfig, narrow: int, wide: int) -> list[Rule]:
    """R-4B's projector (vLLM's RVLMultiModalProjector), or LLaVA's without its norm, and the newline vector.

    Args:
        narrow: width of the ViT.
        wide: width of the language model.
    """
    rules: list[Rule] = []
    if projector.pre_norm:
        rules += [
            Rule(f"projector.pre_norm.{kind}", (f"{PROJECTOR}pre_norm.{kind}",), ((narrow,),))
            for kind in ("weight", "bias")
        ]
    return [
        *rules,
        Rule("projector.mlp.linear_fc1.weight", (f"{PROJECTOR}linear_1.weight",), ((wide, narrow),), 0),
        Rule("projector.mlp.linear_fc1.bias", (f"{PROJECTOR}linear_1.bias",), ((wide,),), 0),
        Rule("projector.mlp.linear_fc2.weight", (f"{PROJECTOR}linear_2.weight",), ((wide, wide),), 1),
        Rule("projector.mlp.linear_fc2.bias", (f"{PROJECTOR}linear_2.bias",), ((wide,),)),
        Rule("fusion.image_newline", (NEWLINE,), ((wide,),)),
    ]


def language_table(language: LanguageConfig) -> list[Rule]:
    """Qwen3 and Qwen3-MoE (transformers' Qwen3ForCausalLM, Qwen3MoeForCausalLM) under R-4B's prefix."""
    width, head = language.hidden_size, language.head_dim
    queries, keys = language.num_heads * head, language.num_kv_heads * head
    table, padded = ((language.vocab_size, width),), language.padded_vocab_size
    norm = ((width,),)
    rules: list[Rule] = [
        PaddedVocabulary("language.embedding.word_embeddings.weight", (EMBEDDING,), table, 0, padded=padded),
        Rule("language.decoder.final_layernorm.weight", (f"{LANGUAGE}norm.weight",), norm),
    ]
    for layer in range(language.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"{LANGUAGE}layers.{layer}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        qkv = tuple(f"{attention}{name}_proj.weight" for name in "qkv")
        qkv_shapes = ((queries, width), (keys, width), (keys, width))
        rules += [
            Rule(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",), norm),
            FusedQkv(f"{ours}self_attention.linear_qkv.weight", qkv, qkv_shapes, 0, head_dim=head),
            Rule(f"{ours}self_attention.q_layernorm.weight", (f"{attention}q_norm.weight",), ((head,),)),
            Rule(f"{ours}self_attention.k_layernorm.weight", (f"{attention}k_norm.weight",), ((head,),)),
            Rule(f"{ours}self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), ((width, queries),), 1),
            Rule(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), norm),
        ]
        experts = language.experts
        if experts is None:
            rules += _gated_mlp(f"{ours}mlp.", mlp, width, language.ffn_hidden_size, cut=True)
            continue
        rules.append(Rule(f"{ours}mlp.router.weight", (f"{mlp}gate.weight",), ((experts.num_experts, width),)))
        for expert in range(experts.num_experts):
            local = f"{ours}mlp.experts.local_experts.{expert}."
            rules += _gated_mlp(local, f"{mlp}experts.{expert}.", width, experts.ffn_hidden_size, cut=False)
    if not language.tied_embeddings:
        rules.append(PaddedVocabulary("language.output_layer.weight", (OUTPUT,), table, 0, padded=padded))
    return rules


def _gated_mlp(ours: str, theirs: str, width: int, ffn: int, *, cut: bool) -> list[Rule]:
    gate_and_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return [
        GatedMlp(f"{ours}linear_fc1.weight", gate_and_up, ((ffn, width),) * 2, 0 if cut else None),
        Rule(f"{ours}linear_fc2.weight", (f"{theirs}down_proj.weight",), ((width, ffn),), 1 if cut else None),
    ]
