"""Which parallel layouts a model and a batch admit, and what follows from a layout; asked before any rank starts."""

import math

from megatron_mm.config.errors import InputError
from megatron_mm.config.flops import language_layer_weights, projector_weights, vision_layer_weights
from megatron_mm.config.schema import ModelConfig, ParallelConfig, RunConfig


def layout_faults(config: RunConfig, num_ranks: int) -> list[str]:
    """Every reason why `config` cannot run on `num_ranks` ranks, one sentence each, empty if it can."""
    return [
        *tensor_faults(config.model, config.parallel),
        *_pipeline_faults(config),
        *_expert_faults(config, num_ranks),
        *_fp8_faults(config),
        *_batch_faults(config, num_ranks),
    ]


def check_layout(config: RunConfig, num_ranks: int) -> None:
    """Raise `InputError` naming every reason why `config` cannot run on `num_ranks` ranks."""
    faults = layout_faults(config, num_ranks)
    if faults:
        raise InputError("\n".join([f"recipe {config.recipe} cannot run on {num_ranks} ranks:", *faults]))


def pipeline_split(config: RunConfig) -> tuple[int, ...]:
    """Language layers of each model chunk, in the order they run.

    `parallel.pipeline_layers`, or the split whose largest chunk is smallest, with the ViT counted as
    `vision_as_layers` layers of the first chunk. What cannot be shared out evenly stays away from the last chunk,
    which has the output layer to do.
    """
    parallel, num_layers = config.parallel, config.model.language.num_layers
    if parallel.pipeline_layers is not None:
        return parallel.pipeline_layers
    chunks = parallel.num_chunks
    if chunks == 1:
        return (num_layers,)
    vision = vision_as_layers(config.model) if parallel.vision_as_layers is None else parallel.vision_as_layers
    others = chunks - 1
    candidates = range(num_layers - others + 1)
    first = min(candidates, key=lambda first: (max(first + vision, math.ceil((num_layers - first) / others)), -first))
    each, left = divmod(num_layers - first, others)
    return (first, *(each + (chunk < left) for chunk in range(others)))


def vision_as_layers(model: ModelConfig) -> int:
    """How many language layers hold as many matrix entries as ViT and projector.

    A tile gives the ViT and the language model the same number of tokens to within the row ends, so the matrices'
    sizes compare the work.
    """
    vision = model.vision.used_layers * vision_layer_weights(model.vision) + projector_weights(model)
    return round(vision / language_layer_weights(model.language))


def sample_multiple(config: RunConfig) -> int:
    """What the length of each sample is padded to a multiple of: zigzag order cuts it into two pieces a rank."""
    context = config.parallel.context
    return 2 * context if context > 1 else 1


def sequence_multiple(config: RunConfig) -> int:
    """What the length of a whole sequence is padded to a multiple of, so that every rank gets as many tokens."""
    parallel, fp8 = config.parallel, config.fp8
    cut = parallel.context * (parallel.tensor if parallel.sequence else 1)
    alignment = fp8.alignment if fp8.used_in("language") else 1
    if fp8.used_in("language") and fp8.recipe == "blockwise" and parallel.sequence:
        # The part of a rank is quantised in its blocks before it is gathered.
        alignment = 128
    return math.lcm(cut * alignment, sample_multiple(config))


def tile_multiple(config: RunConfig) -> int:
    """What the number of tiles is padded to a multiple of: ranks that share them out get as many, FP8 its alignment."""
    fp8, vision = config.fp8, config.model.vision
    ranks = config.parallel.tensor if vision.parallel == "data" else 1
    if not (fp8.used_in("vision") or fp8.used_in("projector")):
        return ranks
    return ranks * fp8.alignment // math.gcd(fp8.alignment, vision.patches_per_tile)


def tensor_faults(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Every reason why tensor parallelism cannot cut a model."""
    vision, language = model.vision, model.language
    cut = {
        "model.language.num_heads": language.num_heads,
        "model.language.num_kv_heads": language.num_kv_heads,
        "model.language.hidden_size": language.hidden_size,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
        "model.language.vocab_size, padded": language.padded_vocab_size,
    }
    if vision.parallel == "tensor":
        cut |= {
            "model.vision.num_heads": vision.num_heads,
            "model.vision.ffn_hidden_size": vision.ffn_hidden_size,
        }
    faults = [
        f"parallel.tensor={parallel.tensor} does not divide {field}={size}"
        + ("; model.vision.parallel=data does not cut it" if field.startswith("model.vision") else "")
        for field, size in cut.items()
        if size % parallel.tensor
    ]
    if parallel.sequence and parallel.tensor == 1:
        faults.append("parallel.sequence=true needs parallel.tensor of 2 or more")
    if vision.parallel == "data" and parallel.tensor == 1:
        faults.append(
            "model.vision.parallel=data needs parallel.tensor of 2 or more: it shares tiles out over its ranks"
        )
    return faults


def _expert_faults(config: RunConfig, num_ranks: int) -> list[str]:
    parallel, experts = config.parallel, config.model.language.experts
    if experts is None:
        return [f"parallel.expert={parallel.expert} needs model.language.experts"] if parallel.expert > 1 else []
    faults = []
    if experts.num_experts % parallel.expert:
        faults.append(
            f"parallel.expert={parallel.expert} does not divide model.language.experts.num_experts="
            f"{experts.num_experts}"
        )
    if num_ranks % (parallel.expert * parallel.pipeline):
        faults.append(
            f"{num_ranks} ranks cannot be shared out over parallel.expert={parallel.expert} x parallel.pipeline="
            f"{parallel.pipeline}; start a multiple of {parallel.expert * parallel.pipeline} ranks"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        faults.append("model.language.experts needs parallel.sequence=true where parallel.tensor is 2 or more")
    if config.fp8.used_in("language"):
        faults.append(
            "fp8.modules=language: experts get any number of tokens, which FP8 cannot align; leave language out"
        )
    return faults


def _fp8_faults(config: RunConfig) -> list[str]:
    """Matrices whose sides on a rank are no multiples of what the recipe wants."""
    fp8, vision, language, tensor = config.fp8, config.model.vision, config.model.language, config.parallel.tensor
    vision_ranks = tensor if vision.parallel == "tensor" else 1
    sides = {
        "vision": {
            "model.vision.hidden_size": (vision.hidden_size, 1),
            "model.vision.hidden_size over its ranks": (vision.hidden_size, vision_ranks),
            "model.vision.ffn_hidden_size over its ranks": (vision.ffn_hidden_size, vision_ranks),
        },
        "projector": {
            "model.vision.hidden_size": (vision.hidden_size, 1),
            "model.language.hidden_size over parallel.tensor": (language.hidden_size, tensor),
        },
        "language": {
            "model.language.hidden_size": (language.hidden_size, 1),
            "model.language.num_heads x head_dim over parallel.tensor": (
                language.num_heads * language.head_dim,
                tensor,
            ),
            "model.language.num_kv_heads x head_dim over parallel.tensor": (
                language.num_kv_heads * language.head_dim,
                tensor,
            ),
            "model.language.ffn_hidden_size over parallel.tensor": (language.ffn_hidden_size, tensor),
        },
    }
    return [
        f"fp8.recipe={fp8.recipe} wants multiples of {fp8.alignment}, but {field} is {size / ranks:g}; leave {module} "
        "out of fp8.modules"
        for module in fp8.modules
        if fp8.recipe != "none"
        for field, (size, ranks) in sides[module].items()
        if size % (ranks * fp8.alignment)
    ]


def _pipeline_faults(config: RunConfig) -> list[str]:
    parallel, num_layers = config.parallel, config.model.language.num_layers
    faults = []
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        faults.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of 2 or more")
    if parallel.num_chunks > num_layers:
        faults.append(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline} is more "
            f"chunks than model.language.num_layers={num_layers}"
        )
    layers = parallel.pipeline_layers
    if layers is None:
        return faults
    if len(layers) != parallel.num_chunks:
        faults.append(
            f"parallel.pipeline_layers={list(layers)} names {len(layers)} chunks; parallel.pipeline="
            f"{parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline} makes {parallel.num_chunks}"
        )
    if sum(layers) != num_layers:
        faults.append(
            f"parallel.pipeline_layers={list(layers)} sums to {sum(layers)}, not to model.language.num_layers="
            f"{num_layers}"
        )
    if min(layers, default=0) < 0 or (len(layers) > 1 and min(layers[1:]) < 1):
        faults.append(
            f"parallel.pipeline_layers={list(layers)}: only the first chunk, which holds the ViT, may have no layer"
        )
    return faults


def _batch_faults(config: RunConfig, num_ranks: int) -> list[str]:
    parallel, train = config.parallel, config.train
    if num_ranks % parallel.model_ranks:
        return [
            f"{num_ranks} ranks cannot be shared out over parallel.tensor={parallel.tensor} x parallel.pipeline="
            f"{parallel.pipeline} x parallel.context={parallel.context}; start a multiple of {parallel.model_ranks} "
            "ranks"
        ]
    multiple = sequence_multiple(config)
    if config.data.packed and config.data.max_sequence_tokens % multiple:
        return [
            f"data.max_sequence_tokens={config.data.max_sequence_tokens} is not a multiple of {multiple}, which packs "
            "need in this layout"
        ]
    if config.rl is not None:
        return []  # responses are shared out as they come
    data_ranks = num_ranks // parallel.model_ranks
    num_passes, rest = divmod(train.global_batch, train.micro_batch * data_ranks)
    if rest:
        return [
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch} x "
            f"{data_ranks} data-parallel ranks"
        ]
    if parallel.virtual_pipeline > 1 and num_passes % parallel.pipeline:
        return [
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves micro-batches in groups of "
            f"parallel.pipeline={parallel.pipeline}; train.global_batch={train.global_batch} makes {num_passes} a "
            "rank, which is not a multiple of it"
        ]
    return []
