"""A GPU that torch cannot use: found, explained, and never passed over in silence."""

import stat
from pathlib import Path

import pytest
import torch

from megatron_mm.config.errors import InputError
from megatron_mm.parallel.platform import get_platform
from megatron_mm.parallel.platform.driver import DriverFiles, driver_version, unusable_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines whose GPU cannot be used")
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
KERNEL_MODULE = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
)
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DriverFiles:
    """A machine with a GPU and an old driver, and torch built for CUDA 13."""
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidia3").touch()  # as a container sees it that was given the fourth one
    (tmp_path / "version").write_text(KERNEL_MODULE, encoding="utf-8")

    def refuse() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return DriverFiles(devices=devices, version=tmp_path / "version", smi=str(tmp_path / "nvidia-smi"))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_unusable_gpu_is_refused_with_torchs_reason_and_the_fix(files: DriverFiles, name: str) -> None:
    with pytest.raises(InputError) as caught:
        get_platform(name, files)
    message = str(caught.value)
    assert message.startswith(f"platform={name}: this machine has an NVIDIA GPU, but torch cannot use it: The NVIDIA ")
    assert "driver on your system is too old (found version 12040)" in message
    assert "The installed driver is 550.54.15; torch" in message
    assert "CUDA 13.0, which needs driver 580 or newer" in message
    assert message.endswith("platform=cpu and CUDA_VISIBLE_DEVICES= in the environment")


def test_the_cpu_is_taken_where_it_is_asked_for(files: DriverFiles) -> None:
    assert get_platform("cpu", files).name == "cpu"


@pytest.mark.parametrize(("visible", "hides"), [("", True), ("-1", True), ("NoDevFiles", True), ("0", False)])
def test_a_gpu_that_is_hidden_is_none(
    files: DriverFiles, monkeypatch: pytest.MonkeyPatch, visible: str, hides: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (unusable_gpu(files) is None) == hides
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert unusable_gpu(files) is not None


def test_a_build_of_torch_without_cuda_is_not_asked(files: DriverFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert get_platform("auto", files).name == "cpu"


def test_without_device_files_the_drivers_own_tool_is_asked(files: DriverFiles) -> None:
    (files.devices / "nvidia3").unlink()
    assert get_platform("auto", files).name == "cpu"
    smi = Path(files.smi)
    for answer, has_gpu in (("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True), ("echo failed; exit 9", False)):
        smi.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
        smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
        assert (unusable_gpu(files) is not None) == has_gpu


def test_the_drivers_version(files: DriverFiles) -> None:
    assert driver_version(files) == "550.54.15"
    files.version.write_text(OPEN_MODULE, encoding="utf-8")
    assert driver_version(files) == "580.65.06"
    files.version.unlink()
    assert driver_version(files) is None
    message = unusable_gpu(files)
    assert message is not None
    assert "The installed driver is of unknown version" in message
