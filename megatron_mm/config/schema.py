"""The sections of a run's config.

Every section is frozen and refuses unknown keys; derived values are properties, and validation never assigns.
Sizes are counts of the named thing; learning rates are those of AdamW; image sizes are pixels.
"""

import math
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

MODULES = ("vision", "projector", "language", "embeddings")
Module = Literal["vision", "projector", "language", "embeddings"]

# Bounds far beyond any model, cluster or run that there is: what exceeds them is a slip of the keyboard, which would
# otherwise be found out by a failed allocation, or by a number that no integer of the libraries below us holds.
Layers = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=1_000_000)]
Tokens = Annotated[int, Field(gt=0, le=100_000_000)]
Pixels = Annotated[int, Field(gt=0, le=100_000)]
Ranks = Annotated[int, Field(gt=0, le=100_000)]
Steps = Annotated[int, Field(gt=0, le=1_000_000_000)]
Count = Annotated[int, Field(gt=0, le=100_000_000)]
Workers = Annotated[int, Field(gt=0, le=1_000)]
Seconds = Annotated[float, Field(gt=0, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=100)]
# Largest seed that torch, numpy and vLLM all take.
MAX_SEED = 2**31 - 1


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for something else, and read what a shell would have."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        kinds = typing.get_args(annotation) if is_union else (annotation,)
        kinds = [typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind for kind in kinds]
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("give a number")
        if value is None and any(typing.get_origin(kind) is dict for kind in kinds):
            return {}
        if isinstance(value, str) and Path in kinds:
            return _path(value)
        return value


def _path(text: str) -> str:
    """A path as a user writes it, with the home directory in the place of `~`.

    Raises:
        ValueError: no file can have that name.
    """
    if not text or "\0" in text:
        raise ValueError("give a path")
    return os.path.expanduser(text)


class VisionConfig(Section):
    """A SigLIP or SigLIP2 ViT of fixed tile size, used without its pooling head and final LayerNorm.

    Sizes are those of the released ViT. Where `image_size` differs from the weights', their position table is
    interpolated when they are loaded.
    """

    preset: str | None = Field(
        default=None, description="name of a file in megatron_mm/presets/vision; other keys override it"
    )
    num_layers: Layers
    drop_last_layers: int = Field(default=0, ge=0, le=10_000, description="layers at the end that are left out")
    hidden_size: Width
    num_heads: Width
    ffn_hidden_size: Width
    image_size: Pixels = Field(description="side of a tile in pixels")
    patch_size: Pixels = Field(description="side of a patch in pixels")
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    init_std: float = Field(default=0.02, gt=0, le=100, description="standard deviation of freshly made weights")
    parallel: Literal["tensor", "data"] = Field(
        default="tensor",
        description="inside the tensor-parallel group: cut the layers (tensor), or share out the tiles (data)",
    )

    @property
    def used_layers(self) -> int:
        """Layers that a tile passes through."""
        return self.num_layers - self.drop_last_layers

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Feature vectors that one tile becomes."""
        return self.patches_per_side**2

    @model_validator(mode="after")
    def _some_layers_and_patches_are_left(self) -> "VisionConfig":
        if self.used_layers < 1:
            raise ValueError(f"drop_last_layers={self.drop_last_layers} leaves none of num_layers={self.num_layers}")
        if self.patches_per_side < 1:
            raise ValueError(f"image_size={self.image_size} is smaller than patch_size={self.patch_size}")
        return self


class ProjectorConfig(Section):
    """LayerNorm -> Linear -> GELU (erf) -> Linear, as vLLM's RVLMultiModalProjector has it."""

    pre_norm: bool = Field(default=True, description="the LayerNorm; R-4B has it, LLaVA-OneVision does not")
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    init_std: float = Field(default=0.02, gt=0, le=100, description="standard deviation of freshly made weights")


class ExpertsConfig(Section):
    """Mixture of experts in place of each layer's MLP: softmax over the chosen experts, no shared one (Qwen3-MoE)."""

    num_experts: int = Field(gt=1, le=100_000)
    experts_per_token: Width
    ffn_hidden_size: Width = Field(description="of one expert; language.ffn_hidden_size is not used then")

    @model_validator(mode="after")
    def _as_many_experts_as_a_token_takes(self) -> "ExpertsConfig":
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}")
        return self


# Rows of the embedding are padded to a multiple of this, whatever the layout: checkpoints of all layouts have the same
# shape, and every usual tensor-parallel degree divides it (Megatron-LM's default of make_vocab_size_divisible_by).
VOCABULARY_MULTIPLE = 128


class LanguageConfig(Section):
    """A dense Qwen3, or with `experts` a Qwen3-MoE."""

    preset: str | None = Field(
        default=None, description="name of a file in megatron_mm/presets/language; other keys override it"
    )
    num_layers: Layers
    hidden_size: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    ffn_hidden_size: Width
    vocab_size: Tokens = Field(description="rows of the embedding, at least the tokenizer's size")
    max_positions: Tokens
    rope_theta: float = Field(default=1e6, gt=0, le=1e12)
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    tied_embeddings: bool = True
    experts: ExpertsConfig | None = None
    init_std: float = Field(default=0.02, gt=0, le=100, description="standard deviation of freshly made weights")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output layer in memory; those behind `vocab_size` are never predicted."""
        return math.ceil(self.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


# Of one picture, along a side and in all: a picture of a gigapixel has no more.
MAX_TILES = 10_000


class ModelConfig(Section):
    """ViT + projector + language model, and the any-res grids a picture may be cut into."""

    vision: VisionConfig
    projector: ProjectorConfig = ProjectorConfig()
    language: LanguageConfig
    tile_grids: tuple[tuple[int, int], ...] = Field(
        default=((1, 1),), min_length=1, description="allowed any-res grids as (rows, columns) of tiles"
    )
    max_tiles: int = Field(
        default=9,
        gt=0,
        le=MAX_TILES,
        description="N of anyres_max_N: features of a grid are scaled down to about N tiles where they are more than "
        "1.21 N (LLaVA-OneVision)",
    )
    multi_image: Literal["anyres", "square"] = Field(
        default="anyres",
        description="how each of several pictures of one sample is cut: by the grids (LLaVA-NeXT, R-4B in vLLM), or "
        "padded to one square tile (LLaVA-OneVision)",
    )

    @model_validator(mode="after")
    def _tile_grids_are_positive(self) -> "ModelConfig":
        for rows, columns in self.tile_grids:
            if rows < 1 or columns < 1 or rows * columns > MAX_TILES:
                raise ValueError(
                    f"tile_grids holds ({rows}, {columns}); rows and columns are 1 or more, and at most {MAX_TILES:,} "
                    "tiles together"
                )
        return self


class DataConfig(Section):
    """A prepared data set, how its parts are mixed, and how its samples become batches."""

    path: str | None = Field(
        default=None, description="written by `megatron-mm data prepare`: a directory, or a URL that fsspec opens"
    )
    blend: dict[str, float] = Field(
        default_factory=dict,
        description="weight of each part 'source/mode', for example {'ocr/*': 1}; * stands for anything. Left out, "
        "every sample is seen once an epoch",
    )
    rendering: Literal["pretrain", "anneal", "cold_start"] = Field(
        default="pretrain", description="how responses are written and which of their tokens are trained (docs/data.md)"
    )
    packed: bool = Field(
        default=False,
        description="join samples to packs of max_sequence_tokens; train.global_batch and micro_batch count packs",
    )
    max_sequence_tokens: int = Field(
        default=1024,
        gt=1,
        le=100_000_000,
        description="length of a pack, and longest sample; longer ones are left out and counted",
    )
    max_pack_tiles: Count | None = Field(default=None, description="most tiles in a pack, and in a sample")
    max_left_out: float = Field(
        default=0.01, ge=0, le=1, description="share of samples that may be too long before a run is refused"
    )
    max_broken: float = Field(
        default=0.001, ge=0, le=1, description="share of samples read that may be damaged before a run ends"
    )
    decoder: Literal["pillow", "dali"] = Field(
        default="pillow", description="what decodes pictures; dali decodes JPEG on the GPU where there is one"
    )
    num_workers: int = Field(
        default=0, ge=0, le=1_000, description="loader processes a rank; 0 reads in the training process"
    )

    @field_validator("path", mode="before")
    @classmethod
    def _is_a_place(cls, value: Any) -> Any:
        return _path(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weights_are_positive(self) -> "DataConfig":
        wrong = {part: weight for part, weight in self.blend.items() if not weight > 0 or math.isinf(weight)}
        if wrong:
            raise ValueError(f"blend has weights that are not positive numbers: {wrong}; remove the part instead")
        return self


class ParallelConfig(Section):
    """Degrees of parallelism; the data-parallel degree is what is left of the ranks."""

    tensor: Ranks = 1
    pipeline: Ranks = 1
    virtual_pipeline: Layers = Field(default=1, description="model chunks a pipeline stage; 2 or more interleave")
    pipeline_layers: tuple[int, ...] | None = Field(
        default=None,
        description="language layers of each model chunk in the order they run; left out, shared out evenly",
    )
    vision_as_layers: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="language layers that ViT and projector count for where pipeline_layers is left out; left out "
        "itself, their share of the parameters says",
    )
    context: Ranks = Field(default=1, description="ranks that share one sequence, cut in zigzag order after fusion")
    expert: Ranks = Field(
        default=1,
        description="ranks that the experts are shared out over, taken from the tensor-, context- and "
        "data-parallel ones",
    )
    sequence: bool = Field(default=False, description="Megatron's sequence parallelism in the tensor-parallel group")

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model and one sequence are cut over."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_chunks(self) -> int:
        """Model chunks over all pipeline stages."""
        return self.pipeline * self.virtual_pipeline


class Fp8Config(Section):
    """8-bit matrix products by Transformer Engine, in the attention and MLP layers of some modules.

    Embeddings, output layer, attention scores, norms and everything between the products stay in bf16; weights,
    gradients and optimizer are kept as without it.
    """

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        default="none",
        description="how products are scaled: by past maxima, by the tensor's, by blocks of 128 x 128, by blocks of 32",
    )
    modules: tuple[Literal["vision", "projector", "language"], ...] = Field(
        default=("language",), min_length=1, description="modules it is used in; others stay in bf16"
    )
    amax_history: Count = Field(default=1024, description="steps whose maxima `delayed` remembers")

    @property
    def alignment(self) -> int:
        """What both sides of every matrix on a rank must be a multiple of; 1 without FP8.

        Transformer Engine 2.11: products want 16 (utils.py assert_dim_for_fp8_exec, cublaslt_gemm.cu), MXFP8 its
        blocks of 32.
        """
        return {"none": 1, "mxfp8": 32}.get(self.recipe, 16)

    def used_in(self, module: str) -> bool:
        """Whether the products of `module` are 8-bit."""
        return self.recipe != "none" and module in self.modules


class TrainConfig(Section):
    """How long, how much at once, and which modules learn."""

    steps: Steps
    global_batch: Count = Field(description="samples, or packs, of one optimizer step over all ranks")
    micro_batch: Count = Field(description="samples, or packs, of one forward pass on one data-parallel rank")
    trained: tuple[Module, ...] = Field(
        default=MODULES,
        min_length=1,
        description="modules that learn; others stay frozen. embeddings are the language model's input and output "
        "tables, language is the rest of it",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations recomputed in the backward pass: those of attention, or of whole layers",
    )
    log_every: Steps = 10
    validate_every: Steps | None = Field(
        default=None, description="steps between losses on the held-out split; left out, there are none"
    )
    validate_batches: Count = Field(default=8, description="global batches of it that are looked at")

    def is_validated(self, step: int) -> bool:
        """Whether the held-out split is looked at after so many steps."""
        every = self.validate_every
        return every is not None and (step % every == 0 or step == self.steps)

    def is_logged(self, step: int) -> bool:
        """Whether metrics are recorded after so many steps."""
        return step % self.log_every == 0 or step == self.steps or self.is_validated(step)


class ModuleRate(Section):
    """Learning rate of one module; left out, min_lr equals lr: it stays constant after warm-up."""

    lr: Rate
    min_lr: float | None = Field(default=None, ge=0, le=100)


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Rate
    min_lr: float = Field(default=0.0, ge=0, le=100)
    modules: dict[Module, ModuleRate] = Field(
        default_factory=dict, description="rates of modules that differ, for example {vision: {lr: 4e-6}}"
    )
    distributed: bool = Field(
        default=True, description="share the optimizer's state out over data- and context-parallel ranks"
    )
    overlap: bool | None = Field(
        default=None,
        description="sum gradients over data- and context-parallel ranks while the backward pass goes on; left out, on "
        "GPUs only",
    )
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        default="cosine",
        description="what follows the linear warm-up: a half cosine to min_lr, lr for ever, or lr until the last "
        "decay_steps and a straight line to min_lr (warm-up, stable, decay)",
    )
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    decay_steps: Steps | None = Field(default=None, description="of wsd: steps at the end in which the rate falls")
    # The papers name neither betas, decay nor clipping: these four are our defaults (recipes: R-4B 1.4).
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0, le=100, description="not applied to biases and norms")
    clip_grad: float = Field(default=1.0, gt=0, description="bound on the global gradient norm")


class CheckpointConfig(Section):
    """When to save, besides the end of the run, and what to keep."""

    save_every: Steps = Field(default=500, description="steps between checkpoints")
    asynchronous: bool = Field(default=True, description="write in the background while training goes on")
    stall_seconds: Seconds = Field(
        default=300, description="without any progress after which a write in the background is given up"
    )
    keep_last: Count = Field(default=2, description="newest checkpoints that are kept")
    keep_every: Steps | None = Field(
        default=None, description="checkpoints of multiples of so many steps are kept for ever as well"
    )
    verify: bool = Field(default=True, description="compare all files with their checksums before resuming")
    export_every: Steps | None = Field(
        default=None, description="steps between exports in R-4B's Hugging Face format to RUN/exports"
    )


class GuardConfig(Section):
    """What a run does about steps that went wrong, and about ranks that went silent."""

    spike_sigma: float | None = Field(
        default=None,
        ge=0,
        description="a loss or gradient norm so many standard deviations above the mean of the last spike_window steps "
        "is a spike, whose update is skipped; 0 lets spikes pass. NaN and infinity are always skipped. Left out: 6, or "
        "0 in reinforcement learning, where both hang on which responses were right",
    )
    spike_rise: float = Field(
        default=0.1, ge=0, description="a loss that is less above that mean, in nats a token, is no spike"
    )
    spike_window: int = Field(
        default=128, gt=1, le=100_000_000, description="steps remembered; spikes are told from half of it on"
    )
    max_skips: Count = Field(
        default=5, description="updates in a row skipped, for NaN or a loss that spikes, before a roll-back"
    )
    max_rollbacks: int = Field(
        default=3, ge=0, le=100_000_000, description="roll-backs to the last checkpoint before the run ends"
    )
    hang_seconds: Seconds = Field(
        default=900, description="without any progress after which all ranks end, saying which one hangs where"
    )


class TelemetryConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "megatron_mm"
    peak_tflops: float | None = Field(
        default=None, gt=0, description="of one rank, for the utilisation; left out, those of known GPUs (dense bf16)"
    )


class ObjectiveConfig(Section):
    """What an update of reinforcement learning maximises (rl/objective.py has formulas and sources)."""

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratios below 1 - clip_low gain nothing more")
    clip_high: float = Field(default=0.2, gt=0, description="ratios above 1 + clip_high gain nothing more")
    ratio: Literal["token", "sequence"] = Field(default="token", description="sequence is GSPO's")
    average: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="mean of each response and then of all (GRPO), of all tokens (DAPO), or the sum over "
        "max_response_tokens (Dr. GRPO)",
    )
    kl: Literal["none", "loss", "reward"] = Field(
        default="loss", description="where the divergence from the weights that the run began with is charged"
    )
    kl_estimator: Literal["k1", "k3"] = "k3"
    kl_coef: float = Field(default=1e-2, ge=0)
    mismatch: Literal["none", "truncate", "mask"] = Field(
        default="none",
        description="what is done where the engine's log-probabilities differ from the trainer's: weight tokens by the "
        "ratio, cut off at mismatch_cap, or leave out those beyond it on either side",
    )
    mismatch_cap: float = Field(default=2.0, gt=1)
    entropy_coef: float = Field(default=0.0, ge=0, description="gain of an update for a nat of a token's entropy")
    mask_trigger_tokens: bool = Field(
        default=False,
        description="do not train the tokens that force a mode. R-4B's text can be read so, but then nothing teaches "
        "the decision to think",
    )


class StageConfig(Section):
    """A stretch of steps; several, with longer responses and smaller groups, are PTST (Vision-R1, arXiv 2503.06749)."""

    steps: Steps
    max_response_tokens: Tokens = Field(description="longest response; longer ones are cut off")
    group_size: Count = Field(description="responses to a prompt; with bpo, in each mode")
    # vLLM 0.32's SamplingParams: above 2 is an error, and below 0.01 it draws at 0.01, from another policy than ours.
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="below 1 responses are drawn from less than the policy, which objective.mismatch can weigh",
    )
    lr: Rate | None = Field(default=None, description="learning rate; left out, the schedule's of optim")


class RewardConfig(Section):
    """What a response is worth (docs/rewards.md)."""

    name: str = Field(default="hfrrf", description="hfrrf, weighted, or that of a plug-in")
    format: str = "think"
    kind: str = Field(default="auto", description="of the answers that are compared")
    format_weight: float = Field(default=0.5, ge=0)
    accuracy_weight: float = Field(default=0.5, ge=0)
    relative_tolerance: float = Field(
        default=1e-6,
        ge=0,
        lt=1,
        description="how far a value written with a point may be off, as share of the reference",
    )
    absolute_tolerance: float = Field(
        default=0.0, ge=0, description="the same in the reference's unit; either is enough"
    )
    num_workers: Workers = Field(default=2, description="grading processes of an engine")
    cpu_seconds: Seconds = Field(default=1.5, description="processor time of an answer; beyond it, it gets 0")
    wall_seconds: Seconds = Field(
        default=10.0, description="the same by the clock, for a plug-in that waits instead of computing"
    )
    memory_mib: Count = Field(default=512, description="the same of memory, beyond what a grading process has")


class RolloutConfig(Section):
    """The engines that draw responses, in the trainer's processes."""

    ranks: Ranks = Field(default=1, description="of one engine, tensor-parallel, whatever the trainer's layout")
    max_sequences: Count = Field(default=256, description="responses that an engine works on at a time")
    cache_gib: float | Literal["auto"] = Field(
        default="auto",
        description="memory of a rank for an engine's keys and values; auto is what is free while responses are drawn, "
        "less a margin (docs/rl.md)",
    )
    offload: bool = Field(
        default=False,
        description="while responses are drawn, the gradients' memory is free and the optimizer's state in the host's "
        "memory; the reference is there whenever it is not used",
    )
    compare_all_every: Steps = Field(
        default=100, description="exchanges after which every element that an engine holds is compared"
    )
    max_logprob_difference: float = Field(
        default=0.1,
        gt=0,
        description="mean absolute difference of a token's log-probability between engine and trainer that ends a run",
    )

    @field_validator("cache_gib", mode="before")
    @classmethod
    def _is_a_size_or_auto(cls, value: object) -> object:
        # One message: pydantic has one for each kind of value that could be.
        if value == "auto" or (isinstance(value, int | float) and value is not True and 0 < value < math.inf):
            return value
        raise ValueError("give a number of GiB above 0, or auto")

    @property
    def cache_bytes(self) -> int | None:
        """`cache_gib` in bytes; None for auto."""
        return None if self.cache_gib == "auto" else int(self.cache_gib * 2**30)


class ReinforceConfig(Section):
    """Reinforcement learning from answers that can be checked; train.global_batch counts prompts of a step then."""

    algorithm: Literal["grpo", "bpo"]
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    updates: Count = Field(default=1, description="optimizer steps that a step's responses are shared out over")
    by_deviation: bool = Field(default=True, description="divide advantages by the group's standard deviation")
    max_draws: Count = Field(
        default=1, description="global batches that may be drawn until enough prompts tell responses apart"
    )
    least_mode_share: float = Field(
        default=0.01,
        ge=0,
        lt=0.5,
        description="share of the answers in auto mode below which a mode has collapsed, which is said once: of "
        "held-out questions, or without train.validate_every of the step's",
    )
    system_prompt: str | None = Field(default=None, description="before every question")
    heldout_questions: Count = Field(
        default=100, description="of each part of the held-out split that are asked every train.validate_every"
    )
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> StageConfig:
        """The stage of a step, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step is {step} behind the last stage")


class RunConfig(Section):
    """One training run."""

    recipe: str = Field(description="name of the recipe that this config came from")
    run_dir: Path = Field(description="directory that takes everything the run writes")
    init_from: Path | None = Field(
        default=None,
        description="what to take weights from: a run directory, a checkpoint in it, or a Hugging Face directory",
    )
    platform: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    model: ModelConfig
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    fp8: Fp8Config = Fp8Config()
    train: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    rl: ReinforceConfig | None = None

    @model_validator(mode="after")
    def _schedule_fits_the_run(self) -> "RunConfig":
        faults = []
        if self.optim.warmup_steps >= self.train.steps:
            faults.append(f"optim.warmup_steps={self.optim.warmup_steps} leaves none of train.steps={self.train.steps}")
        optim = self.optim
        if (optim.schedule == "wsd") != (optim.decay_steps is not None):
            faults.append(
                f"optim.decay_steps={optim.decay_steps} with optim.schedule={optim.schedule}: wsd needs it, no other "
                "schedule has it"
            )
        elif optim.decay_steps is not None and optim.warmup_steps + optim.decay_steps > self.train.steps:
            faults.append(
                f"optim.warmup_steps={optim.warmup_steps} + optim.decay_steps={optim.decay_steps} is more than "
                f"train.steps={self.train.steps}"
            )
        for module, rate in optim.modules.items():
            if rate.min_lr is not None and rate.min_lr > rate.lr:
                faults.append(f"optim.modules.{module}.min_lr={rate.min_lr} is above its lr={rate.lr}")
        if self.rl is not None:
            faults += self._reinforce_faults(self.rl)
        if self.fp8.recipe != "none" and self.precision != "bf16":
            faults.append(f"fp8.recipe={self.fp8.recipe} needs precision=bf16, not {self.precision}")
        if self.optim.min_lr > self.optim.lr:
            faults.append(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}")
        if self.data.max_sequence_tokens > self.model.language.max_positions:
            faults.append(
                f"data.max_sequence_tokens={self.data.max_sequence_tokens} is above "
                f"model.language.max_positions={self.model.language.max_positions}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _reinforce_faults(self, rl: ReinforceConfig) -> Iterator[str]:
        if rl.steps != self.train.steps:
            # What the last stage would have to be for train.steps to stand.
            last, rest = len(rl.stages) - 1, self.train.steps - (rl.steps - rl.stages[-1].steps)
            fix = (
                f"give rl.stages.{last}.steps={rest} as well"
                if rest > 0
                else f"give rl.stages as well, such as {self._one_stage(rl)}"
            )
            yield f"the stages of rl.stages have {rl.steps} steps, train.steps={self.train.steps}; {fix}"
        for number, stage in enumerate(rl.stages):
            if rl.algorithm == "grpo" and stage.group_size == 1:
                yield f"rl.stages.{number}.group_size=1: a response has nothing to be compared with; raise it"
            if stage.max_response_tokens >= self.data.max_sequence_tokens:
                yield (
                    f"rl.stages.{number}.max_response_tokens={stage.max_response_tokens} leaves no room for a prompt "
                    f"in data.max_sequence_tokens={self.data.max_sequence_tokens}; lower it, or raise that"
                )
        yield from self.rollout_faults(rl.rollout)

    def _one_stage(self, rl: ReinforceConfig) -> str:
        """An override for as many steps as the run has, with the first stage's lengths."""
        first = rl.stages[0]
        return (
            f"'rl.stages=[{{steps: {self.train.steps}, max_response_tokens: {first.max_response_tokens}, "
            f"group_size: {first.group_size}}}]'"
        )

    def rollout_faults(self, rollout: RolloutConfig) -> Iterator[str]:
        """Yield every reason why this model and precision cannot be drawn from like that, one sentence each."""
        if rollout.offload and self.precision != "bf16":
            yield (
                f"rl.rollout.offload=true needs precision=bf16, not {self.precision}, where the optimizer works on the "
                "model's own weights"
            )
        ranks, vision, language = rollout.ranks, self.model.vision, self.model.language
        cut = {
            "language.num_heads": language.num_heads,
            "language.ffn_hidden_size": language.ffn_hidden_size,
            "vision.num_heads": vision.num_heads,
            "vision.ffn_hidden_size": vision.ffn_hidden_size,
        }
        for field, size in cut.items():
            if size % ranks:
                yield f"rl.rollout.ranks={ranks} does not divide model.{field}={size}, which vLLM cuts"
        # Where there are more ranks than heads, several have the same head.
        if max(ranks, language.num_kv_heads) % min(ranks, language.num_kv_heads):
            yield f"rl.rollout.ranks={ranks} does not fit model.language.num_kv_heads={language.num_kv_heads}"
