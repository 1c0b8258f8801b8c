"""Weight sync of R-4B at full size: seconds without the check, of the check, and of waking the engine's memory."""

import statistics
from collections.abc import Iterator

from benchmarks.figure import Figure
from benchmarks.gpu.ceilings import copy_speed
from benchmarks.gpu.engine import num_parameters, trainer_and_engine
from benchmarks.gpu.photos import prepare_photos
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import seconds
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.exchange import WeightExchange
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table

# Wanted, with the check that every sync has.
MOST_SECONDS = 0.35


def measure(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a weight sync."""
    platform, sizes = get_platform(setting.sizes.platform), setting.sizes
    prepare_photos(setting.data, sizes)
    config = setting.config("r4b/bpo", "sync")
    with trainer_and_engine(config, setting, platform) as (chunks, engine):
        yield copy_speed(platform, sizes.copy_bytes)
        yield Figure("parameters", num_parameters(chunks) / 1e9, "billion")
        table = model_table(config.model)
        exchange = WeightExchange(chunks, table, engine, platform)
        parts = engine.parts(hf_shapes(table))
        # The first one wakes the engine's memory, and compares every element with what was sent.
        first = seconds(platform, lambda: exchange(compare_all=True))
        whole, loaded, waking = [], [], []
        for _ in range(sizes.timed_syncs):
            whole.append(seconds(platform, exchange))
            loaded.append(seconds(platform, lambda: engine.load(to_hf(chunks, table, own=exchange.own), parts)))
            engine.rest(keeps_weights=False)
            waking.append(seconds(platform, exchange))
        total, load = statistics.median(whole), statistics.median(loaded)
        yield Figure("weight sync", total, "s", MOST_SECONDS)
        yield Figure("weight sync without its check", load, "s")
        yield Figure("check of a weight sync", total - load, "s")
        yield Figure("weight sync into an engine that sleeps", statistics.median(waking), "s")
        yield Figure("first weight sync, with every element compared", first, "s")
        num_bytes = exchange().num_bytes
        yield Figure("weight sync without its check, speed", 2e-9 * num_bytes / load, "GB/s")
