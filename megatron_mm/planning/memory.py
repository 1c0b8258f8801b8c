"""Memory of a rank of each pipeline stage, by part."""

from dataclasses import dataclass, fields

from megatron_mm.config.layout import pipeline_split, tile_multiple
from megatron_mm.config.loss_blocks import vocab_block
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.activations import (
    FLOAT_BYTES,
    Backend,
    LanguageTokens,
    Numbers,
    language_layer,
    language_layer_forward,
    language_layer_working,
    vision_layer,
    vision_layer_forward,
    vision_layer_working,
    weight_bytes,
)
from megatron_mm.planning.load import Load
from megatron_mm.planning.parameters import stage_parameters

# Two Adam moments in fp32 (Kingma & Ba, arXiv 1412.6980); weights that are not fp32 have an fp32 copy beside them.
MOMENT_BYTES = 2 * FLOAT_BYTES


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at its fullest.

    Attributes:
        weights: of the rank's part of the model.
        gradients: Megatron-Core's fp32 buffer, of what learns.
        optimizer: Adam's moments and fp32 weights.
        language: activations that language layers keep, of all micro-batches under way.
        vision: those of ViT and projector.
        output: final norm, logits and loss of the last stage.
        working: what the passes need at once beside what is kept.
    """

    weights: float
    gradients: float
    optimizer: float
    language: float
    vision: float
    output: float
    working: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def rest(self) -> float:
        """What is held between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def largest_part(self) -> str:
        """Name of the part that takes most."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))


def worst_memory(config: RunConfig, num_ranks: int, load: Load, backend: Backend) -> tuple[int, Memory]:
    """The pipeline stage whose ranks hold most, and what they hold; `layout_faults` has said that the layout can be."""
    memories = [stage_memory(config, num_ranks, load, backend, stage) for stage in range(config.parallel.pipeline)]
    worst = max(range(len(memories)), key=lambda stage: memories[stage].total)
    return worst, memories[worst]


def stage_memory(config: RunConfig, num_ranks: int, load: Load, backend: Backend, stage: int) -> Memory:
    """Of a rank of pipeline stage `stage`; where nothing is trained, of a forward pass that keeps nothing.

    Args:
        load: of one sequence.
        backend: "te" on GPUs, "local" on CPU.
    """
    weights, gradients, optimizer = _fixed(config, num_ranks, stage)
    sizes = _Sizes.of(config, load.times(config.train.micro_batch), backend, stage)
    moments = _moments(config, num_ranks, stage, sizes)
    fullest = max(moments, key=lambda moment: moment.total)
    return Memory(weights, gradients, optimizer, fullest.language, fullest.vision, fullest.output, fullest.working)


def _fixed(config: RunConfig, num_ranks: int, stage: int) -> tuple[float, float, float]:
    """Weights, gradients, optimizer's state."""
    parallel, width = config.parallel, weight_bytes(config)
    held = stage_parameters(config, stage)
    trained = held.trained(config.train.trained)
    a_parameter = MOMENT_BYTES + (FLOAT_BYTES if width != FLOAT_BYTES else 0)
    data_ranks = num_ranks // (parallel.tensor * parallel.pipeline)
    expert_ranks = num_ranks // (parallel.expert * parallel.pipeline)
    shared = config.optim.distributed
    state = a_parameter * (
        sum(trained.dense.values()) / (data_ranks if shared else 1) + trained.experts / (expert_ranks if shared else 1)
    )
    return float(width * held.total), float(FLOAT_BYTES * trained.total), state


@dataclass(frozen=True, slots=True)
class _Moment:
    """What is held of activations at one point of a step."""

    language: float = 0.0
    vision: float = 0.0
    output: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return self.language + self.vision + self.output + self.working


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of one micro-batch on a rank of a stage.

    Attributes:
        chunks: kept by the language layers of each of its chunks.
        language_working: of one layer's backward pass, the gradient of its largest matrix included.
        vision: kept by ViT and projector, where the stage has them.
        vision_forward, vision_working: of one ViT layer.
        output: kept for the loss, where the stage has it.
        output_working: at most beside it.
        table_gradient: of an embedding that learns.
        gathered: buffer that sequence parallelism gathers into, kept for ever.
    """

    chunks: tuple[float, ...]
    language_working: float
    vision: float
    vision_forward: float
    vision_working: float
    output: float
    output_working: float
    table_gradient: float
    gathered: float

    @classmethod
    def of(cls, config: RunConfig, load: Load, backend: Backend, stage: int) -> "_Sizes":
        parallel, model, trained = config.parallel, config.model, config.train.trained
        language = model.language
        numbers, tokens = Numbers.of_run(config, backend), _tokens(config, load, backend)
        first, last = stage == 0, stage == parallel.pipeline - 1
        learns = "language" in trained
        passes_back = learns or _learns_before(config)
        stream = numbers.width_bytes * language.hidden_size * tokens.part
        layer = language_layer(language, tokens, parallel.tensor, numbers, learns=learns) if passes_back else 0.0
        chunks = [layer * count for count in pipeline_split(config)[stage :: parallel.pipeline]]
        # What a stage got is its first norm's input; what it sent is let go on GPUs (deallocate_pipeline_outputs).
        ends = range(len(chunks))
        chunks = [
            kept + stream * (not (last and chunk == len(chunks) - 1) and numbers.local)
            for chunk, kept in zip(ends, chunks, strict=True)
        ]
        working = (
            language_layer_working(language, tokens, parallel.tensor, numbers, learns=learns)
            if passes_back
            else language_layer_forward(language, tokens, parallel.tensor, numbers)
        )
        vision = _vision(config, load, numbers) if first else (0.0, 0.0, 0.0)
        output = _output(config, load, numbers, tokens) if last else (0.0, 0.0)
        table = numbers.width_bytes * language.padded_vocab_size * language.hidden_size / parallel.tensor
        gathered = parallel.sequence * numbers.width_bytes * language.hidden_size * tokens.whole
        return cls(
            tuple(chunks),
            working + learns * numbers.width_bytes * _largest_matrix(config),
            *vision,
            *output,
            table if first and "embeddings" in trained else 0.0,
            gathered,
        )


def _moments(config: RunConfig, num_ranks: int, stage: int, sizes: _Sizes) -> list[_Moment]:
    """Where a step may be at its fullest."""
    micro_batches = config.train.global_batch // (config.train.micro_batch * (num_ranks // config.parallel.model_ranks))
    language, vision = _under_way(config, stage, micro_batches, sizes)
    gathered = sizes.gathered
    # Without this micro-batch, whose language layers are done.
    others_language, others_vision = language - sum(sizes.chunks[:1]), vision - sizes.vision
    return [
        # The loss of the last micro-batch, all layers kept.
        _Moment(language, vision, sizes.output + sizes.output_working, gathered),
        # Backward through the last layer; the loss is done with.
        _Moment(language, vision, 0.0, gathered + sizes.language_working),
        # Forward through a ViT, and backward.
        _Moment(others_language, others_vision, 0.0, gathered + sizes.vision_forward),
        _Moment(others_language, vision, 0.0, gathered + sizes.vision_working),
        _Moment(others_language, vision, 0.0, gathered + sizes.table_gradient),
    ]


def _under_way(config: RunConfig, stage: int, micro_batches: int, sizes: _Sizes) -> tuple[float, float]:
    """Bytes of language and vision kept where most is, as Megatron-Core's schedule has micro-batches under way.

    1F1B (Narayanan et al., arXiv 2104.04473): a stage runs ahead by the number of stages behind it. Interleaved: twice
    as far, and by all micro-batches of a group for each chunk but the last.
    """
    pipeline, num_chunks = config.parallel.pipeline, len(sizes.chunks)
    # A chunk's own; ViT and projector belong to the first.
    if num_chunks == 1:
        number = min(micro_batches, pipeline - stage)
        return sizes.chunks[0] * number, sizes.vision * number
    # Later groups of micro-batches repeat what the first ones do.
    micro_batches = min(micro_batches, 4 * pipeline)
    forward = [
        chunk
        for start in range(0, micro_batches, pipeline)
        for chunk in range(num_chunks)
        for _ in range(min(pipeline, micro_batches - start))
    ]
    ahead = min(len(forward), 2 * (pipeline - stage - 1) + (num_chunks - 1) * pipeline)
    backward = [num_chunks - 1 - chunk for chunk in forward]
    counts, most = [0] * num_chunks, (0.0, 0.0)
    for number, chunk in enumerate(forward):
        counts[chunk] += 1
        if number < ahead and number + 1 < len(forward):
            continue
        held = sum(count * kept for count, kept in zip(counts, sizes.chunks, strict=True)), counts[0] * sizes.vision
        most = max(most, held, key=sum)
        if number >= ahead:
            counts[backward[number - ahead]] -= 1
    return most


def _tokens(config: RunConfig, load: Load, backend: Backend) -> LanguageTokens:
    parallel = config.parallel
    ranks = parallel.context
    whole = load.tokens / ranks
    packed = config.data.packed
    # Of the 2 * ranks pieces of a sample a rank has number r and the r-th from the end (models/packing.py): their
    # queries see r + 1 and 2 * ranks - r pieces.
    pairs = load.squared_tokens * (2 * ranks + 1) / (2 * ranks) ** 2
    return LanguageTokens(
        whole=whole,
        part=whole / (parallel.tensor if parallel.sequence else 1),
        positions=whole if packed else whole / config.train.micro_batch,
        keys=load.tokens if backend == "local" else whole,
        in_pieces=ranks > 1 or (packed and load.num_samples > 1),
        masked=pairs if backend == "local" and ranks > 1 else 0.0,
    )


def _learns_before(config: RunConfig) -> bool:
    """Whether anything before the language layers does."""
    return bool({"vision", "projector", "embeddings"} & set(config.train.trained))


def _vision(config: RunConfig, load: Load, numbers: Numbers) -> tuple[float, float, float]:
    """Kept by ViT and projector; at most beside it in a ViT layer's forward and backward pass."""
    vision, parallel, trained = config.model.vision, config.parallel, config.train.trained
    by_tiles = vision.parallel == "data"
    # Sequences without a picture encode a blank tile.
    multiple = tile_multiple(config)
    all_tiles = max(1.0, load.tiles)
    all_tiles = -(-all_tiles // multiple) * multiple
    tiles, tensor = (all_tiles / parallel.tensor, 1) if by_tiles else (all_tiles, parallel.tensor)
    width, narrow, wide = numbers.width_bytes, vision.hidden_size, config.model.language.hidden_size
    patches = vision.patches_per_tile
    kept = 0.0
    if "vision" in trained:
        kept += vision.used_layers * vision_layer(vision, tiles, tensor, numbers)
        kept += width * 3 * vision.patch_size**2 * patches * tiles
    if {"vision", "projector"} & set(trained):
        norm = 2 * narrow * config.model.projector.pre_norm + narrow * (not config.model.projector.pre_norm)
        kept += width * (norm + 2 * wide / parallel.tensor) * patches * all_tiles
    # fp32 pixels, and the projected features while they are put into their places.
    pixels = FLOAT_BYTES * 3 * vision.image_size**2 * all_tiles
    forward = pixels + vision_layer_forward(vision, tiles, tensor, numbers) * ("vision" not in trained)
    working = vision_layer_working(vision, tiles, tensor, numbers) if "vision" in trained else 0.0
    return kept, forward, working


def _output(config: RunConfig, load: Load, numbers: Numbers, tokens: LanguageTokens) -> tuple[float, float]:
    """Kept for the loss of a micro-batch, and what its passes have at most beside it."""
    parallel, language, width = config.parallel, config.model.language, numbers.width_bytes
    hidden, rows = language.hidden_size, language.padded_vocab_size // parallel.tensor
    # Context parallelism gives a rank the end of a sample, where its response may be alone.
    trained = min(load.trained_tokens, load.tokens / parallel.context)
    kept = width * hidden * tokens.part + width * hidden * trained
    gathered = width * hidden * tokens.whole if parallel.sequence else 0.0
    # The gradient of the output layer's matrix.
    matrix = width * rows * hidden * ("embeddings" in config.train.trained)
    block = vocab_block(trained, rows)
    if block < rows:
        # Maxima, sums and means of the tokens are kept (models/blockwise_loss.py). A block's logits are there in fp32,
        # and before they are cast as the product gives them.
        copies = FLOAT_BYTES + (width if width != FLOAT_BYTES else 0)
        stream = (FLOAT_BYTES + width) * hidden * trained if config.train.trained else 0.0
        return kept + 3 * FLOAT_BYTES * trained, gathered + copies * block * trained + stream + matrix
    softmax = FLOAT_BYTES * rows * trained
    logits = width * rows * trained if width != FLOAT_BYTES else 0.0
    # Where the vocabulary is padded, the gradient of the logits is copied to set that of the padding to zero.
    padding = width * rows * trained if language.padded_vocab_size != language.vocab_size else 0.0
    # Past the cast, the fp32 softmax is let go, and the matrix' own gradient is made.
    return kept + softmax, gathered + max(logits, padding, matrix - (softmax if logits else 0.0))


def _largest_matrix(config: RunConfig) -> float:
    """Values of the largest matrix of a language layer on a rank, whose gradient is made whole before it is added."""
    language, tensor = config.model.language, config.parallel.tensor
    if language.experts is not None:
        return 2 * language.hidden_size * language.experts.ffn_hidden_size
    return 2 * language.hidden_size * language.ffn_hidden_size / tensor
