"""Energon's layout: a directory of WebDataset shards with `.nv-meta`, as `energon prepare` makes it.

    .nv-meta/dataset.yaml   sample_type: {__class__: CaptioningSample}, field_map: {image: jpg, caption: txt}
    .nv-meta/split.yaml     split_parts: {train: ["shard_{000..005}.tar"], val: [...], test: [...]}, exclude: [...]
    .nv-meta/.info.json     shard_counts: {shard_000.tar: 1000, ...}; or .info.yaml

Older ones name a class such as CaptioningWebdataset in the place of the sample's type. Code that such a directory may
hold (`sample_loader`) is never run.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig

META = ".nv-meta"
CAPTIONING, VQA = "Captioning", "VQA"
# The fields that each kind of sample is read from.
_FIELDS = {CAPTIONING: ("image", "caption"), VQA: ("image", "context", "answers")}
_PARTS = {"train": ("train",), "heldout": ("val", "test")}
_PATH = re.compile(r"(?P<member>[^\[\]]+)(?P<keys>(\[[^\[\]]+\])*)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class FieldPath:
    """Where a field is: a member, and keys of the JSON in it, such as json[0][value]."""

    member: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FieldMap:
    """How members become a sample.

    Attributes:
        kind: `CAPTIONING` or `VQA`.
        paths: of each field, the first that is there counts.
        written: as the file has them, for messages.
    """

    kind: str
    paths: dict[str, tuple[FieldPath, ...]]
    written: dict[str, str]


@dataclass(frozen=True, slots=True)
class EnergonLayout:
    """What is read of an energon directory.

    Attributes:
        shards: of the split.
        excluded: keys of samples that the split leaves out, by shard.
        fields: how members become a sample.
    """

    shards: tuple[Path, ...]
    excluded: dict[Path, frozenset[str]]
    fields: FieldMap


def read_layout(source: SourceConfig) -> EnergonLayout:
    """Layout of a source whose directory has `.nv-meta`.

    Split "train" is energon's part train; "heldout" is val, or test where val is empty.

    Raises:
        InputError: a file is missing or says something that is not supported, or a shard is not there.
    """
    directory = source.path
    meta = directory / META
    split_file, split = _first_of(meta, "split.yaml", "split.json")
    info_file, info = _first_of(meta, ".info.json", ".info.yaml")
    listed, parts, exclude = info.get("shard_counts"), split.get("split_parts"), split.get("exclude") or []
    if not isinstance(listed, dict):
        raise InputError(f"{info_file} has no shard_counts; run `energon prepare` again")
    if not isinstance(parts, dict) or not all(_is_texts(names or []) for names in parts.values()):
        raise InputError(f"{split_file} has no split_parts with lists of shards; run `energon prepare` again")
    if not _is_texts(exclude):
        raise InputError(f"{split_file} has an exclude that is no list of names: {exclude!r}; correct it")
    left_out = {name for pattern in exclude for name in expand_braces(pattern)}
    wanted = _PARTS[source.split]
    names: list[str] = []
    for part in wanted:
        names = names or [name for pattern in parts.get(part) or [] for name in expand_braces(pattern)]
    names = [name for name in names if name not in left_out]
    if not names:
        raise InputError(
            f"{split_file} lists no shards for {' or '.join(wanted)}, which split={source.split} of source "
            f"{source.name} reads; it lists {', '.join(parts)}"
        )
    for name in names:
        if name not in listed:
            raise InputError(f"{split_file} lists {name}, {info_file.name} does not; run `energon prepare` again")
        if not (directory / name).is_file():
            raise InputError(f"shard {directory / name}, listed in {split_file}, does not exist; copy it as well")
    # A sample is left out as SHARD/KEY.
    excluded = {
        directory / name: frozenset(item.removeprefix(f"{name}/") for item in left_out if item.startswith(f"{name}/"))
        for name in names
    }
    return EnergonLayout(tuple(directory / name for name in names), excluded, _fields(meta / "dataset.yaml"))


def expand_braces(pattern: str) -> Iterator[str]:
    """Names that a pattern such as `shard_{000..005}.tar` or `{a,b}.tar` stands for, in order."""
    for found in _BRACES.finditer(pattern):
        inside = found.group(1)
        choices = inside.split(",")
        if bounds := _RANGE.fullmatch(inside):
            first, last = bounds.groups()
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            step = 1 if int(first) <= int(last) else -1
            choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
        if len(choices) > 1 or bounds:
            for choice in choices:
                yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])
            return
    yield pattern


def _fields(file: Path) -> FieldMap:
    tree = _load(file)
    sample_type = tree.get("sample_type")
    name = str(sample_type.get("__class__") if isinstance(sample_type, dict) else tree.get("__class__"))
    kind = name.removesuffix("Webdataset").removesuffix("Sample")
    if kind not in _FIELDS:
        raise InputError(
            f"{file} is of class {name}; supported are {', '.join(f'{known}Webdataset' for known in _FIELDS)} and "
            f"{', '.join(f'{known}Sample' for known in _FIELDS)}"
        )
    written = tree.get("field_map")
    if not isinstance(written, dict):
        raise InputError(f"{file} has no field_map; a sample_loader is code, which is not run: describe it by fields")
    paths = {}
    for field in _FIELDS[kind]:
        value = written.get(field)
        if not isinstance(value, str):
            raise InputError(f"field_map of {file} has {value!r} for {field}; give a member such as jpg or json[text]")
        paths[field] = tuple(_path(option.strip(), file) for option in re.split(r"[,;]", value))
    return FieldMap(kind, paths, {field: written[field] for field in paths})


def _path(written: str, file: Path) -> FieldPath:
    found = _PATH.fullmatch(written)
    if not found:
        raise InputError(f"field_map of {file} has {written!r}; give a member such as jpg or json[0][value]")
    return FieldPath(found["member"].lower(), tuple(re.findall(r"\[([^\[\]]+)\]", found["keys"])))


def _first_of(directory: Path, *names: str) -> tuple[Path, dict[str, Any]]:
    for name in names:
        if (directory / name).is_file():
            return directory / name, _load(directory / name)
    raise InputError(f"{directory} has no {' or '.join(names)}; run `energon prepare`, or remove {directory}")


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; run `energon prepare`, or remove {file.parent}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {error}; correct it") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file} holds {type(tree).__name__}, not names with values; run `energon prepare` again")
    return tree


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
