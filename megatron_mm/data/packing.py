"""Best-fit decreasing, fast enough to count the packs of an epoch of millions of samples.

Compiled by Numba: the loop looks at one sample at a time, which NumPy cannot, and plain Python takes minutes.
"""

import numpy as np
from numba import njit

# Rooms are looked up by groups, so that an empty stretch is passed over quickly.
_GROUP = 64
# Packs of the best fitting rooms whose budget of tiles is tried before a new one is begun.
_TRIES = 64


@njit(cache=True, nogil=True)
def best_fit(lengths: np.ndarray, tiles: np.ndarray, capacity: int, max_tiles: int) -> tuple[np.ndarray, int]:
    """Put each sample into the fullest pack that has room for it, longest samples first.

    Args:
        lengths: int64 [n], 1 to `capacity`.
        tiles: int64 [n], 0 to `max_tiles`.
        capacity: most length of a pack.
        max_tiles: most tiles of a pack.

    Returns:
        int64 [n], pack of each sample; number of packs.
    """
    number = len(lengths)
    packs = np.empty(number, np.int64)
    # Counting sort by length, longest first, stable.
    first = np.zeros(capacity + 2, np.int64)
    for length in lengths:
        first[capacity - length + 1] += 1
    for room in range(capacity + 1):
        first[room + 1] += first[room]
    order = np.empty(number, np.int64)
    for sample in range(number):
        place = capacity - lengths[sample]
        order[first[place]] = sample
        first[place] += 1
    # Packs with the same room left form a chain; the newest is its head.
    head = np.full(capacity + 1, -1, np.int64)
    following = np.empty(number, np.int64)
    used_tiles = np.empty(number, np.int64)
    in_group = np.zeros(capacity // _GROUP + 1, np.int64)
    num_packs = 0
    for sample in order:
        length, cost = lengths[sample], tiles[sample]
        chosen, before, room, tries = -1, -1, length, 0
        while room <= capacity and tries < _TRIES:
            if in_group[room // _GROUP] == 0:
                room = (room // _GROUP + 1) * _GROUP
                continue
            candidate, previous = head[room], -1
            while candidate >= 0 and tries < _TRIES:
                if used_tiles[candidate] + cost <= max_tiles:
                    chosen, before = candidate, previous
                    break
                tries += 1
                candidate, previous = following[candidate], candidate
            if chosen >= 0:
                break
            room += 1
        if chosen < 0:
            chosen, room = num_packs, capacity
            used_tiles[chosen] = 0
            num_packs += 1
        else:
            if before < 0:
                head[room] = following[chosen]
            else:
                following[before] = following[chosen]
            in_group[room // _GROUP] -= 1
        packs[sample] = chosen
        used_tiles[chosen] += cost
        left = room - length
        following[chosen] = head[left]
        head[left] = chosen
        in_group[left // _GROUP] += 1
    return packs, num_packs
