"""Recipes on disk: strict YAML, ``base:`` inheritance and ``key=value`` overrides into a typed Recipe.

Everything wrong in a recipe is one RecipeError that names the file, the key, the value and the remedy.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml

import ummim.methods
from ummim.errors import RecipeError
from ummim.methods.api import MethodConfig
from ummim.recipe import Recipe

PACKAGED = Path(str(resources.files("ummim") / "recipes"))
COMMAND_LINE = "command line"
_OFF = (False, None, "off")  # how YAML may read `activation_checkpointing: off`


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a packaged recipe's name or a YAML file, apply ``key=value`` overrides, check, and return it.

    Raises:
        RecipeError: for whatever does not fit.
    """
    path = find_recipe(recipe)
    values, origin = _read(path, ())
    if overrides:
        values.pop("published", None)
    for override in overrides:
        _override(values, origin, override)
    return build_recipe(values, origin, path)


def build_recipe(values: dict[str, Any], origin: dict[str, str], path: Path) -> Recipe:
    """Typed, checked Recipe from plain values; ``origin`` maps dotted keys to where they were set."""
    values = dict(values)
    method = values.pop("method", None)
    config = _method_config(method, origin.get("method.name", str(path)))
    options = {key: value for key, value in method.items() if key != "name"}
    if values.get("activation_checkpointing", "none") in _OFF:
        values["activation_checkpointing"] = "none"
    values.setdefault("name", path.stem)
    values.setdefault("output", f"runs/{values['name']}")
    try:
        _check_keys(values, Recipe, "")
        narrowed = _choose_kinds(config, options)
        _check_keys(options, narrowed, "method.")
        recipe = _parse(values, options, narrowed)
        fields = {field.name: getattr(recipe.method, field.name) for field in dataclasses.fields(config)}
        recipe = dataclasses.replace(recipe, method=config(**fields))
        recipe.check()
    except RecipeError as error:
        raise _locate(error, values | {"method": method}, origin, path) from None
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The plain values of a recipe; YAML of them loads to an equal recipe."""
    values = dataclasses.asdict(recipe)
    module = type(recipe.method).__module__
    prefix = ummim.methods.__name__ + "."
    values["method"] = {"name": module.removeprefix(prefix), **values["method"]}
    return _plain(values)


def dump_recipe(recipe: Recipe) -> str:
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
        raise RecipeError(f"{recipe}: no packaged recipe or file of that name{_suggest(recipe, packaged_recipes())}")
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
        return values, {key: str(path) for key, _ in _flatten(values)}
    beside = path.parent / f"{base}.yaml"
    parent = beside if beside.is_file() else find_recipe(str(base))
    merged, origin = _read(parent, (*chain, path.resolve()))
    for key in ("name", "description", "published"):
        merged.pop(key, None)
    if isinstance(values.get("method"), dict) and "name" in values["method"]:
        merged.pop("method", None)  # another method's sizes mean nothing to this one
    merged = _merge(merged, values)
    own = {key: str(path) for key, _ in _flatten(values)}
    kept = {key: origin[key] for key, _ in _flatten(merged) if key in origin and key not in own}
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
    if isinstance(value, (int, float)) and _type_of(key) in (str, str | None):
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


def _type_of(key: str) -> Any:
    """The declared type of a dotted key outside ``method``, or None."""
    kind: Any = Recipe
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _method_config(method: Any, source: str) -> type[MethodConfig]:
    """The ``Config`` class of the module that ``method.name`` names."""
    names = sorted(m.name for m in pkgutil.iter_modules(ummim.methods.__path__) if m.name != "api")
    if not isinstance(method, dict) or "name" not in method:
        raise RecipeError(f"{source}: method.name is missing: name one of {', '.join(names)}, or a dotted module")
    name = str(method["name"])
    module = name if "." in name else f"{ummim.methods.__name__}.{name}"
    try:
        if "." not in name and name not in names:
            raise ModuleNotFoundError(name=module)
        config = getattr(importlib.import_module(module), "Config", None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise RecipeError(f"{source}: method.name = {name!r}: no such method{_suggest(name, names)}") from None
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise RecipeError(f"{source}: method.name = {name!r}: the module has no Config(MethodConfig)")
    return config


def _choose_kinds(config: type[MethodConfig], options: Mapping[str, Any]) -> type[MethodConfig]:
    """``config`` with every section that may be of several kinds (``encoder: ViTConfig | SwinConfig``) declared as
    the one whose ``kind`` the recipe names, by default the first: so that it is checked and parsed as that one."""
    chosen: list[tuple[str, Any, Any]] = []
    for key, declared in get_type_hints(config).items():
        members: list[Any] = [member for member in get_args(declared) if dataclasses.is_dataclass(member)]
        kinds = {member.kind: member for member in members}
        if not kinds:
            continue
        section = options.get(key)
        kind = section.get("kind", next(iter(kinds))) if isinstance(section, dict) else next(iter(kinds))
        if not isinstance(kind, str) or kind not in kinds:
            raise RecipeError(f"the method has no such {key}; use {' or '.join(kinds)}", f"method.{key}.kind")
        chosen.append((key, kinds[kind], dataclasses.field(default_factory=kinds[kind])))
    return dataclasses.make_dataclass(config.__name__, chosen, bases=(config,), frozen=True)


def _check_keys(values: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Refuse unknown keys, with the nearest known one, and scalars where a section belongs."""
    known = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if (prefix, f.name) != ("", "method")]
    for key, value in values.items():
        if key not in names:
            sections = [] if prefix else ["base", "method"]
            of = f" of {kind.kind}" if hasattr(kind, "kind") else ""
            raise RecipeError(f"unknown key{of}{_suggest(str(key), names + sections)}", prefix + str(key))
        if value is None and type(None) not in get_args(known[key]):
            raise RecipeError("must have a value", prefix + key)
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise RecipeError("is a section: give its keys below it", prefix + key)
            _check_keys(value, known[key], f"{prefix}{key}.")


def _parse(values: dict[str, Any], options: dict[str, Any], config: type[MethodConfig]) -> Recipe:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None, skip={"method"})
    parser.add_class_arguments(config, "method")
    try:
        parsed = parser.instantiate(parser.parse_object({**values, "method": options}))
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).split())
        match = re.match(r'Parser key "([^"]+)": (.*?)\.? (?:Got value|Given value type): ', message)
        if match is None:
            raise RecipeError(message) from None
        first = match[2].partition(" Errors: - ")[2].partition(" - ")[0] or match[2]  # of a union's reasons, the first
        expected = re.sub(r"<class '(\w+)'>", r"\1", first).replace("typing.", "")
        expected = expected.replace("a int", "an int").replace("a Literal", "one of ")
        raise RecipeError(f"{expected[0].lower()}{expected[1:]}", match[1]) from None
    return Recipe(**vars(parsed))


def _locate(error: RecipeError, values: dict[str, Any], origin: dict[str, str], path: Path) -> RecipeError:
    """The error with its file, key and value in front."""
    if error.key is None:
        return RecipeError(f"{path}: {error}")
    flat = dict(_flatten(values))
    value = f" = {flat[error.key]!r}" if error.key in flat else ""
    where = [source for key, source in origin.items() if f"{key}.".startswith(f"{error.key}.")]
    return RecipeError(f"{where[-1] if where else path}: {error.key}{value}: {error}", error.key)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
