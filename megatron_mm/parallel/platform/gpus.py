"""What makers state of their GPUs: dense bf16 TFLOP/s on tensor cores, by the name that torch.cuda gives.

From NVIDIA's datasheets, which state Hopper, Ada and Blackwell with 2:4 sparsity: half of that here. Boards of one name
that differ in power limit have one figure. A part of a GPU (MIG) has a name of its own and is not in the table.
"""

_H100_SXM = 1979 / 2  # H100 Tensor Core GPU datasheet, "H100 SXM", BFLOAT16 Tensor Core
_H100_PCIE = 1513 / 2  # the same in its first edition, "H100 PCIe"
_H100_NVL = 1671 / 2  # the same, "H100 NVL"
_A100 = 312.0  # A100 Tensor Core GPU datasheet, all four boards; the A800 differs in NVLink alone

DENSE_BF16_TFLOPS = {
    "NVIDIA GB200": 5000 / 2,  # GB200 NVL72 datasheet, of one GPU
    "NVIDIA B200": 4500 / 2,  # HGX B200 datasheet, of one GPU
    "NVIDIA H200": _H100_SXM,  # H200 datasheet: as H100 SXM, and H200 NVL as H100 NVL
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA GH200 120GB": _H100_SXM,  # GH200 Grace Hopper Superchip datasheet
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H800": _H100_SXM,  # H800 datasheet: as H100 but for fp64 and NVLink
    "NVIDIA H800 PCIe": _H100_PCIE,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A800-SXM4-80GB": _A100,
    "NVIDIA A800 80GB PCIe": _A100,
    "NVIDIA L40S": 733 / 2,  # L40S datasheet
    "NVIDIA L4": 242 / 2,  # L4 datasheet
    "NVIDIA A40": 149.7,  # A40 datasheet
    "NVIDIA A10": 125.0,  # A10 datasheet
}
