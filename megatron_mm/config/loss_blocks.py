"""How many rows of the output layer the loss takes at a time, so that the logits of a whole pack are never held."""

# Bytes of fp32 logits that the loss holds at most: so much is small next to a layer's activations, and a product of
# so many logits still keeps a GPU busy.
LOGITS_BYTES = 2**28
# Rows of a block, so that its products stay aligned.
_MULTIPLE = 128


def vocab_block(num_tokens: float, num_rows: int) -> int:
    """Rows of the output layer whose logits are made at once, all of them where LOGITS_BYTES hold their logits.

    Blocks are as equal as their alignment allows. With very many tokens the smallest block, 128 rows, exceeds
    LOGITS_BYTES.

    Args:
        num_tokens: tokens of a micro-batch on this rank whose loss is made.
        num_rows: rows of the output layer on this rank, the padded vocabulary over the tensor-parallel ranks.
    """
    row_bytes = 4 * num_tokens
    if row_bytes * num_rows <= LOGITS_BYTES:
        return num_rows
    most = max(int(LOGITS_BYTES // row_bytes) // _MULTIPLE, 1) * _MULTIPLE
    num_blocks = -(-num_rows // most)
    return -(-num_rows // (num_blocks * _MULTIPLE)) * _MULTIPLE
