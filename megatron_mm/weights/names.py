"""Names of tensors in the directories that people have, as one set of names: those of the released R-4B.

What a directory holds beside the model (SigLIP's text tower, its pooling head and final norm, buffers of old versions)
is named here too, so that everything else left over is a fault.
"""

import re
from collections.abc import Iterable
from typing import Literal

import torch

from megatron_mm.config.errors import InputError
from megatron_mm.weights.tables import LANGUAGE, NEWLINE, PROJECTOR, VISION

Kind = Literal["whole", "vision", "language"]

# On-disk prefix -> ours, the first that fits. transformers has written all of these spellings of a whole model: with
# `model.` in front (4.52 on, and R-4B), without (5, and before 4.52), with two (5, of weights/modeling_r4b.py), the ViT
# with and without `vision_model.`.
_PREFIXES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "whole": (
        ("model.language_model.model.", LANGUAGE),
        ("model.language_model.", LANGUAGE),
        ("language_model.model.", LANGUAGE),
        ("language_model.lm_head.", "lm_head."),
        ("lm_head.", "lm_head."),
        ("model.vision_tower.vision_model.", VISION),
        ("model.vision_tower.", VISION),
        ("vision_tower.vision_model.", VISION),
        ("vision_tower.", VISION),
        (PROJECTOR, PROJECTOR),
        ("multi_modal_projector.", PROJECTOR),
        (NEWLINE, NEWLINE),
        ("image_newline", NEWLINE),
    ),
    "vision": (
        ("vision_model.", VISION),
        ("embeddings.", f"{VISION}embeddings."),
        ("encoder.", f"{VISION}encoder."),
        ("post_layernorm.", f"{VISION}post_layernorm."),
        ("head.", f"{VISION}head."),
    ),
    "language": (("model.", LANGUAGE), ("lm_head.", "lm_head.")),
}
_VISION = re.escape(VISION)
# What may be there and is no part of the model: (pattern of our name, what it is).
_NOT_OURS = (
    (rf"{_VISION}post_layernorm\..*", "the ViT's final norm, which features are taken before"),
    (rf"{_VISION}head\..*", "the ViT's pooling head"),
    (r"text_model\..*|logit_scale|logit_bias", "SigLIP's text tower and logit scale"),
    (r"(.*\.)?(position_ids|rotary_emb\.inv_freq)", "a buffer that old versions saved"),
)


# No format keeps weights in these, quantised or not; what is of them is a mask or a range of positions.
_OF_BUFFERS = (torch.bool, torch.int64)


def our_names(stored: Iterable[str], kind: Kind, where: str) -> dict[str, str]:
    """Our name of each tensor of a directory -> its name there. Tensors of no known place keep their name.

    Raises:
        InputError: two tensors are the same one under two names.
    """
    found: dict[str, str] = {}
    for name in stored:
        prefix, ours = next((pair for pair in _PREFIXES[kind] if name.startswith(pair[0])), ("", ""))
        our_name = ours + name.removeprefix(prefix)
        if our_name in found:
            raise InputError(f"{where} holds {found[our_name]} and {name}, which are the same tensor; remove one")
        found[our_name] = name
    return found


def not_of_the_model(our_name: str, dtype: torch.dtype, num_vision_layers: int) -> str | None:
    """What a tensor is that a directory may hold beside the model; None for all others.

    Args:
        dtype: of the tensor.
        num_vision_layers: that the model has; the ViT's others were dropped by its config.
    """
    layer = re.match(rf"{_VISION}encoder\.layers\.(\d+)\.", our_name)
    if layer and int(layer[1]) >= num_vision_layers:
        return "a ViT layer that is dropped (model.vision.drop_last_layers)"
    known = next((what for pattern, what in _NOT_OURS if re.fullmatch(pattern, our_name)), None)
    return known or ("a buffer, by its type" if dtype in _OF_BUFFERS else None)
