"""Recipe + files + overrides -> RunConfig.

Order, later wins: the recipe's `base:` chain, the recipe, each --config file, each `a.b=c`. A `preset:` inside
model.vision or model.language is read last and filled in under the keys given. Every fault of the result is reported
at once, each with its path, the value seen and the fix.
"""

import contextlib
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.config.schema import ModelConfig, ParallelConfig, RunConfig, Section

PACKAGE = Path(__file__).parent.parent
RECIPES = PACKAGE / "recipes"
PRESETS = PACKAGE / "presets"

Tree = dict[str, Any]
_Config = TypeVar("_Config", bound=BaseModel)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def load_config(recipe: str, files: Iterable[Path] = (), overrides: Iterable[str] = ()) -> RunConfig:
    """Resolve a recipe to a checked config.

    Args:
        recipe: name of a shipped recipe ("mini/stage1") or path of a YAML file.
        files: YAML files merged over the recipe, in order.
        overrides: `path.to.key=value` strings, the value read as YAML, merged last.

    Raises:
        InputError: unknown recipe, preset or key, or a value that the schema refuses; all of them in one message.
    """
    tree = _recipe_tree(recipe)
    for file in files:
        tree = _merge(tree, _read_yaml(file))
    for override in overrides:
        tree = _merge(tree, _override_tree(override))
    tree.setdefault("recipe", recipe)
    _fill_preset(tree, "vision")
    _fill_preset(tree, "language")
    return _validated(RunConfig, tree, recipe)


class _ImportConfig(Section):
    """What a conversion reads of a config."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()


def load_model(
    found: Mapping[str, Any], recipe: str | None, files: Iterable[Path], overrides: Iterable[str]
) -> tuple[ModelConfig, ParallelConfig]:
    """The model and layout that a conversion is for.

    Args:
        found: `model` as the weights' own config says.
        recipe: shipped recipe or YAML file whose `model` and `parallel` are laid over it; its other keys do not count.
        files: YAML files laid over that, of which the same holds.
        overrides: `model.key=value` and `parallel.key=value`, laid over that.

    Raises:
        InputError: as `load_config`.
    """
    tree = _recipe_tree(recipe) if recipe else {}
    for file in files:
        tree = _merge(tree, _read_yaml(file))
    tree = {key: value for key, value in tree.items() if key in _ImportConfig.model_fields}
    for override in overrides:
        tree = _merge(tree, _override_tree(override))
    _fill_preset(tree, "vision")
    _fill_preset(tree, "language")
    tree = _merge({"model": found}, tree)
    config = _validated(_ImportConfig, tree, recipe or "of the weights")
    return config.model, config.parallel


def load_prepare(file: Path, overrides: Iterable[str] = ()) -> PrepareConfig:
    """What `megatron-mm data prepare` is to do; paths in the file are relative to the working directory.

    Raises:
        InputError: as `load_config`.
    """
    tree = _read_yaml(file)
    for override in overrides:
        tree = _merge(tree, _override_tree(override))
    return _validated(PrepareConfig, tree, str(file))


def read_model(file: Path) -> ModelConfig:
    """The model of a run's or a converted checkpoint's config.yaml.

    Raises:
        InputError: there is no such file, or it holds no model.
    """
    tree = {"model": _read_yaml(file).get("model")}
    return _validated(_ImportConfig, tree, str(file)).model


def model_to_yaml(model: ModelConfig) -> str:
    """The model as YAML for `read_model`, and for `--config`, so that a run trains just this model."""
    return yaml.safe_dump({"model": model.model_dump(mode="json")}, sort_keys=False)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(file: Path, config: RunConfig, sections: Iterable[str]) -> list[str]:
    """What a config has otherwise than a run's config.yaml; keys that only one of them knows do not count.

    Args:
        sections: keys of the config that are compared.

    Raises:
        InputError: there is no such file, or it holds no config.
    """
    before, now = _read_yaml(file), config.model_dump(mode="json")
    return [one for section in sections for one in _differences(section, before.get(section), now[section])]


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        shared = [key for key in now if key in before]
        return [one for key in shared for one in _differences(f"{path}.{key}", before[key], now[key])]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]


def _validated(section: type[_Config], tree: Tree, recipe: str) -> _Config:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        # A list of which something is wrong counts as empty as well.
        spoiled = {fault["loc"][:place] for fault in found for place in range(1, len(fault["loc"]))}
        told = [fault for fault in found if fault["type"] != "too_short" or fault["loc"] not in spoiled]
        faults = [_describe(fault, section) for fault in told]
        raise InputError("\n".join([f"recipe {recipe} has {len(faults)} fault(s):", *faults])) from None


def _recipe_tree(recipe: str) -> Tree:
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise InputError(f"no recipe {recipe!r}{_nearest(recipe, recipe_names())}; known: {', '.join(recipe_names())}")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    return _merge(_recipe_tree(base), tree) if base else tree


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config file {path} holds {type(tree).__name__}; it must hold keys and values")
    return tree


def _override_tree(override: str) -> Tree:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"override {override!r} is not of the form a.b=value")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML: {error}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    tree: Any = value
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return tree


def _merge(under: Tree, over: Mapping[str, Any]) -> Tree:
    """`over` laid on `under`. A blend is replaced as a whole: parts of another mixture have no meaning in it."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if key != "blend" and isinstance(value, Mapping) and isinstance(old, Mapping):
            value = _merge(dict(old), value)
        elif isinstance(value, Mapping) and isinstance(old, list) and value.keys() <= set(map(str, range(len(old)))):
            # a.0.b=c is of the first thing in a list.
            value = list(_merge({str(place): one for place, one in enumerate(old)}, value).values())
        merged[key] = value
    return merged


def _fill_preset(tree: Tree, part: str) -> None:
    model = tree.get("model")
    section = model.get(part) if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(section, dict) or section.get("preset") is None:
        return
    name = section["preset"]
    path = PRESETS / part / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise InputError(f"model.{part}.preset={name!r} does not exist{_nearest(str(name), known)}; known: {known}")
    tree["model"] = {**model, part: _merge(_read_yaml(path), section)}


def _describe(fault: Any, section: type[BaseModel]) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path) or "config"
    if fault["type"] == "extra_forbidden":
        valid = _fields_at(section, path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0)
        hint = ".".join([*path[:-1], near[0]]) if near else "nothing"
        return f"  {name}: unknown key; the nearest valid one is {hint}"
    if fault["type"] == "missing":
        return f"  {name}: missing; give it in the recipe or as {name}=VALUE"
    message = fault["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(fault["input"], dict | BaseModel) else f" (seen: {fault['input']!r})"
    return f"  {name}: {message[0].lower()}{message[1:]}{seen}"


def _fields_at(section: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the valid keys of the section at `path`; numbers in it stand for places in a list."""
    model: Any = section
    for part in path:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        if typing.get_origin(annotation) is tuple:
            annotation = typing.get_args(annotation)[0]
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
