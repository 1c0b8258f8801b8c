"""Names of settings: all that there are, what kind each one is, and the nearest to a name that is none."""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# Ratio of difflib below which two names are not alike: "stpes" and "steps" have 0.8, "foo" and "platform" 0.36.
LIKENESS = 0.7
MOST_SUGGESTIONS = 3
# What other trainers call our settings.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "epochs": "train.steps",
    "seq_length": "data.max_sequence_tokens",
    "max_length": "data.max_sequence_tokens",
    "max_grad_norm": "optim.clip_grad",
    "output_dir": "run_dir",
    "dataset": "data.path",
    "bf16": "precision",
    "tensor_parallel": "parallel.tensor",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
}


def nearest_settings(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the settings that are most like one that does not exist, with their sections, at most three.

    A name of another section counts as well, and one that other trainers use. There may be none.

    Args:
        section: of the whole config.
        path: of the setting that does not exist.
    """
    numbers = [part for part in path if part.isdigit()]
    path = ["0" if part.isdigit() else part for part in path]
    known = dict.fromkeys(setting_names(section))
    wanted, leaf = ".".join(path), path[-1]
    elsewhere = _ELSEWHERE.get(leaf.lower().replace("-", "_"))
    if elsewhere in known:
        return [elsewhere]
    scores = {name: _score(path, wanted, name) for name in known}
    found = sorted((name for name in known if scores[name] >= LIKENESS), key=lambda name: -scores[name])
    # Names of the same kind in several sections are all told; worse ones than the best are not.
    near = [name for name in found if scores[name] >= scores[found[0]] - 0.05][:MOST_SUGGESTIONS]
    return [_numbered(name, numbers) for name in near]


def _numbered(name: str, numbers: Sequence[str]) -> str:
    """A name with its lists' numbers replaced, as far as there are some."""
    left = iter(numbers)
    return ".".join(next(left, part) if part == "0" else part for part in name.split("."))


def _score(path: Sequence[str], wanted: str, name: str) -> float:
    parent, _, leaf = name.rpartition(".")
    likeness = _ratio(path[-1], leaf)
    if parent == ".".join(path[:-1]):
        return likeness + 0.1 if likeness >= LIKENESS else 0.0
    # In another section the name itself has to be as good as right, or the whole path alike.
    return likeness if likeness >= 0.85 else _ratio(wanted, name) - 0.1 if name.count(".") == len(path) - 1 else 0.0


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower(), autojunk=False).ratio()


def setting_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings and sections below `section`; the first thing of a list has the number 0."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        below, is_list = _section_of(field.annotation)
        if below is not None:
            yield from setting_names(below, f"{prefix}{name}.0." if is_list else f"{prefix}{name}.")


def is_text(section: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the setting at `path` takes a text or a path, so that digits are to be left as they are written."""
    found: Any = section
    for place, part in enumerate(path):
        if part.isdigit():
            continue
        if found is None or part not in found.model_fields:
            return False
        annotation = found.model_fields[part].annotation
        if place == len(path) - 1:
            kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
            return any(kind in (str, Path) for kind in kinds)
        found, _ = _section_of(annotation)
    return False


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, None if it holds none, and whether it holds a list of them."""
    is_list = typing.get_origin(annotation) is tuple
    options = typing.get_args(annotation) if is_list or _is_union(annotation) else (annotation,)
    sections = (option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return next(sections, None), is_list


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
