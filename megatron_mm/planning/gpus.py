"""GPUs that are known: memory, speed, links; each number with its source."""

from dataclasses import dataclass

from megatron_mm.config.errors import InputError

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a node of eight.

    Attributes:
        memory_gib: what nvidia-smi calls its total memory.
        peak_tflops: of dense bf16 products, as the vendor states it, without sparsity.
        nvlink_gbytes: GB/s to the other GPUs of the node, one direction.
        network_gbytes: GB/s to other nodes, one direction.
        source: where the numbers come from.
    """

    name: str
    memory_gib: float
    peak_tflops: float
    nvlink_gbytes: float
    network_gbytes: float
    source: str


# Data sheets state NVLink in both directions together, and DGX machines have one network card a GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100",
            80.0,
            312,
            300,
            25,
            "NVIDIA A100 80GB SXM data sheet (312 TFLOPS, NVLink 600 GB/s); DGX A100: 200 Gb/s a GPU; nvidia-smi: "
            "81,920 MiB",
        ),
        Gpu(
            "h100",
            79.6,
            989,
            450,
            50,
            "NVIDIA H100 SXM data sheet (1,979 TFLOPS with sparsity, half without; NVLink 900 GB/s); DGX H100: 400 "
            "Gb/s a GPU; nvidia-smi: 81,559 MiB",
        ),
        Gpu(
            "h200",
            140.4,
            989,
            450,
            50,
            "NVIDIA H200 SXM data sheet (1,979 TFLOPS with sparsity, half without; NVLink 900 GB/s); DGX H200: 400 "
            "Gb/s a GPU; nvidia-smi: 143,771 MiB",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
        InputError: it is not known.
    """
    if name not in GPUS:
        raise InputError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name]
