"""The loss on held-out samples, while a run goes on."""

import fnmatch

import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Feed, MicroBatches
from megatron_mm.data.shards import PreparedData
from megatron_mm.parallel import state
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import CrossEntropy, forward_backward

SPLIT = "heldout"


class Validation:
    """The first `train.validate_batches` global batches of the held-out split, the same ones each time.

    They are mixed as training's are, of those parts of the blend that have held-out samples.

    Args:
        gpu: see `MicroBatches`.

    Raises:
        InputError: none of them has.
    """

    def __init__(self, config: RunConfig, data: PreparedData, tokenizer: ChatTokenizer, gpu: int | None = None):
        held_out = [part.part for part in data.index.ranges(SPLIT)]
        blend = {pattern: weight for pattern, weight in config.data.blend.items() if fnmatch.filter(held_out, pattern)}
        if config.data.blend and not blend:
            raise InputError(
                f"train.validate_every: {data.path} holds out no sample of data.blend's parts, only {held_out}; "
                "prepare held-out samples, or leave it out"
            )
        update = {"blend": blend, "max_left_out": 1.0}
        self._config = config.model_copy(update={"data": config.data.model_copy(update=update)})
        self._batches = MicroBatches(self._config, tokenizer, state.data_rank(), state.data_ranks(), SPLIT, gpu)

    def run(self, trainee: Trainee, device: torch.device) -> dict[str, float]:
        """The loss, and that of each part of the data: metrics, the same on every rank; all ranks call it together."""
        for chunk in trainee.ddp:
            chunk.eval()
        parts = self._batches.parts
        totals = torch.zeros(1 + len(parts), 2, dtype=torch.float64, device=device)
        for batches in Feed(self._batches, 0, self._config, self._config.train.validate_batches):
            totals += forward_backward(trainee, batches, device, CrossEntropy(len(parts)), learns=False)
        for chunk in trainee.ddp:
            chunk.train()
        names = ["validation/loss", *(f"validation/loss/{part}" for part in parts)]
        return {
            name: loss_sum / num_tokens
            for name, (loss_sum, num_tokens) in zip(names, totals.tolist(), strict=True)
            if num_tokens
        }
