"""SigLIP ViT -> projector -> Qwen3, all of Megatron-Core blocks, as one pipeline-aware module.

megatron_config.py   our config -> Megatron-Core's TransformerConfig; nobody else builds one
attention.py         norm and core attention of the local (CPU) backend
packing.py           packs, and a context-parallel rank's part of a sequence
specs.py             which layer implementation each backend uses
vision.py            the ViT
projector.py         pre-norm and two linears
language.py          Qwen3 and Qwen3-MoE as Megatron-Core's GPTModel, losses for trained tokens alone
entropy.py           of distributions over a vocabulary that is cut
fusion.py            features into the places of the image tokens
vlm.py               the composition
freeze.py            which modules learn, and what belongs to them

Shapes: B batch, S sequence, H hidden, V vocabulary, T tiles, P patches of a tile, N placeholders of a batch.
"""
