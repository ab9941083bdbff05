"""The documentation names what exists: methods, recipes, options, official families, tests and files."""

import ast
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import ummim.methods
from tests.conftest import ROOT
from ummim.downstream.recipe import ClassifyRecipe
from ummim.interop.classifier import CLASSIFIERS
from ummim.interop.official import FAMILIES
from ummim.recipe import Recipe
from ummim.recipe_file import packaged_evaluations, packaged_recipes

METHODS = sorted(module.name for module in pkgutil.iter_modules(ummim.methods.__path__) if module.name != "api")
CONFIGS = [importlib.import_module(f"ummim.methods.{name}").Config for name in METHODS]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPE_NAME = re.compile(r"`((?:[a-z]+_)+\d+e(?:_r\d+)?|quickstart)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def code_spans(text: str) -> list[str]:
    """Everything between single backticks, outside fenced blocks, on one line each."""
    return [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]


def option_paths(kinds: list[Any], prefix: str) -> Iterator[str]:
    """The dotted recipe keys of dataclasses that may stand in one place, sections and fields."""
    for kind in kinds:
        for key, hint in get_type_hints(kind).items():
            if key in {field.name for field in dataclasses.fields(kind)} and key != "method":
                yield prefix + key
                sections = [member for member in (hint, *get_args(hint)) if dataclasses.is_dataclass(member)]
                yield from option_paths(sections, f"{prefix}{key}.")


OPTIONS = {*option_paths([Recipe, ClassifyRecipe], ""), *option_paths(CONFIGS, "method.")}
SECTIONS = {option.split(".")[0] for option in OPTIONS if "." in option}


def test_every_method_has_a_section_and_every_section_a_method() -> None:
    assert sorted(re.findall(r"^## .*\(`(\w+)\.py`\)$", page("methods.md"), re.MULTILINE)) == METHODS
    assert len(METHODS) == 8


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_recipes_that_are_named_exist(path: Path) -> None:
    assert set(RECIPE_NAME.findall(path.read_text())) <= {*packaged_recipes(), *packaged_evaluations()}


def test_every_recipe_stands_in_its_methods_section() -> None:
    assert set(RECIPE_NAME.findall(page("methods.md"))) == set(packaged_recipes())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_that_are_named_exist(path: Path) -> None:
    """`method.a.b`, with or without a value, and `method.a.{b, c}`."""
    for span in code_spans(path.read_text()):
        if re.match(rf"(?:{'|'.join(SECTIONS)})\.(?!py\b)[a-z_]+", span):
            stem, _, group = span.partition("{")
            names = [stem + name.strip() for name in group.rstrip("}").split(",")] if group else [span]
            for name in names:
                assert re.split(r"[:=]", name)[0] in OPTIONS, name


def test_legacy_options_are_all_registered() -> None:
    text = page("fidelity.md")
    special = {option for option in OPTIONS if option.rpartition(".")[2].startswith(("legacy_", "row_major"))}
    named = re.findall(r"`([a-z_.]*(?:legacy_|row_major)[a-z_]*)[:`]", text)
    assert set(named) == special


def test_official_families_are_all_registered() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [\w-]+ \| ", page("fidelity.md"), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(FAMILIES)
    named = set(
        re.findall(r"`((?:um_)?(?:mae|simmim|green_mim|local_mim|mff|tec|amt)_(?:vit|swin|pvt))`", page("methods.md"))
    )
    assert named == set(FAMILIES)
    sentence = re.search(r"`load_official_classifier` for ([^(]*)", page("fidelity.md"))
    assert sentence is not None
    assert re.findall(r"`(\w+)`", sentence[1]) == list(CLASSIFIERS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_and_files_that_are_named_exist(path: Path) -> None:
    for span in code_spans(path.read_text()):
        file, colons, name = span.partition("::")
        if colons:
            source = (ROOT / "tests" / file.removeprefix("tests/")).read_text()
            assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}, span
        elif re.fullmatch(r"(?:ummim|tests|benchmarks|docs|ds_configs)/[\w/.*]+", span):
            assert list(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        whole = path.parent / file if file else path
        assert whole.exists(), target
        if anchor:
            assert anchor in anchors(whole.read_text()), target


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, punctuation gone, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_ninth_method_is_shown_as_it_is() -> None:
    section = page("methods.md").partition("## How to add a ninth")[2]
    source = (ROOT / "tests/methods/ninth.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert block in source


def test_nothing_cites_what_a_reader_cannot_see() -> None:
    """Internal documents are no part of the repository."""
    internal = re.compile(r"\b(?:SPEC|INTERFACES|DESIGN)(?:\.md)?\b")
    folders = ("ummim", "data_prep", "benchmarks", "tests", "docs", "ds_configs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    for file in [*files, ROOT / "train.py", ROOT / "README.md"]:
        if file.suffix in (".py", ".md", ".yaml", ".json") and file != Path(__file__).resolve():
            assert not internal.search(file.read_text()), file
