"""Imports go one way through the package, and files and functions stay of a size to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import transformerfam

PACKAGE = Path(transformerfam.__file__).parent

# A module imports only from modules before it. The modules of `commands` count as one.
ORDER = [
    *("errors", "extras", "files", "report"),
    *("config_checks", "config", "masks", "rotary", "cost", "variants"),
    *(
        "attention",
        "layer_memory",
        "memory",
        "plan",
        "indexing",
        "auxiliary",
        "call",
        "feedback",
        "blocks",
        "replayed_blocks",
        "feedback_segments",
        "compressive",
        "recurrent",
    ),
    *(
        "modules",
        "memory_file",
        "probe",
        "layer",
        "modeling",
        "auto",
        "conversion",
        "embedded",
        "hub",
        "models",
        "replay",
    ),
    *("text", "stream", "side_by_side", "turns", "data", "plots", "benchmark"),
    *("inspection", "inspection_page", "attention_maps"),
    *("tasks", "readers", "evaluate", "answers", "training", "reproduction"),
    *("commands", "cli", "harness", "__main__"),
]

# Inside a function an import may also go back, for a reason.
BACK = {
    ("config_checks", "config"): "the type that is checked, and what its annotations allow",
    ("memory", "memory_file"): "Memory.save and Memory.load are where one looks for them",
    ("modeling", "conversion"): "a pickle makes the classes of its family again",
    ("auto", "conversion"): "a config.json names a family whose classes are made then",
}

# Start in milliseconds: they bring neither torch nor transformers when they are imported.
LIGHT = ["errors", "extras", "files", "report", "config", "config_checks", "masks", "text"]
LIGHT += ["embedded", "commands", "cli"]

LONGEST_FILE, LONGEST_FUNCTION = 420, 60
LONG_FILES: dict[str, str] = {}  # file: why it may be longer


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if layer_of(path) != "__init__"]


@dataclass(frozen=True)
class Import:
    """`module`, imported when its importer is (`at_once`) or when a function runs."""

    module: str
    at_once: bool


def imports(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path.name} has a relative import"
                module = child.module or ""
                if module == "transformerfam":
                    yield from (Import(f"{module}.{a.name}", at_once) for a in child.names)
                else:
                    yield Import(module, at_once)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(child, False)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from visit(child, at_once and not function)

    yield from visit(ast.parse(path.read_text()), True)


def test_every_module_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    missing = {layer_of(path) for path in FILES} - set(ORDER)
    assert not missing, f"give {', '.join(sorted(missing))} a place in ORDER"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    here = layer_of(path)
    for found in imports(path):
        package, _, rest = found.module.partition(".")
        there = rest.partition(".")[0]
        if package != "transformerfam" or there == here or there.startswith("__version"):
            continue
        assert there in ORDER, f"{path.name} imports {found.module}"
        if (here, there) in BACK:
            assert not found.at_once, f"{here} may import {there} inside of functions only"
        else:
            assert ORDER.index(there) < ORDER.index(here), f"{here} imports {there}"


def test_every_way_back_is_used() -> None:
    used = {
        (layer_of(p), i.module.removeprefix("transformerfam.")) for p in FILES for i in imports(p)
    }
    assert set(BACK) <= used


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) in LIGHT], ids=lambda p: p.name)
def test_light_modules_bring_nothing_heavy(path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "peft", "datasets", "matplotlib"}
    for found in imports(path):
        package, _, rest = found.module.partition(".")
        if found.at_once:
            assert package not in heavy, f"{path.name} imports {found.module}"
            if package == "transformerfam":
                assert rest.partition(".")[0] in {*LIGHT, "__version__"}, f"{path.name}: {rest}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    source = path.read_text()
    name = str(path.relative_to(PACKAGE))
    if name not in LONG_FILES:
        assert len(source.splitlines()) <= LONGEST_FILE, f"{name} is too long to be read at once"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name}: {node.name} has {length} lines"
