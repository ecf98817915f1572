"""Write the docstrings of packages as plain text, a file each: technical prose to hide things in.

    .venv/bin/python benchmarks/docstrings.py books stdlib numpy torch transformers

Packages must be installed; `stdlib` are Python's own modules. Docstrings of more than 200 characters,
each once; of a package the first 800,000 characters, without its tests.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, MOST = 200, 800_000
STDLIB = Path(sysconfig.get_path("stdlib"))


def sources(package: str) -> list[Path]:
    """The files of a package."""
    if package == "stdlib":
        inner = [
            file for name in ("asyncio", "email") for file in sorted((STDLIB / name).glob("*.py"))
        ]
        return [*sorted(STDLIB.glob("*.py")), *inner]
    root = Path(sysconfig.get_path("purelib")) / package
    return [f for f in sorted(root.rglob("*.py")) if not {"test", "tests"} & set(f.parts)]


def docstrings(file: Path) -> Iterator[str]:
    """Of a module, its classes and functions."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="+")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for package in args.packages:
        found = dict.fromkeys(d for file in sources(package) for d in docstrings(file))
        text = "\n\n".join(d for d in found if len(d) > SHORTEST)[:MOST]
        (args.folder / f"docs_{package}.txt").write_text(text, encoding="utf-8")
        print(f"{package}: {len(text):,} characters")


if __name__ == "__main__":
    main()
