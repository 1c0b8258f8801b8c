"""SigLIP ViT -> projector -> Qwen3, all of Megatron-Core blocks, as one pipeline-aware module.

megatron_config.py   our config -> Megatron-Core's TransformerConfig; nobody else builds one
attention.py         norm and core attention of the local (CPU) backend
swiglu.py            its gated activation
te_attention.py      Transformer Engine's core attention, for packs
packing.py           packs, and a context-parallel rank's part of a sequence
rotary.py            rotary angles of each token
specs.py             which layer implementation each backend uses
vision.py            the ViT
projector.py         pre-norm and two linears
language.py          Qwen3 and Qwen3-MoE as Megatron-Core's GPTModel, losses for trained tokens alone
blockwise_loss.py    losses and entropies in blocks of the vocabulary
entropy.py           of distributions over a vocabulary that is cut
fusion.py            features into the places of the image tokens
vlm.py               the composition
freeze.py            which modules learn, and what belongs to them

Shapes: B batch, S sequence, H hidden, V vocabulary, T tiles, P patches of a tile, N placeholders of a batch.
"""
