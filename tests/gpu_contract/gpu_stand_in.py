"""A machine without a GPU that passes for one with an H200 while modules and configs are built. Nothing computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from megatron_mm.parallel.platform.cpu import CpuPlatform
from megatron_mm.parallel.platform.cuda import CudaPlatform

CAPABILITY = (9, 0)
MEMORY_BYTES = 143_771 * 2**20
NAME = "NVIDIA H200"


class TransformerEnginePlatform(CpuPlatform):
    """The CPU platform with the layers and settings of the GPU's."""

    layer_backend = "te"

    def transformer_settings(self) -> dict[str, bool]:
        # Where its parameters are made is what differs: there is no GPU to make them on.
        is_meta = torch.empty(0).is_meta
        made = {"use_cpu_initialization": not is_meta, "init_model_with_meta_device": is_meta}
        return {**CudaPlatform().transformer_settings(), **made}

    def language_settings(self) -> dict[str, bool]:
        return CudaPlatform().language_settings()


@contextmanager
def seen_gpu() -> Iterator[None]:
    """Let torch say, within, that there is a GPU. Use it around the building of modules only."""
    properties = SimpleNamespace(
        multi_processor_count=132, total_memory=MEMORY_BYTES, major=CAPABILITY[0], minor=CAPABILITY[1], name=NAME
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_, **__: CAPABILITY,
        "get_device_properties": lambda *_, **__: properties,
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, answer in before.items():
            setattr(torch.cuda, name, answer)
