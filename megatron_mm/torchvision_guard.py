"""Lets a torchvision that was built for another torch be imported for its Python parts.

On a CPU-only machine pip brings a torchvision linked against CUDA beside a CPU build of torch. Its compiled library
does not load, so the operators that `torchvision._meta_registrations` describes do not exist, its import fails
("operator torchvision::nms does not exist"), and transformers' and vLLM's image processing fail with it. They use the
transforms, which are plain Python. So the missing operators are declared, just before that module is imported; where
the compiled library has loaded, nothing is.

`tools/setup_env.sh` writes a .pth file that installs the hook in every process of the virtual environment, vLLM's
class inspection and `vllm serve` included. The hook costs nothing until torchvision is imported. Imports nothing but
the standard library, so that it can run while the interpreter starts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "torchvision._meta_registrations"


class _DeclareOperators:
    """A finder that finds nothing: it acts when `_MODULE` is asked for, and leaves the import to the others."""

    # torch takes a library's operators back when the object dies.
    library: Any = None

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        del target
        if name == _MODULE and cls.library is None and path:
            cls.library = _declare_missing(Path(path[0]) / "_meta_registrations.py")


def install_hook() -> None:
    """Install the hook in this process; a second call does nothing."""
    if _DeclareOperators not in sys.meta_path:
        sys.meta_path.insert(0, _DeclareOperators)  # pyright: ignore[reportArgumentType]


def _declare_missing(source: Path) -> Any:
    """Declare the operators that `source` describes and torch does not know."""
    import re

    import torch

    pattern = r'register_meta\("(\w+)"|register_fake\("torchvision::(\w+)"'
    matches = re.findall(pattern, source.read_text(encoding="utf-8"))
    names = sorted({meta or fake for meta, fake in matches})
    missing = [name for name in names if not torch._C._dispatch_has_kernel(f"torchvision::{name}")]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        # Never called: torchvision.ops asks for its compiled library first. So the signature does not matter.
        library.define(f"{name}(Tensor a) -> Tensor")
    return library
