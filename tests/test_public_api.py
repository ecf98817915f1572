"""The public names: one sorted list, all importable, annotated and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from transformers import AutoConfig

import transformerfam

PACKAGE = Path(transformerfam.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_all_is_sorted_and_without_doubles() -> None:
    assert sorted(set(transformerfam.__all__)) == transformerfam.__all__
    assert not any(name.startswith("_") for name in transformerfam.__all__)


@pytest.mark.parametrize("name", transformerfam.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(transformerfam, name)
    assert thing.__name__ == name
    assert thing.__module__ == f"transformerfam.{transformerfam._WHERE[name]}"
    assert inspect.getdoc(thing)
    assert name in dir(transformerfam)


def test_whatever_is_refused_can_be_caught_by_one_name() -> None:
    refusals = [name for name in transformerfam.__all__ if name.endswith("Error")]
    assert len(refusals) >= 5
    assert all(issubclass(getattr(transformerfam, n), transformerfam.UserError) for n in refusals)


def test_type_checkers_see_the_same_names() -> None:
    """The names under TYPE_CHECKING, which are for readers and tools, are those of `__all__`."""
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    shown = {
        alias.asname: node.module
        for block in ast.walk(source)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    where = {name: f"transformerfam.{module}" for name, module in transformerfam._WHERE.items()}
    assert shown == where


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'transformerfam' has no attribute 'FAM'"):
        transformerfam.FAM  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    project = (PACKAGE.parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{transformerfam.__version__}"\n' in project
    assert (PACKAGE / "py.typed").exists()


def test_a_star_brings_the_list() -> None:
    names: dict[str, object] = {}
    exec("from transformerfam import *", names)
    assert names.keys() - {"__builtins__"} == set(transformerfam.__all__)


def test_importing_is_enough_for_the_auto_classes() -> None:
    assert AutoConfig.for_model("transformerfam").model_type == "transformerfam"


# ---- annotated and documented, public or not


def functions(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(qualified name, function, whether it is public) of a module, nested ones left out."""
    found = []

    def visit(node: ast.AST, prefix: str, public: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visible = public and not child.name.startswith("_")
                found.append((f"{prefix}{child.name}", child, visible))
            elif isinstance(child, ast.ClassDef):
                open_to_all = public and not child.name.startswith("_")
                visit(child, f"{prefix}{child.name}.", open_to_all)
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                visit(child, prefix, public)

    visit(ast.parse(path.read_text()), "", True)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_function_is_annotated_and_every_public_one_documented(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "the module says what it is for"
    for name, function, public in functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{name} has {bare} without annotation"
        assert function.returns is not None, f"{name} does not say what it returns"
        if public:
            assert ast.get_docstring(function), f"{name} is not documented"


@pytest.mark.parametrize("name", transformerfam.__all__)
def test_public_classes_describe_their_attributes(name: str) -> None:
    """Every field of a public dataclass is named in the docstring of its class."""
    thing = getattr(transformerfam, name)
    if inspect.isclass(thing) and hasattr(thing, "__dataclass_fields__"):
        for field in thing.__dataclass_fields__:
            assert f"{field}" in (inspect.getdoc(thing) or ""), f"{name}.{field}"


def test_refusals_are_the_errors_that_python_would_raise_there() -> None:
    for name in transformerfam.__all__:
        thing = getattr(transformerfam, name)
        if inspect.isclass(thing) and issubclass(thing, Exception) and name != "UserError":
            assert issubclass(thing, (ValueError, ImportError)), name
    assert importlib.import_module("transformerfam.memory_file").MemoryFileError is (
        transformerfam.MemoryFileError
    )
