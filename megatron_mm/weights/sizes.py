"""How large tensors are, and which go together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def numel(shape: Sequence[int]) -> int:
    """Values of a tensor of this shape."""
    return torch.Size(shape).numel()


def groups_up_to(limit: int, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in a row whose sizes are together at most `limit`, or single larger ones."""
    group: list[Item] = []
    total = 0
    for item in items:
        added = size(item)
        if group and total + added > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += added
    if group:
        yield group
