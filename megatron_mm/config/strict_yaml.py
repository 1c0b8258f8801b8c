"""YAML, read so that nothing in it is lost or taken for something else.

Plain words are what YAML 1.2's core schema says: `true` and `false` are the only booleans, so that `off`, `no` and `on`
stay words, `1e-3` is a number, and there are no dates. A key that is given twice is refused, and so are aliases from
which a value holds itself or grows beyond `MOST_NODES`.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_mm.config.errors import InputError

# Values in one file, aliases counted wherever they are used. The largest recipe has about 100.
MOST_NODES = 100_000
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value!r} is given twice; keep one of them", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# Resolvers of YAML 1.1 would read `off` as false, 010 as 8 and 2024-01-01 as a date.
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """PyYAML's own constructor would read 010 as 8."""
    return int(loader.construct_scalar(node))


_Loader.add_constructor(f"{_TAG}int", _whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that these rules, or those of YAML 1.1, would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
}


def write_text(tree: dict[str, Any]) -> str:
    """Return YAML that `read_text` reads back to an equal tree, its keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or YAML, or holds something else than keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"config file {path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); give a "
            "YAML file, or save it as UTF-8"
        ) from None
    tree = read_text(text, f"config file {path}")
    if not isinstance(tree, dict):
        found = {type(None): "is empty", list: "holds a list", str: "holds a text"}.get(type(tree), "holds a number")
        raise InputError(f"config file {path} {found}; it must hold keys and values")
    return tree


def read_text(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Args:
        where: what the text is, for messages.

    Raises:
        InputError: it is not YAML, gives a key twice, or is nested or repeated beyond reason.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"{where}: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {_one_line(error)}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; write it flat") from None
    except (ValueError, KeyError, AttributeError) as error:  # of a tag that does not fit its value, of a huge number
        raise InputError(f"{where} holds a value that cannot be read: {error}") from None
    _check_size(value, where)
    return value


def _one_line(error: yaml.YAMLError) -> str:
    """What PyYAML says over several lines."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem = " ".join(filter(None, (error.context, error.problem)))
    return f"{problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def _check_size(value: Any, where: str) -> None:
    """Raise `InputError` if a value holds itself, or more than `MOST_NODES` values."""
    num_nodes = 0
    # Values to look at, each with those that hold it, by identity.
    waiting: list[tuple[Any, tuple[int, ...]]] = [(value, ())]
    while waiting:
        node, holders = waiting.pop()
        num_nodes += 1
        if num_nodes > MOST_NODES:
            raise InputError(f"{where} holds more than {MOST_NODES:,} values, aliases counted; write a smaller one")
        if not isinstance(node, dict | list):
            continue
        if id(node) in holders:
            raise InputError(f"{where}: an alias stands for a value that holds itself; write the value out")
        children = node.values() if isinstance(node, dict) else node
        waiting += [(child, (*holders, id(node))) for child in children]
