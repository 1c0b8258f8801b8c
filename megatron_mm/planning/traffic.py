"""Bytes that a rank sends in a step, by kind of parallelism and link."""

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.layout import pipeline_split
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.activations import FLOAT_BYTES, weight_bytes
from megatron_mm.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_mm.planning.load import Load
from megatron_mm.planning.parameters import Held, stage_parameters

# What NCCL's large collectives reach of a link's stated bandwidth; our assumption, to be replaced by what nccl-tests
# measure on a cluster.
LINK_EFFICIENCY = 0.8

Kind = Literal["tensor", "context", "pipeline", "expert", "data"]
Link = Literal["nvlink", "network"]


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of traffic.

    Attributes:
        step_bytes: that the busiest rank sends in a step.
        gradient_bytes: those of them that are sent while the backward pass goes on (optim.overlap).
    """

    kind: Kind
    link: Link
    step_bytes: float
    gradient_bytes: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        """How long a step's take, if nothing else goes on meanwhile."""
        return self.step_bytes / self._speed(gpu)

    def gradient_seconds(self, gpu: Gpu) -> float:
        """Return how long the gradients take."""
        return self.gradient_bytes / self._speed(gpu)

    def _speed(self, gpu: Gpu) -> float:
        """Bytes a second."""
        gbytes = gpu.nvlink_gbytes if self.link == "nvlink" else gpu.network_gbytes
        return gbytes * 1e9 * LINK_EFFICIENCY


def traffic(config: RunConfig, num_ranks: int, load: Load) -> list[Flow]:
    """All kinds that a layout has; `layout_faults` has said that it can be.

    Where nothing is trained, that is of forward passes.

    Collectives go round rings: of n bytes, a gather or a scattered sum over r ranks sends n (r - 1) / r a rank, a whole
    sum twice that. Ranks are numbered as Megatron-Core does: tensor, context, data, pipeline from the inside out.

    Args:
        load: of one sequence.
    """
    parallel = config.parallel
    micro_batches = num_micro_batches(config, num_ranks)
    stages = [stage_parameters(config, stage).trained(config.train.trained) for stage in range(parallel.pipeline)]
    batch = load.times(config.train.micro_batch)
    model_block = parallel.tensor * parallel.context
    flows = [
        Flow(
            "tensor",
            "nvlink",
            max(_tensor(config, batch, stage) for stage in range(parallel.pipeline)) * micro_batches
            + _vision_average(config, stages[0]),
        ),
        Flow("context", _link(model_block), _context(config, batch) * micro_batches),
        Flow("pipeline", _link(num_ranks), _pipeline(config, batch) * micro_batches + _tied(config)),
        Flow("expert", _link(parallel.expert), _expert(config, batch) * micro_batches),
        max((_data(config, num_ranks, held) for held in stages), key=lambda flow: flow.step_bytes),
    ]
    return [flow for flow in flows if flow.step_bytes]


def num_micro_batches(config: RunConfig, num_ranks: int) -> int:
    """Forward passes of a data-parallel rank in a step."""
    return config.train.global_batch // (config.train.micro_batch * (num_ranks // config.parallel.model_ranks))


def _link(ranks: int) -> Link:
    """What joins so many ranks that follow each other, or that lie among so many."""
    return "nvlink" if ranks <= GPUS_PER_NODE else "network"


def _tensor(config: RunConfig, batch: Load, stage: int) -> float:
    """Of a micro-batch. Shares of an activation's bytes that a ring's single round sends."""
    parallel, model, trained = config.parallel, config.model, config.train.trained
    ranks = parallel.tensor
    if ranks == 1:
        return 0.0
    width, hidden, full = weight_bytes(config), model.language.hidden_size, config.train.recompute == "full"
    stream = width * hidden * batch.tokens / parallel.context
    # Two sums forward and two backward, each two rounds; as gathers and scattered sums the same, and two gathers more
    # for the gradients of the matrices that take gathered inputs.
    rounds = 8 + 2 * (parallel.sequence and "language" in trained) + 4 * full if trained else 4
    layers = sum(pipeline_split(config)[stage :: parallel.pipeline])
    total = layers * rounds * stream
    if stage == 0:
        vision, patches = model.vision, model.vision.patches_per_tile * max(1.0, batch.tiles)
        features = width * vision.hidden_size * patches
        learns = "vision" in trained
        if vision.parallel == "tensor":
            total += vision.used_layers * features * (4 + learns * (4 + 4 * full))
        else:
            total += features * (1 + learns)
        total += 2 * width * hidden * patches + 2 * learns * features
        total += 2 * width * hidden * batch.tokens
    if stage == parallel.pipeline - 1:
        total += parallel.sequence * stream
        total += bool(trained) * 2 * width * hidden * batch.trained_tokens / parallel.context
    return total * (ranks - 1) / ranks


def _vision_average(config: RunConfig, held: Held) -> float:
    """Whole ViTs that see different tiles average their gradients over the tensor-parallel ranks, once a step."""
    ranks = config.parallel.tensor
    if config.model.vision.parallel == "tensor" or ranks == 1:
        return 0.0
    return 2 * FLOAT_BYTES * held.dense.get("vision", 0) * (ranks - 1) / ranks


def _context(config: RunConfig, batch: Load) -> float:
    """Keys and values once round the ring forward; backward again, and their gradients."""
    parallel, language = config.parallel, config.model.language
    own = 2 * language.num_kv_heads * language.head_dim / parallel.tensor * batch.tokens / parallel.context
    rounds = 3 + (config.train.recompute != "none") if config.train.trained else 1
    layers = max(sum(pipeline_split(config)[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))
    return layers * rounds * (parallel.context - 1) * own * weight_bytes(config)


def _pipeline(config: RunConfig, batch: Load) -> float:
    """Hidden states forward and their gradients backward, of each chunk."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    cut = parallel.context * (parallel.tensor if parallel.sequence else 1)
    stream = weight_bytes(config) * config.model.language.hidden_size * batch.tokens / cut
    if not config.train.trained:
        return stream * parallel.virtual_pipeline
    # The first stage sends nothing back, the last nothing on.
    return stream * (2 * parallel.virtual_pipeline - (parallel.pipeline == 2))


def _tied(config: RunConfig) -> float:
    """The first and the last stage sum the gradients of the table that both hold."""
    language, parallel = config.model.language, config.parallel
    if parallel.pipeline == 1 or not language.tied_embeddings or "embeddings" not in config.train.trained:
        return 0.0
    return FLOAT_BYTES * language.padded_vocab_size * language.hidden_size / parallel.tensor


def _expert(config: RunConfig, batch: Load) -> float:
    """Tokens to their experts and back, forward and backward."""
    parallel, experts = config.parallel, config.model.language.experts
    if experts is None or parallel.expert == 1:
        return 0.0
    tokens = batch.tokens / parallel.context / (parallel.tensor if parallel.sequence else 1)
    sent = weight_bytes(config) * config.model.language.hidden_size * experts.experts_per_token * tokens
    rounds = 2 * (2 + (config.train.recompute == "full") if config.train.trained else 1)
    layers = max(sum(pipeline_split(config)[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))
    return layers * rounds * sent * (parallel.expert - 1) / parallel.expert


def _data(config: RunConfig, num_ranks: int, trained: Held) -> Flow:
    """fp32 gradients scattered, and weights gathered; without a distributed optimizer the gradients' sum alone."""
    parallel, optim = config.parallel, config.optim
    dense_ranks = num_ranks // (parallel.tensor * parallel.pipeline)
    expert_ranks = num_ranks // (parallel.expert * parallel.pipeline)
    dense, experts = sum(trained.dense.values()), trained.experts
    # Parameters as a ring's rounds send them.
    sent = dense * (dense_ranks - 1) / dense_ranks + experts * (expert_ranks - 1) / expert_ranks
    gradients = FLOAT_BYTES * sent * (1 if optim.distributed else 2)
    weights = weight_bytes(config) * sent * optim.distributed
    overlap = optim.overlap is not False
    return Flow("data", _link(num_ranks // parallel.pipeline), gradients + weights, gradients * overlap)
