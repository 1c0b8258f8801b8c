"""What ranks settle together about the memory of their engines."""

import torch.distributed as dist

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.planning.cache import engine_weight_bytes, sequence_cache_bytes
from megatron_mm.rl.job import agreed_cache_bytes
from tests.ranks import run_on_ranks

MIB = 2**20
# Free on each rank, the whole of a rank's memory, and overrides.
CASES: list[tuple[list[int], int, list[str]]] = [
    ([200, 140], 4096, []),
    ([4096, 4096], 140, []),
    ([200, 140], 4096, ["rl.rollout.cache_gib=0.25"]),
    ([200, 1], 4096, []),
]


def _agreed() -> list[int | str]:
    """Bytes that this rank's cache gets in each case, or what is said instead. Runs on every rank."""
    platform, found = get_platform("cpu"), list[int | str]()
    with state.process_group(platform):
        for free, total, overrides in CASES:
            platform.free_bytes = lambda free=free: free[dist.get_rank()] * MIB
            platform.memory_bytes = lambda total=total: total * MIB
            try:
                found.append(agreed_cache_bytes(load_config("mini/bpo", overrides=overrides), platform))
            except InputError as error:
                found.append(str(error))
    return found


def test_all_ranks_take_what_the_fullest_can_give() -> None:
    config = load_config("mini/bpo")
    found, others = run_on_ranks(_agreed, 2)
    assert found == others
    least, planned, given, refused = found
    assert least == int((140 * MIB - engine_weight_bytes(config)) / 10)
    # More than the machine can have left once the trainer is whole does not count.
    assert isinstance(planned, int)
    assert sequence_cache_bytes(config) < planned < least
    assert given == 256 * MIB
    assert "rl.rollout.cache_gib=auto, which leaves 0 GiB here and holds no sequence of" in str(refused)
