"""NVIDIA's driver and torch's CUDA: which are installed, which GPUs they have, and why they cannot use one."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# NVIDIA's "CUDA Toolkit Release Notes", table of minimum drivers for minor-version compatibility, by CUDA's major
# version.
_OLDEST_DRIVERS = {12: 525, 13: 580}
_SMI_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFiles:
    """Where the driver shows itself.

    Attributes:
        devices: directory of the device files.
        version: file that names the kernel module's version; absent without one.
        smi: NVIDIA's tool that lists GPUs, where the device files are made only when something uses them.
    """

    devices: Path = Path("/dev")
    version: Path = Path("/proc/driver/nvidia/version")
    smi: str = "nvidia-smi"


def driver_version(files: DriverFiles = DriverFiles()) -> str | None:  # noqa: B008
    """Return the version of the kernel module, such as 580.65.06; None if it is not known."""
    if not files.version.is_file():
        return None
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", files.version.read_text(encoding="utf-8", errors="replace"))
    return match and match[0]


def oldest_driver() -> int | None:
    """Return the oldest driver branch that this torch's CUDA runs on; None for a build without CUDA."""
    return _OLDEST_DRIVERS.get(int(torch.version.cuda.split(".")[0])) if torch.version.cuda else None


def unusable_gpu(files: DriverFiles = DriverFiles()) -> str | None:  # noqa: B008
    """Return why torch cannot use a GPU of this machine; None if it can, has none to use, or is not to use any.

    A torch build without CUDA is not asked, nor is one from which CUDA_VISIBLE_DEVICES hides every GPU.
    """
    if not torch.version.cuda or _all_hidden() or torch.cuda.is_available() or not _has_gpu(files):
        return None
    try:
        torch.cuda.init()
        reason = "torch gives no reason"
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
    needed = oldest_driver()
    wants = f", which needs driver {needed} or newer" if needed is not None else ""
    return (
        f"this machine has an NVIDIA GPU, but torch cannot use it: {reason}. The installed driver is "
        f"{driver_version(files) or 'of unknown version'}; torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda}{wants}. Install a newer driver, or run on the CPU with platform=cpu and "
        "CUDA_VISIBLE_DEVICES= in the environment"
    )


def describe_torch() -> str:
    """Return torch's version and what of CUDA it is built for."""
    if not torch.version.cuda:
        return f"{torch.__version__}, without CUDA"
    cudnn = torch.backends.cudnn.version()  # 91900 is 9.19.0
    version = "none" if cudnn is None else f"{cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}"
    return f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {version}"


def describe_gpus() -> list[str]:
    """Return name, compute capability and memory of each GPU that torch sees."""
    found = []
    for device in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(device)
        found.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return found


def _all_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no device; CUDA stops at the first that is neither index nor identifier."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and re.match(r"\s*(\d|GPU-|MIG-)", visible) is None


def _has_gpu(files: DriverFiles) -> bool:
    if any(files.devices.glob("nvidia[0-9]*")):
        return True
    if shutil.which(files.smi) is None:
        return False
    try:
        listed = subprocess.run([files.smi, "--list-gpus"], capture_output=True, text=True, timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")
