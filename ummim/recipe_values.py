"""From plain values, as YAML gives them, to a typed recipe's: unknown keys, wrong types and kinds are refused.

Everything wrong is one RecipeError with the dotted key at fault; recipe_file.py adds the file and the value.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

import jsonargparse

import ummim.methods
from ummim.errors import RecipeError
from ummim.methods.api import MethodConfig
from ummim.run_config import RunConfig

R = TypeVar("R", bound=RunConfig)


def method_config(method: Any, source: str) -> type[MethodConfig]:
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
        raise RecipeError(f"{source}: method.name = {name!r}: no such method{suggest(name, names)}") from None
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise RecipeError(f"{source}: method.name = {name!r}: the module has no Config(MethodConfig)")
    return config


def typed(recipe: type[R], section: str, config: type[Any], values: dict[str, Any], options: dict[str, Any]) -> R:
    """The typed recipe of plain ``values``, and of ``options`` in its ``section``, which is a ``config``.

    Raises:
        RecipeError: with the key.
    """
    check_keys(values, recipe, "", section)
    narrowed = _choose_kinds(config, section, options)
    check_keys(options, narrowed, f"{section}.")
    parsed = _parse(recipe, section, values, options, narrowed)
    fields = {field.name: getattr(getattr(parsed, section), field.name) for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {section: config(**fields)}
    return dataclasses.replace(parsed, **changes)


def _choose_kinds(config: type[Any], section: str, options: Mapping[str, Any]) -> type[Any]:
    """``config`` with every key that may be of several kinds (``encoder: ViTConfig | SwinConfig``) declared as
    the one whose ``kind`` the recipe names, by default the first: so that it is checked and parsed as that one."""
    chosen: list[tuple[str, Any]] = []
    for key, declared in get_type_hints(config).items():
        members: list[Any] = [member for member in get_args(declared) if dataclasses.is_dataclass(member)]
        kinds = {member.kind: member for member in members}
        given = options.get(key)
        if not kinds or (given is None and type(None) in get_args(declared)):
            continue
        kind = given.get("kind", next(iter(kinds))) if isinstance(given, dict) else next(iter(kinds))
        if not isinstance(kind, str) or kind not in kinds:
            raise RecipeError(f"the {section} has no such {key}; use {' or '.join(kinds)}", f"{section}.{key}.kind")
        chosen.append((key, kinds[kind]))
    return _narrowed(config, tuple(chosen))  # type: ignore[arg-type]  # mypy: classes are not hashable


@cache  # so that the parser below is made once, too
def _narrowed(config: type[Any], chosen: tuple[tuple[str, Any], ...]) -> type[Any]:
    fields = [(key, kind, dataclasses.field(default_factory=kind)) for key, kind in chosen]
    return dataclasses.make_dataclass(config.__name__, fields, bases=(config,), frozen=True)


def check_keys(values: Mapping[str, Any], kind: type, prefix: str, section: str = "") -> None:
    """Refuse unknown keys, with the nearest known one, and scalars where a section belongs; ``section`` is apart."""
    known = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if prefix or f.name != section]
    for key, value in values.items():
        if key not in names:
            sections = [] if prefix else ["base", section]
            of = f" of {kind.kind}" if hasattr(kind, "kind") else ""
            raise RecipeError(f"unknown key{of}{suggest(str(key), names + sections)}", prefix + str(key))
        if value is None and type(None) not in get_args(known[key]):
            raise RecipeError("must have a value", prefix + key)
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise RecipeError("is a section: give its keys below it", prefix + key)
            check_keys(value, known[key], f"{prefix}{key}.")


@cache  # most of the time that reading a recipe takes
def _parser(recipe: type[RunConfig], section: str, config: type[Any]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(recipe, None, skip={section})
    parser.add_class_arguments(config, section)
    return parser


def _parse(recipe: type[R], section: str, values: dict[str, Any], options: dict[str, Any], config: type[Any]) -> R:
    parser = _parser(recipe, section, config)  # type: ignore[arg-type]  # mypy: classes are not hashable
    try:
        parsed = parser.instantiate(parser.parse_object({**values, section: options}))
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).split())
        match = re.match(r'Parser key "([^"]+)": (.*?)\.? (?:Got value|Given value type): ', message)
        if match is None:
            raise RecipeError(message) from None
        first = match[2].partition(" Errors: - ")[2].partition(" - ")[0] or match[2]  # of a union's reasons, the first
        expected = re.sub(r"<class '(\w+)'>", r"\1", first).replace("typing.", "")
        expected = expected.replace("a int", "an int").replace("a Literal", "one of ")
        raise RecipeError(f"{expected[0].lower()}{expected[1:]}", match[1]) from None
    return recipe(**vars(parsed))


def suggest(name: str, known: Sequence[str]) -> str:
    """The nearest known name, or all of them, to end a message with."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
