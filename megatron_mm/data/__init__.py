"""Prepared data sets: written once, planned as a pure function of (index, blend, seed, step), read ahead by workers.

sources/       readers of what people have: JSON, parquet, tar, folders, documents, texts
prepare.py     sources -> shards + index, in parallel, restartable
progress.py    how far that is
records.py     a sample as it is stored
shards.py      tar shards: writing and reading
index.py       the columnar index
storage.py     a directory, or what fsspec opens
digits.py      the miniature data set, on scikit-learn's handwritten digits

plan.py        which samples make up which global batch, and which rank gets which
packing.py     best-fit decreasing
questions.py   row -> one question with its answer
reader.py      row -> sample ready for training
decode.py      encoded pictures -> pixels
decode_process.py  the same on a rank's GPU, for all its loader processes
loader.py      plan -> micro-batches of one data-parallel rank, by loader processes
handover.py    a batch from a loader process, as one block of memory

summary.py     what a data set holds
inspect.py     samples as the model sees them, in the terminal
page.py        the same as a page
"""
