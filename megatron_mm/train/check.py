"""What can be known to be wrong with a run before a rank is started. Without Megatron-Core."""

from megatron_mm.checkpoint.paths import find
from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import check_layout
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import INDEX
from megatron_mm.parallel.platform import get_platform


def check_inputs(config: RunConfig, num_ranks: int) -> None:
    """Look at layout, data and checkpoint of a run on `num_ranks` ranks.

    Raises:
        InputError: the layout does not fit, the machine lacks what the config asks for, or data or the checkpoint to
            start from are missing.
    """
    check_layout(config, num_ranks)
    platform = get_platform(config.platform)
    fault = None if config.fp8.recipe == "none" else platform.fp8_fault(config.fp8.recipe)
    if fault is not None:
        raise InputError(fault)
    if config.init_from is not None:
        find(config.init_from)
    if config.data.path is None or not config.data.blend:
        raise InputError("training needs data.path, a directory made by `megatron-mm data`, and data.blend")
    if not (config.data.path / INDEX).is_file():
        raise InputError(f"no prepared data in data.path={config.data.path}; make it with `megatron-mm data`")
