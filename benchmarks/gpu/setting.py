"""What the measurements run on: a GPU with the real shapes, or with --dry a CPU with tiny ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig

# R-4B's recipes on one rank: no layout of several, random weights, and data with the parts of photos.py.
_ON_ONE_RANK = {
    "r4b/stage3": (
        "data.blend={caption/*: 86.7, text/*: 13.3}",
        "model.vision.parallel=tensor",
        "train.steps=1000",
    ),
    "r4b/bpo": ("data.blend={sum/non_thinking: 1}", "train.validate_every=null"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured. No measurement asks whether it is a dry one.

    Attributes:
        platform: "cuda" or "cpu".
        start_method: of each measurement's process. CUDA cannot be used in a fork of a process that has asked for it,
            as Megatron-Core's imports do; elsewhere a fork saves each measurement the imports.
        overrides: recipe -> what is different from it, besides what one rank needs.
        has_fp8: whether FP8 recipes run as such; otherwise their steps are taken in bf16.
        matrix_side: of the square matrices that are multiplied.
        copy_bytes: of the tensor that is copied.
        num_photos: samples with an image, in each subset.
        photo_sides: shortest and longest side of a photo in pixels.
        answer_words: of the shortest and longest answer.
        vocabulary: tokens of the data set's tokenizer.
        pack_tokens: lengths of packs, the longest first; a step takes the longest that needs no recomputation.
        step_tokens: of the packs of a training step together.
        warm_up_steps, timed_steps: of training.
        timed_syncs: weight syncs.
        cache_bytes: of an engine's keys and values.
        num_sequences: responses that are generated at the same time, of each rollout.
        group_size: responses to a prompt.
        response_tokens: of each response.
    """

    platform: str
    start_method: str
    overrides: Mapping[str, tuple[str, ...]]
    has_fp8: bool
    matrix_side: int
    copy_bytes: int
    num_photos: int
    photo_sides: tuple[int, int]
    answer_words: tuple[int, int]
    vocabulary: int
    pack_tokens: tuple[int, ...]
    step_tokens: int
    warm_up_steps: int
    timed_steps: int
    timed_syncs: int
    cache_bytes: int
    num_sequences: tuple[int, ...]
    group_size: int
    response_tokens: int


GPU = Sizes(
    platform="cuda",
    start_method="spawn",
    overrides={
        "r4b/stage3": (),
        "r4b/bpo": (
            "train.steps=2",
            "train.global_batch=16",
            "rl.updates=2",
            "rl.stages=[{steps: 2, max_response_tokens: 512, group_size: 8}]",
        ),
    },
    has_fp8=True,
    matrix_side=8192,
    copy_bytes=2**32,
    num_photos=192,
    photo_sides=(192, 768),
    answer_words=(32, 1024),
    vocabulary=8192,
    pack_tokens=(16384, 8192, 6144),
    # An eighth of what a rank of the recipe's 64 GPUs has, so that the optimizer's share is eight times as large.
    step_tokens=2**16,
    warm_up_steps=2,
    timed_steps=4,
    timed_syncs=5,
    cache_bytes=48 * 2**30,
    num_sequences=(64, 256),
    group_size=8,
    response_tokens=384,
)
_MINIATURE = (
    "model.vision.preset=mini",
    "model.language.preset=mini",
    "model.language.vocab_size=2048",
    "model.tile_grids=[[1, 1], [1, 2], [2, 1]]",
    "data.max_sequence_tokens=256",
    "data.num_workers=0",
)
DRY = Sizes(
    platform="cpu",
    start_method="forkserver",
    overrides={
        "r4b/stage3": _MINIATURE,
        "r4b/bpo": (
            *_MINIATURE,
            "train.steps=2",
            "train.global_batch=2",
            "rl.updates=2",
            "rl.stages=[{steps: 2, max_response_tokens: 8, group_size: 2}]",
            "rl.rollout.cache_gib=0.25",
        ),
    },
    has_fp8=False,
    matrix_side=64,
    copy_bytes=2**22,
    num_photos=24,
    photo_sides=(24, 80),
    answer_words=(2, 16),
    vocabulary=2048,
    pack_tokens=(256,),
    step_tokens=1024,
    warm_up_steps=1,
    timed_steps=2,
    timed_syncs=2,
    cache_bytes=2**28,
    num_sequences=(2, 4),
    group_size=2,
    response_tokens=8,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a measurement is given.

    Attributes:
        work: directory of what is made on the way; measurements of one run share the data set in it.
        results: directory of what is kept.
    """

    sizes: Sizes
    work: Path
    results: Path

    @property
    def data(self) -> Path:
        """The prepared data set; see photos.py."""
        return self.work / "data"

    def config(self, recipe: str, name: str, *overrides: str) -> RunConfig:
        """Return a recipe on one rank with random weights.

        Args:
            name: of the run directory.
        """
        run_dir = self.work / name
        run_dir.mkdir(exist_ok=True)
        shared = (
            f"platform={self.sizes.platform}",
            f"run_dir={run_dir}",
            f"data.path={self.data}",
            "init_from=null",
            "parallel.tensor=1",
            "optim.warmup_steps=0",
        )
        return load_config(
            recipe, overrides=[*shared, *_ON_ONE_RANK[recipe], *self.sizes.overrides[recipe], *overrides]
        )
