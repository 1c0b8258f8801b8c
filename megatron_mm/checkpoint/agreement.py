"""What rank 0 finds or does, known to all ranks: another may see a file system a moment behind."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def from_first(make: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """What `make` returns on rank 0, where alone it is called; all ranks of the group (by default all) call it."""
    values = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
