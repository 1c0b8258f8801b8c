"""Cuda | cpu behind one interface; nothing else in the package asks which of them it is."""

from typing import Protocol

import torch

from megatron_mm.config.errors import InputError
from megatron_mm.parallel.platform.driver import DriverFiles, unusable_gpu


class Platform(Protocol):
    """What differs between a GPU machine and a CPU-only one."""

    name: str
    distributed_backend: str
    layer_backend: str
    """Which layer implementation models/specs.py picks: "te" or "local"."""
    words_at_a_time: int
    """Words of 64 bits that a sum over many is best made of at a time: few stay in a cache, many are few kernels."""
    has_own_memory: bool
    """Whether the device's memory is another one than the host's; an engine in this process can give it back then."""
    overlaps_collectives: bool
    """Whether collectives of gradients overlap with the backward pass if the config does not say."""

    def prepare(self, local_rank: int) -> None:
        """Make Megatron-Core usable in this process. Call once, before any of its objects is made."""
        ...

    def device(self) -> torch.device:
        """The device of this rank."""
        ...

    def transformer_settings(self) -> dict[str, bool]:
        """Fields of Megatron-Core's TransformerConfig that depend on the machine."""
        ...

    def language_settings(self) -> dict[str, bool]:
        """Such fields of the language model alone."""
        ...

    def fp8_fault(self, recipe: str) -> str | None:
        """Why an FP8 recipe other than "none" cannot run here, None if it can."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that this process gave it: before a clock is read."""
        ...

    def peak_memory_bytes(self) -> dict[str, int]:
        """Most memory that this process has held so far, by kind: "allocated" and "reserved", or "resident"."""
        ...

    def memory_bytes(self) -> int:
        """What this rank has of its device's memory, or of the machine's."""
        ...

    def free_bytes(self) -> int:
        """Return the bytes that this rank could still take of its device's memory, or of the machine's."""
        ...

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Return host memory that the device copies to and from without waiting: uint8 [num_bytes], uninitialized."""
        ...

    def peak_tflops(self) -> float | None:
        """Dense bf16 TFLOP/s that the maker states for this rank's device; None where it is not known."""
        ...

    def describe(self) -> str:
        """One line for the log."""
        ...


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor in host memory to `device` without waiting for it; on a CPU the tensor itself is returned.

    Only memory that is page-locked can be copied while the host goes on, so a tensor that is not is copied into such
    memory first. torch keeps that memory until the device has read it.
    """
    if tensor.device.type != device.type:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def get_platform(name: str, files: DriverFiles = DriverFiles()) -> Platform:  # noqa: B008
    """The platform called "cuda", "cpu" or, by what the machine has, "auto".

    Args:
        name: "cuda", "cpu" or "auto".
        files: where the driver of the machine is looked for.

    Raises:
        InputError: cuda is asked for on a machine without one, or cpu on a machine with one: Megatron-Core's CPU
            adaptations cannot be installed beside a live CUDA. Or auto on a machine whose GPU torch cannot use: a
            model for GPUs would train on the CPU without a word.
    """
    has_cuda = torch.cuda.is_available()
    if not has_cuda and name != "cpu" and (reason := unusable_gpu(files)) is not None:
        raise InputError(f"platform={name}: {reason}")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cuda":
        if not has_cuda:
            raise InputError("platform=cuda, but torch sees no CUDA device; use platform=cpu or a CUDA build of torch")
        from megatron_mm.parallel.platform.cuda import CudaPlatform

        return CudaPlatform()
    if has_cuda:
        raise InputError("platform=cpu, but torch sees a CUDA device; hide it with CUDA_VISIBLE_DEVICES= or use cuda")
    from megatron_mm.parallel.platform.cpu import CpuPlatform

    return CpuPlatform()
