"""Distributed checkpoints in Megatron-Core's format.

paths.py             where they lie, which is the newest
manifest.py          sizes and checksums of their files
agreement.py         what rank 0 finds, known to all
saver.py             saves of a run, in the background or not; retention.py: which of them stay
snapshot.py          what a rank has to write; background.py: a forked process that writes it
commit.py            what the ranks agree on before and after; the checkpoint takes its name
optimizer_shards.py  the optimizer's state without gathering
verify.py            is one what was written? The newest that is
store.py             what one holds; loading it whole or weights only, on any layout
whole.py             whole parameters in and out of the files, one at a time, without a live model
"""
