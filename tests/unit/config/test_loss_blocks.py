"""Blocks of the output layer's rows hold to their memory, are aligned, and are no more than needed."""

import pytest

from megatron_mm.config.loss_blocks import LOGITS_BYTES, vocab_block


def test_all_rows_at_once_where_their_logits_are_small() -> None:
    most = LOGITS_BYTES // (4 * 4096)
    assert vocab_block(4096, most) == most
    assert vocab_block(4096, most + 1) < most
    assert vocab_block(0, 151_936) == 151_936


@pytest.mark.parametrize("num_tokens", [1000, 4096, 16_384, 100_000])
@pytest.mark.parametrize("num_rows", [151_936, 75_968])
def test_blocks_are_as_few_as_their_memory_allows(num_tokens: int, num_rows: int) -> None:
    rows = vocab_block(num_tokens, num_rows)
    assert rows % 128 == 0
    assert 4 * num_tokens * rows <= LOGITS_BYTES
    # Blocks are whole multiples of 128 rows: one block less, of all the rows that the memory allows, is too few.
    most = LOGITS_BYTES // (4 * num_tokens) // 128 * 128
    assert -(-num_rows // rows) == -(-num_rows // most)


def test_a_block_is_never_empty() -> None:
    assert vocab_block(LOGITS_BYTES, 151_936) == 128
