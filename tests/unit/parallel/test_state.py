"""Process groups: what their start leaves out of the output."""

import inspect
import re
import warnings

import torch.distributed as dist

from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform


def test_torchs_advice_to_bind_the_group_to_a_device_is_left_out() -> None:
    (text,) = re.findall(r'"(barrier\(\): .*) "', inspect.getsource(dist.barrier))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with state.process_group(get_platform("cpu")):
            warnings.warn(text, stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]
