"""Operations and seconds of a step."""

from dataclasses import dataclass, replace

from megatron_mm.config.flops import Flops, recomputed_flops, training_flops
from megatron_mm.config.layout import pipeline_split
from megatron_mm.config.loss_blocks import vocab_block
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.gpus import Gpu
from megatron_mm.planning.load import Load
from megatron_mm.planning.traffic import Flow, num_micro_batches, traffic


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step.

    Attributes:
        model_flops: forward and backward of the global batch, nothing twice.
        recomputed_flops: done again for `train.recompute`, for logits that were made in blocks, and by context-parallel
            ranks, which all encode all tiles.
        compute_seconds: of the busiest pipeline stage.
        bubble_seconds: in which it waits for the pipeline to fill and to drain.
        flows: what its ranks send.
        traffic_seconds: of all of them, one after the other.
        hidden_seconds: of these, in which gradients are sent while the last micro-batch's backward pass computes.
        slowest_stage: that all wait for.
        balance: mean of the stages' operations over the slowest one's.
    """

    model_flops: float
    recomputed_flops: float
    compute_seconds: float
    bubble_seconds: float
    flows: tuple[Flow, ...]
    traffic_seconds: float
    hidden_seconds: float
    slowest_stage: int
    balance: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute_seconds + self.bubble_seconds + self.traffic_seconds - self.hidden_seconds

    @property
    def bubble_share(self) -> float:
        """Share of the pipeline's time in which a stage has nothing to do."""
        return self.bubble_seconds / (self.compute_seconds + self.bubble_seconds)


def step_time(config: RunConfig, num_ranks: int, gpu: Gpu, load: Load, utilisation: float) -> StepTime:
    """Of a layout that `layout_faults` has said can be.

    Args:
        load: of one sequence.
        utilisation: share of the peak that a GPU reaches while it computes.
    """
    parallel, train = config.parallel, config.train
    micro_batches = num_micro_batches(config, num_ranks)
    batch = load.times(train.micro_batch)
    once = training_flops(config.model, train.trained)
    again = flops_done_again(config, batch)
    stages = _stages(config, batch, (once, again))
    slowest = max(range(len(stages)), key=lambda stage: stages[stage])
    speed = gpu.peak_tflops * 1e12 * utilisation
    a_micro_batch = stages[slowest] / speed
    forward = _stages(config, batch, (training_flops(config.model, ()),))[slowest] / speed
    bubble = a_micro_batch * (parallel.pipeline - 1) / parallel.virtual_pipeline
    flows = tuple(traffic(config, num_ranks, load))
    model_flops = train.global_batch * once.of(load.tokens, load.squared_tokens, load.tiles, load.trained_tokens)
    done = sum(stages) * parallel.tensor * parallel.context * micro_batches * (num_ranks // parallel.model_ranks)
    return StepTime(
        model_flops=model_flops,
        recomputed_flops=done - model_flops,
        compute_seconds=a_micro_batch * micro_batches,
        bubble_seconds=bubble,
        flows=flows,
        traffic_seconds=sum(flow.seconds(gpu) for flow in flows),
        hidden_seconds=min(a_micro_batch - forward, sum(flow.gradient_seconds(gpu) for flow in flows)),
        slowest_stage=slowest,
        balance=sum(stages) / len(stages) / stages[slowest],
    )


def flops_done_again(config: RunConfig, batch: Load) -> Flops:
    """Return what the backward pass of a micro-batch does a second time: train.recompute's layers, blocks of logits."""
    parallel, language, train = config.parallel, config.model.language, config.train
    again = recomputed_flops(config.model, train.trained, train.recompute)
    rows = language.padded_vocab_size // parallel.tensor
    if not train.trained or vocab_block(batch.trained_tokens / parallel.context, rows) == rows:
        return again
    return replace(again, trained_token=again.trained_token + 2.0 * language.hidden_size * language.vocab_size)


def _stages(config: RunConfig, batch: Load, parts: tuple[Flops, ...]) -> list[float]:
    """Operations of a rank of each stage for a micro-batch."""
    parallel = config.parallel
    split, num_layers = pipeline_split(config), config.model.language.num_layers
    language = sum(flops.of(batch.tokens, batch.squared_tokens, 0, 0) for flops in parts)
    # A sequence without a picture encodes a blank tile.
    tiles = sum(flops.of(0, 0, max(1.0, batch.tiles), 0) for flops in parts)
    output = sum(flops.of(0, 0, 0, batch.trained_tokens) for flops in parts)
    ranks = parallel.tensor * parallel.context
    stages = [
        language * sum(split[stage :: parallel.pipeline]) / num_layers / ranks for stage in range(parallel.pipeline)
    ]
    # Every context-parallel rank encodes all tiles.
    stages[0] += tiles / parallel.tensor
    stages[-1] += output / ranks
    return stages
