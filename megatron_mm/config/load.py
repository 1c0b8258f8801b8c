"""Recipe + files + overrides -> RunConfig.

Order, later wins: the recipe's `base:` chain, the recipe, each --config file, each `a.b=c`. A `preset:` inside
model.vision or model.language is read last and filled in under the keys given. Every fault of the result is reported
at once, each with its path, the value seen and the fix.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_mm.config.errors import InputError
from megatron_mm.config.names import is_text, nearest_settings
from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.config.schema import ModelConfig, ParallelConfig, RunConfig, Section
from megatron_mm.config.strict_yaml import read_file, read_text, write_text

PACKAGE = Path(__file__).parent.parent
RECIPES = PACKAGE / "recipes"
PRESETS = PACKAGE / "presets"
# Characters of a value that a message shows.
MOST_SHOWN = 100

Tree = dict[str, Any]
_Config = TypeVar("_Config", bound=BaseModel)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def describe_recipe(name: str) -> str:
    """Return the first sentence of the comment at the beginning of a shipped recipe."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"\.(?= [A-Z]|$)", text, maxsplit=1)[0]


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
        tree = _merge(tree, read_file(file))
    for override in overrides:
        tree = _merge(tree, _override_tree(override, RunConfig))
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
        tree = _merge(tree, read_file(file))
    tree = {key: value for key, value in tree.items() if key in _ImportConfig.model_fields}
    for override in overrides:
        tree = _merge(tree, _override_tree(override, _ImportConfig))
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
    tree = read_file(file)
    for override in overrides:
        tree = _merge(tree, _override_tree(override, PrepareConfig))
    return _validated(PrepareConfig, tree, str(file))


def read_model(file: Path) -> ModelConfig:
    """The model of a run's or a converted checkpoint's config.yaml.

    Raises:
        InputError: there is no such file, or it holds no model.
    """
    tree = {"model": read_file(file).get("model")}
    return _validated(_ImportConfig, tree, str(file)).model


def model_to_yaml(model: ModelConfig) -> str:
    """The model as YAML for `read_model`, and for `--config`, so that a run trains just this model."""
    return write_text({"model": model.model_dump(mode="json")})


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return write_text(config.model_dump(mode="json"))


def differences(file: Path, config: RunConfig, sections: Iterable[str]) -> list[str]:
    """What a config has otherwise than a run's config.yaml; keys that only one of them knows do not count.

    Args:
        sections: keys of the config that are compared.

    Raises:
        InputError: there is no such file, or it holds no config.
    """
    before, now = read_file(file), config.model_dump(mode="json")
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


def _recipe_tree(recipe: str, above: tuple[str, ...] = ()) -> Tree:
    """The keys and values of a recipe, laid over those of its base.

    Args:
        above: the recipes whose base it is, the first one first.
    """
    is_file = recipe.endswith((".yaml", ".yml"))
    if not is_file and recipe not in recipe_names():
        raise InputError(f"no recipe {recipe!r}{_nearest(recipe, recipe_names())}; known: {', '.join(recipe_names())}")
    chain = (*above, recipe)
    if recipe in above:
        raise InputError(f"recipes are their own base: {' -> '.join(chain)}; take `base:` out of one of them")
    path = Path(recipe) if is_file else RECIPES / f"{recipe}.yaml"
    tree = read_file(path)
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise InputError(f"config file {path} has base: {_shown(base)}; it must name one recipe or YAML file")
    return tree if base is None else _merge(_recipe_tree(base, chain), tree)


def _override_tree(override: str, section: type[BaseModel]) -> Tree:
    """What `a.b=value` lays over a config of `section`."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise InputError(f"override {_shown(override)} is not of the form a.b=value")
    value = read_text(text, f"override {path}={text[:MOST_SHOWN]}")
    if value is not None and is_text(section, keys) and not isinstance(value, dict | list | str):
        value = text  # run_dir=2024 is a directory
    tree: Any = value
    for key in reversed(keys):
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
    known = sorted(file.stem for file in (PRESETS / part).glob("*.yaml"))
    if name not in known:
        raise InputError(f"model.{part}.preset={name!r} does not exist{_nearest(str(name), known)}; known: {known}")
    tree["model"] = {**model, part: _merge(read_file(PRESETS / part / f"{name}.yaml"), section)}


def _describe(fault: Any, section: type[BaseModel]) -> str:
    """One line about a fault that pydantic has found: the setting, what is wrong, and the fix or the value seen."""
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path) or "config"
    if fault["type"] == "extra_forbidden":
        near = nearest_settings(section, path)
        if not near:
            return f"  {name}: unknown key, and no setting is called like it; `megatron-mm show RECIPE` prints all"
        return f"  {name}: unknown key; the nearest valid one is {' or '.join(near)}"
    if fault["type"] == "missing":
        return f"  {name}: missing; give it in the recipe or as {name}=VALUE"
    if fault["type"] == "path_type":
        return f"  {name}: give a path (seen: {_shown(fault['input'])})"
    message = fault["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(fault["input"], dict | BaseModel) else f" (seen: {_shown(fault['input'])})"
    return f"  {name}: {message[0].lower()}{message[1:]}{seen}"


def _shown(value: object) -> str:
    """A value for a message, as YAML has it and cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
