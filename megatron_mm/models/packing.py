"""Packs, and which tokens of a sequence a context-parallel rank works on; made in host memory, once a micro-batch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mm.parallel.platform import to_device


@dataclass
class Pack(PackedSeqParams):
    """The samples of a pack, which attention keeps apart.

    Its `qkv_format` is "sbhd", so Megatron-Core's layers see a pack as one sequence, [S, 1, heads, dim], and rotate its
    queries and keys by one angle a token (models/rotary.py). With "thd" they would wait for the device once a layer and
    pass, to read `cu_seqlens` and look up the angles sample by sample. Core attention takes it as "thd".

    Attributes:
        starts: where each sample begins, and the end, in host memory.
    """

    starts: tuple[int, ...] = ()


def packed_sequence(starts: Tensor, device: torch.device) -> Pack:
    """Return what attention needs to keep the samples of a pack apart.

    Args:
        starts: int32 [samples + 1], where each sample begins, and the end; in host memory, where its longest sample is
            found without waiting for the device.
        device: where attention wants them.
    """
    longest = int(starts.diff().max())
    cu_seqlens = to_device(starts, device)
    return Pack(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,  # pyright: ignore[reportArgumentType] (Megatron-Core and Transformer Engine want ints)
        max_seqlen_kv=longest,  # pyright: ignore[reportArgumentType]
        starts=tuple(starts.tolist()),
    )


def positions_in_samples(starts: Sequence[int]) -> Tensor:
    """Return the position of each token of a sequence in its own sample: int64 [S].

    Args:
        starts: where each sample begins, and the end.
    """
    return torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(starts)])


def places_of(mask: Tensor) -> Tensor:
    """Return where the tokens of a mask stand in hidden states [S, B, H] whose first two dimensions are flattened.

    An index made in host memory: a device that is given the mask would have to tell the host how many tokens it holds.

    Args:
        mask: bool [B, S].

    Returns:
        int64 [N], the true elements in (batch, sequence) order.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    return columns * len(mask) + rows


def zigzag(starts: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Positions of a sequence that context-parallel rank `rank` of `ranks` works on.

    Each sample is cut into 2 * `ranks` pieces, and a rank takes the piece of its number from the front and from the
    back: under a causal mask early tokens are cheap and late ones dear, and so every rank gets as much of both. This is
    Transformer Engine's order, and the one in which Megatron-Core cuts the rotary embedding.

    Args:
        starts: where each sample begins, and the end; every length a multiple of 2 * `ranks`.

    Returns:
        int64 [S / ranks].
    """
    pieces = []
    for start, end in itertools.pairwise(starts):
        size, rest = divmod(end - start, 2 * ranks)
        assert not rest, f"a sample of {end - start} tokens cannot be cut into {2 * ranks} pieces"
        for piece in (rank, 2 * ranks - 1 - rank):
            pieces.append(torch.arange(start + piece * size, start + (piece + 1) * size))
    return torch.cat(pieces)
