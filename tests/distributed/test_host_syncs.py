"""A training step does not wait for the device but where it must; each kind of wait is seen where one is planted."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.loader import Batch
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.step import CrossEntropy, train_step
from tests.host_syncs import Found, found_on_ranks, host_syncs
from tests.layouts import NUM_PARTS, layout, micro_batches, samples_of_step, trainees
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

# At the end of a step, when all that was given to the device is to be done anyway: whether any token was trained, the
# gradient norm and the loss, by which train/guard.py decides on the update.
OF_A_STEP = {
    "megatron/core/distributed/finalize_model_grads.py _local_scalar_dense": 1,
    "megatron/core/optimizer/clip_grads.py _local_scalar_dense": 1,
    "megatron_mm/train/step.py tolist": 1,
}
# Log-probabilities of the four scored micro-batches, read after the last of them.
OF_SCORING = {"megatron_mm/rl/update.py cpu": 4}
PLANTED = {
    "_local_scalar_dense": 3,
    "tolist": 1,
    "numpy": 1,
    "cpu": 1,
    "to": 1,
    "index": 1,
    "index_put_": 1,
    "nonzero": 1,
    "masked_select": 1,
    "masked_scatter_backward": 1,
    "equal": 1,
    "_unique2": 1,
    "repeat_interleave": 1,
}


def _by_file(found: Counter[str]) -> dict[str, int]:
    """Counts without numbers of lines."""
    counts: Counter[str] = Counter()
    for place, count in found.items():
        counts[re.sub(r":\d+ ", " ", place)] += count
    return dict(counts)


def test_a_step_waits_at_its_end_only(tokenizer: ChatTokenizer) -> None:
    found = found_on_ranks(["packed", "unpacked", "RL update", "DP 2, overlapped"], tokenizer)
    for name, result in found.items():
        assert _by_file(result.syncs) == OF_A_STEP | (OF_SCORING if name == "RL update" else {}), name
        assert not result.copies, name


@dataclass(frozen=True, slots=True)
class _Waiting(CrossEntropy):
    """Waits for the device in every way, once a micro-batch."""

    def __call__(self, losses: Tensor, batch: Batch, context: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        values, positive = losses.detach().clone(), losses.detach() > 0
        assert values.sum().item() > 0
        assert bool(positive.any())
        assert float(values.max()) > 0
        values.tolist()
        values.numpy()
        # Read from the host's copy nothing waits any more.
        assert (values.cpu() > 0).any()
        assert (values.to("cpu") > 0).any()
        values[positive]
        values[positive] = values.clone()
        positive.nonzero()
        values.masked_select(positive)
        torch.equal(values, values)
        values.unique()
        values.repeat_interleave(positive.long())
        written = torch.zeros_like(losses).masked_scatter(positive, losses)
        # What the host has made is read for nothing.
        assert batch.trained.any()
        assert batch.trained.nonzero().tolist()
        torch.tensor(1.0, device=losses.device)
        batch.labels.to(losses.device)
        batch.ids.to(losses.device, non_blocking=True)  # waits as well: its memory is not page-locked
        loss, num_tokens, sums = CrossEntropy.__call__(self, written, batch, context)
        return loss, num_tokens, sums


def _planted(tensors: dict[str, Tensor], tokenizer_directory: Path) -> tuple[Found, int]:
    """What is found where waits are planted, and the number of micro-batches. Runs on one rank."""
    tokenizer, platform, config = ChatTokenizer(tokenizer_directory), get_platform("cpu"), layout()
    with state.process_group(platform):
        for _, trainee in trainees(platform, [config], tokenizer, tensors):
            batches = micro_batches(config, samples_of_step(config, tokenizer, 0), tokenizer)
            with host_syncs(trainee) as found:
                train_step(trainee, batches, platform.device(), _Waiting(NUM_PARTS))
            return found, len(batches)
    raise AssertionError


def test_each_kind_of_wait_is_seen(digits: Path) -> None:
    config = layout()
    tensors = r4b_tensors(config, *reference_models(config))
    ((found, num_batches),) = run_on_ranks(_planted, 1, tensors, digits / TOKENIZER)
    counts: Counter[str] = Counter()
    for place, count in found.syncs.items():
        counts[place.rsplit(" ", 1)[1]] += count
    for place, count in OF_A_STEP.items():
        counts[place.rsplit(" ", 1)[1]] -= count
    assert +counts == {operation: number * num_batches for operation, number in PLANTED.items()}
    assert sum(found.copies.values()) == 3 * num_batches
