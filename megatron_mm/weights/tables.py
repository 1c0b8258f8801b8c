"""Which rule holds for which tensor of the model. Names on the Hugging Face side are those of the released R-4B."""

from megatron_mm.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_mm.weights.mapping import FusedQkv, GatedMlp, PatchConvolution, Rule


def model_table(model: ModelConfig) -> list[Rule]:
    """Every parameter of VisionLanguageModel, in the order they are exported."""
    return [*vision_table(model.vision), *projector_table(model.projector), *language_table(model.language)]


def vision_table(vision: VisionConfig) -> list[Rule]:
    """SigLIP (transformers' SiglipVisionModel) without pooling head, final norm and dropped layers."""
    cut = vision.parallel == "tensor"
    hf = "model.vision_tower.vision_model."
    rules: list[Rule] = [
        PatchConvolution(
            "vision.patch_embedding.weight",
            (f"{hf}embeddings.patch_embedding.weight",),
            patch_size=vision.patch_size,
        ),
        Rule("vision.patch_embedding.bias", (f"{hf}embeddings.patch_embedding.bias",)),
        Rule("vision.position_embedding.weight", (f"{hf}embeddings.position_embedding.weight",)),
    ]
    head_dim = vision.hidden_size // vision.num_heads
    for layer in range(vision.used_layers):
        ours, theirs = f"vision.encoder.layers.{layer}.", f"{hf}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            column = 0 if cut else None
            # The bias of a row-parallel layer is added once, after the sum over ranks: every rank holds all of it.
            row = 1 if cut and kind == "weight" else None
            qkv = tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")
            rules += [
                Rule(f"{ours}input_layernorm.{kind}", (f"{theirs}layer_norm1.{kind}",)),
                FusedQkv(f"{ours}self_attention.linear_qkv.{kind}", qkv, column, vision.num_heads, head_dim),
                Rule(f"{ours}self_attention.linear_proj.{kind}", (f"{theirs}self_attn.out_proj.{kind}",), row),
                Rule(f"{ours}pre_mlp_layernorm.{kind}", (f"{theirs}layer_norm2.{kind}",)),
                Rule(f"{ours}mlp.linear_fc1.{kind}", (f"{theirs}mlp.fc1.{kind}",), column),
                Rule(f"{ours}mlp.linear_fc2.{kind}", (f"{theirs}mlp.fc2.{kind}",), row),
            ]
    return rules


def projector_table(projector: ProjectorConfig) -> list[Rule]:
    """R-4B's projector (vLLM's RVLMultiModalProjector), or LLaVA's without its norm, and the newline vector."""
    hf = "model.multi_modal_projector."
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        if projector.pre_norm:
            rules.append(Rule(f"projector.pre_norm.{kind}", (f"{hf}pre_norm.{kind}",)))
        rules += [
            Rule(f"projector.mlp.linear_fc1.{kind}", (f"{hf}linear_1.{kind}",), 0),
            Rule(f"projector.mlp.linear_fc2.{kind}", (f"{hf}linear_2.{kind}",), 1 if kind == "weight" else None),
        ]
    return [*rules, Rule("fusion.image_newline", ("model.image_newline",))]


def language_table(language: LanguageConfig) -> list[Rule]:
    """Qwen3 and Qwen3-MoE (transformers' Qwen3ForCausalLM, Qwen3MoeForCausalLM) under R-4B's prefix."""
    hf = "model.language_model."
    rules: list[Rule] = [
        Rule("language.embedding.word_embeddings.weight", (f"{hf}embed_tokens.weight",), 0),
        Rule("language.decoder.final_layernorm.weight", (f"{hf}norm.weight",)),
    ]
    for layer in range(language.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"{hf}layers.{layer}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        qkv = tuple(f"{attention}{name}_proj.weight" for name in "qkv")
        rules += [
            Rule(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",)),
            FusedQkv(f"{ours}self_attention.linear_qkv.weight", qkv, 0, language.num_kv_heads, language.head_dim),
            Rule(f"{ours}self_attention.q_layernorm.weight", (f"{attention}q_norm.weight",)),
            Rule(f"{ours}self_attention.k_layernorm.weight", (f"{attention}k_norm.weight",)),
            Rule(f"{ours}self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), 1),
            Rule(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",)),
        ]
        if language.experts is None:
            rules += _gated_mlp(f"{ours}mlp.", mlp, cut=True)
            continue
        rules.append(Rule(f"{ours}mlp.router.weight", (f"{mlp}gate.weight",)))
        for expert in range(language.experts.num_experts):
            rules += _gated_mlp(f"{ours}mlp.experts.local_experts.{expert}.", f"{mlp}experts.{expert}.", cut=False)
    if not language.tied_embeddings:
        rules.append(Rule("language.output_layer.weight", ("lm_head.weight",), 0))
    return rules


def _gated_mlp(ours: str, theirs: str, *, cut: bool) -> list[Rule]:
    return [
        GatedMlp(
            f"{ours}linear_fc1.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"), 0 if cut else None
        ),
        Rule(f"{ours}linear_fc2.weight", (f"{theirs}down_proj.weight",), 1 if cut else None),
    ]
