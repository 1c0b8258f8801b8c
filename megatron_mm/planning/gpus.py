"""GPUs that are known: memory, speed, links; each number with its source."""

from dataclasses import dataclass

from megatron_mm.config.errors import InputError

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of a node of eight.

    Attributes:
        memory_gib: what nvidia-smi calls its total memory.
        peak_tflops: of dense bf16 products, as the vendor states it, without sparsity.
        memory_gbytes: GB/s of its own memory.
        nvlink_gbytes: GB/s to the other GPUs of the node, one direction.
        network_gbytes: GB/s to other nodes, one direction.
        host_gbytes: GB/s to the memory of the host, one direction.
        host_memory_gib: memory of a host of eight such GPUs.
        source: where the numbers come from.
    """

    name: str
    memory_gib: float
    peak_tflops: float
    memory_gbytes: float
    nvlink_gbytes: float
    network_gbytes: float
    host_gbytes: float
    host_memory_gib: float
    source: str


# Data sheets state NVLink and PCIe in both directions together, and DGX machines have one network card a GPU and 2 TB
# of memory.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            memory_gib=80.0,
            peak_tflops=312,
            memory_gbytes=2039,
            nvlink_gbytes=300,
            network_gbytes=25,
            host_gbytes=32,
            host_memory_gib=2048,
            source="NVIDIA A100 80GB SXM data sheet (312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s); DGX "
            "A100: 200 Gb/s a GPU, 2 TB a node; nvidia-smi: 81,920 MiB",
        ),
        Gpu(
            name="h100",
            memory_gib=79.6,
            peak_tflops=989,
            memory_gbytes=3350,
            nvlink_gbytes=450,
            network_gbytes=50,
            host_gbytes=64,
            host_memory_gib=2048,
            source="NVIDIA H100 SXM data sheet (1,979 TFLOPS with sparsity, half without; 3.35 TB/s, NVLink 900 GB/s, "
            "PCIe Gen5 128 GB/s); DGX H100: 400 Gb/s a GPU, 2 TB a node; nvidia-smi: 81,559 MiB",
        ),
        Gpu(
            name="h200",
            memory_gib=140.4,
            peak_tflops=989,
            memory_gbytes=4800,
            nvlink_gbytes=450,
            network_gbytes=50,
            host_gbytes=64,
            host_memory_gib=2048,
            source="NVIDIA H200 SXM data sheet (1,979 TFLOPS with sparsity, half without; 4.8 TB/s, NVLink 900 GB/s, "
            "PCIe Gen5 128 GB/s); DGX H200: 400 Gb/s a GPU, 2 TB a node; nvidia-smi: 143,771 MiB",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in capitals or not.

    Raises:
        InputError: it is not known.
    """
    known = GPUS.get(name.lower())
    if known is None:
        raise InputError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return known
