"""Which modules learn. Called before Megatron-Core's DDP makes its gradient buffers."""

from collections.abc import Iterable

from megatron_mm.config.schema import MODULES
from megatron_mm.models.vlm import VisionLanguageModel

# Parts of the composition under each name of the config. The newline vector is learned with the projector: both stand
# between the ViT and the language model.
_PARTS = {"vision": ("vision",), "projector": ("projector", "fusion"), "language": ("language",)}


def freeze_all_but(model: VisionLanguageModel, trained: Iterable[str]) -> dict[str, int]:
    """Let only the modules `trained` learn.

    Returns:
        Trained parameters of each module on this rank.
    """
    trained = set(trained)
    counts: dict[str, int] = dict.fromkeys(MODULES, 0)
    for module in MODULES:
        for part in _PARTS[module]:
            child = getattr(model, part)
            if child is None:
                continue
            for parameter in child.parameters():
                parameter.requires_grad_(module in trained)
                counts[module] += parameter.numel() if module in trained else 0
    return counts
