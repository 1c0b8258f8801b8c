"""Packs, and which tokens of a sequence a context-parallel rank works on."""

import itertools
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def packed_sequence(starts: Tensor, device: torch.device) -> PackedSeqParams:
    """What attention and rotary embedding need to keep the samples of a pack apart.

    Args:
        starts: int32 [samples + 1], where each sample begins, and the end; in host memory, where its longest sample is
            found without waiting for the device.
        device: where attention wants them.
    """
    longest = int(starts.diff().max())
    starts = starts.to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,  # pyright: ignore[reportArgumentType] (Megatron-Core and Transformer Engine want ints)
        max_seqlen_kv=longest,  # pyright: ignore[reportArgumentType]
    )


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
