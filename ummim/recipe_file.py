"""Recipes on disk: strict YAML, ``base:`` inheritance and ``key=value`` overrides into a typed recipe.

A recipe with a ``method`` section is a pre-training (``Recipe``), one with a ``classify`` section an evaluation
(``ClassifyRecipe``). Everything wrong in one is one RecipeError that names the file, the key, the value and the remedy.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints, overload

import yaml

import ummim.methods
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.errors import RecipeError
from ummim.recipe import Recipe
from ummim.recipe_values import method_config, suggest, typed
from ummim.run_config import RunConfig

PACKAGED = Path(str(resources.files("ummim") / "recipes"))
COMMAND_LINE = "command line"
R = TypeVar("R", bound=RunConfig)
_OFF = (False, None, "off")  # how YAML may read `activation_checkpointing: off`
_NAMES = {Recipe: "a pre-training recipe (a `method` section)", ClassifyRecipe: "an evaluation (a `classify` section)"}


def packaged_recipes() -> list[str]:
    """Names of the pre-training recipes that come with the package."""
    return [name for name, evaluation in _packaged().items() if not evaluation]


def packaged_evaluations() -> list[str]:
    """Names of the recipes of evaluations that come with the package: fine-tunings and probes."""
    return [name for name, evaluation in _packaged().items() if evaluation]


@cache
def _packaged() -> dict[str, bool]:
    """Packaged name -> whether it is an evaluation's."""
    return {path.stem: "classify" in _read(path, ())[0] for path in sorted(PACKAGED.glob("*.yaml"))}


@overload
def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe: ...
@overload
def load_recipe(recipe: str, overrides: Sequence[str], kind: type[R]) -> R: ...
def load_recipe(recipe: str, overrides: Sequence[str] = (), kind: type[RunConfig] = Recipe) -> RunConfig:
    """Read a packaged recipe's name or a YAML file, apply ``key=value`` overrides, check, and return it.

    kind: what the caller can use: ``Recipe``, ``ClassifyRecipe`` or, for both, ``RunConfig``.

    Raises:
        RecipeError: for whatever does not fit.
    """
    path = find_recipe(recipe)
    values, origin = _read(path, ())
    if overrides:
        values.pop("published", None)
    for override in overrides:
        _override(values, origin, override)
    built = build_recipe(values, origin, path)
    if not isinstance(built, kind):
        raise RecipeError(f"{path}: is {_NAMES[type(built)]}; this needs {_NAMES[kind]}")
    return built


def build_recipe(values: dict[str, Any], origin: dict[str, str], path: Path) -> Recipe | ClassifyRecipe:
    """Typed, checked recipe from plain values; ``origin`` maps dotted keys to where they were set."""
    values = dict(values)
    if "method" in values and "classify" in values:
        raise RecipeError(f"{path}: a recipe has a method section (pre-training) or a classify section, not both")
    section = "classify" if "classify" in values else "method"
    options = values.pop(section, None)
    given = values | {section: options}
    if values.get("activation_checkpointing", "none") in _OFF:
        values["activation_checkpointing"] = "none"
    values.setdefault("name", path.stem)
    values.setdefault("output", f"runs/{values['name']}")
    try:
        recipe: Recipe | ClassifyRecipe
        if section == "classify":
            if not isinstance(options, dict):
                raise RecipeError("is a section: give its keys below it", section)
            recipe = typed(ClassifyRecipe, section, ClassifyConfig, values, options)
        else:
            config = method_config(options, origin.get("method.name", str(path)))
            sizes = {key: value for key, value in options.items() if key != "name"}
            recipe = typed(Recipe, section, config, values, sizes)
        recipe.check()
    except RecipeError as error:
        raise _locate(error, given, origin, path) from None
    return recipe


def to_dict(recipe: RunConfig) -> dict[str, Any]:
    """The plain values of a recipe; YAML of them loads to an equal recipe."""
    values = dataclasses.asdict(recipe)
    if isinstance(recipe, Recipe):
        module = type(recipe.method).__module__
        prefix = ummim.methods.__name__ + "."
        values["method"] = {"name": module.removeprefix(prefix), **values["method"]}
    return _plain(values)


def dump_recipe(recipe: RunConfig) -> str:
    """The fully resolved recipe as YAML."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by packaged name or path."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"{recipe}: no such recipe file")
        return path
    packaged = PACKAGED / f"{recipe}.yaml"
    if "/" in recipe or not packaged.is_file():
        raise RecipeError(f"{recipe}: no packaged recipe or file of that name{suggest(recipe, list(_packaged()))}")
    return packaged


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(
                    f"{key_node.start_mark.name}: line {key_node.start_mark.line + 1}: {key} is given twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a YAML file merged over its base's, and the file each dotted key came from."""
    if path.resolve() in chain:
        raise RecipeError(f"{path}: base: the recipe inherits from itself, through {chain[-1]}")
    try:
        with path.open(encoding="utf-8") as file:
            values = _StrictLoader(file).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values, {key: str(path) for key, _ in flatten(values)}
    beside = path.parent / f"{base}.yaml"
    parent = beside if beside.is_file() else find_recipe(str(base))
    merged, origin = _read(parent, (*chain, path.resolve()))
    for key in ("name", "description", "published"):
        merged.pop(key, None)
    if isinstance(values.get("method"), dict) and "name" in values["method"]:
        merged.pop("method", None)  # another method's sizes mean nothing to this one
    classify = values.get("classify")
    if isinstance(classify, dict) and isinstance(merged.get("classify"), dict) and "encoder" in classify:
        merged["classify"].pop("encoder", None)  # nor another encoder's
    merged = _merge(merged, values)
    own = {key: str(path) for key, _ in flatten(values)}
    kept = {key: origin[key] for key, _ in flatten(merged) if key in origin and key not in own}
    return merged, kept | own


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(values: dict[str, Any], origin: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{COMMAND_LINE}: {override!r} is no override: write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    kind = _type_of(key, values)
    if (isinstance(value, (int, float)) and kind in (str, str | None)) or (text == "" and kind is str):
        value = text
    if key == "base":
        raise RecipeError(f"{COMMAND_LINE}: base belongs in a recipe file; give that recipe as RECIPE instead")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{COMMAND_LINE}: {key}: {parent} is a value, it has no keys below it")
        values = child
    values[last] = value
    origin.pop(key, None)  # the latest comes last
    origin[key] = COMMAND_LINE


def _type_of(key: str, values: Mapping[str, Any]) -> Any:
    """The declared type, in a recipe of these ``values``, of a dotted key outside ``method``, or None."""
    kind: Any = ClassifyRecipe if "classify" in values else Recipe
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _locate(error: RecipeError, values: dict[str, Any], origin: dict[str, str], path: Path) -> RecipeError:
    """The error with its file, key and value in front."""
    if error.key is None:
        return RecipeError(f"{path}: {error}")
    flat = dict(flatten(values))
    value = f" = {flat[error.key]!r}" if error.key in flat else ""
    where = [source for key, source in origin.items() if f"{key}.".startswith(f"{error.key}.")]
    return RecipeError(f"{where[-1] if where else path}: {error.key}{value}: {error}", error.key)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested sections, and their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
