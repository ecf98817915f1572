"""What the documentation shows works: examples, commands, files, links and names."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from transformerfam import cli, models
from transformerfam.conversion import is_transformerfam
from transformerfam.training import trainer
from transformerfam.training.recipe import SECTIONS, Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The README's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


# ---- Python


def test_examples_run(
    folder: str,
    book: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order in which they stand, with a tiny model for the default one and for one's own."""
    monkeypatch.setattr(models, "embedded_folder", lambda: Path(folder))
    monkeypatch.chdir(Path(book).parent)
    (tmp_path / "my-model").symlink_to(folder)
    names: dict[str, Any] = {}
    blocks = fenced("python")
    assert len(blocks) == 3
    asked: list[Recipe] = []

    def train(recipe: Recipe) -> trainer.Trained:
        asked.append(recipe)
        return trainer.Trained(None, None, losses=[0.5])

    monkeypatch.setattr(trainer, "train", train)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert re.search(r"^\d+ tokens, loss \d+\.\d\d$", shown, re.MULTILINE)
    assert " And then" in shown
    assert (tmp_path / "book.fam").is_file()
    assert [(r.run.output, r.data.sources[0].filler) for r in asked] == [("out-python", "book.txt")]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model-fam")
    assert is_transformerfam(again) and again.fam_config.fam_length == 64


# ---- the command line


def commands() -> list[list[str]]:
    """The arguments of every `fam` in the README's shell blocks."""
    found = []
    for line in "".join(fenced("bash")).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|<>")
        words.whitespace_split = True
        for part in " ".join(shlex.quote(w) for w in words).split("'|'"):
            program, *arguments = shlex.split(part)
            if program == "fam":
                found.append(arguments[: arguments.index("<")] if "<" in arguments else arguments)
    return found


def test_there_are_commands_to_check() -> None:
    shown = {arguments[0] for arguments in commands()}
    assert {"read", "generate", "chat", "info", "masks"} <= shown


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_parse(arguments: list[str]) -> None:
    parsed = cli.build_parser().parse_args(arguments)
    assert parsed.command == arguments[0]


# ---- files


def tree() -> list[Path]:
    """The paths of the tree in the README, which nests by two blanks."""
    block = README.partition("## The tree")[2].partition("```text\n")[2].partition("```")[0]
    found, above = [], [ROOT]
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = above[depth] / name
        if name.endswith("/"):
            above[depth + 1 :] = [path]
        found.append(path)
    return found


def test_the_tree_is_there_and_whole() -> None:
    named = tree()
    for path in named:
        assert list(path.parent.glob(path.name)), f"the tree names {path.relative_to(ROOT)}"
    package = ROOT / "src" / "transformerfam"
    files = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    files = {p for p in files if p.suffix != ".csv"}  # their folder is named
    files |= {*PAGES, *(ROOT / "benchmarks").glob("*.py")}
    missing = sorted(str(p.relative_to(ROOT)) for p in files - set(named))
    assert not missing, f"the tree lacks {', '.join(missing)}"


# ---- links and names, on every page


def without_code(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(there), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_tests_that_the_documentation_names_exist() -> None:
    sources = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")}
    for page in PAGES:
        for name in re.findall(
            r"`(?:tests/)?([a-z0-9_]+)(?:\.py)?`", page.read_text(encoding="utf-8")
        ):
            if name.startswith("test_"):
                known = f"{name}.py" in sources or any(
                    f"def {name}(" in s for s in sources.values()
                )
                assert known, f"{page.name} names {name}"


def is_setting(section: str, name: str) -> bool:
    """Whether a recipe has `[section]` with that setting."""
    return section in SECTIONS and name in {f.name for f in fields(SECTIONS[section])}


def qualified() -> Iterator[tuple[str, str]]:
    """Every (module or package, name in it) of the pages that lead from words to code."""
    package = ROOT / "src" / "transformerfam"
    for name in ("paper.md", "architecture.md", "training.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for module, rest in re.findall(r"`([a-z_]+)\.([A-Za-z_0-9.]+)`", text):
            is_file = rest in ("py", "json", "jsonl", "md", "safetensors")
            is_ours = (package / f"{module}.py").is_file() or (package / module).is_dir()
            if is_ours and not is_file and not is_setting(module, rest):
                yield module, rest


@pytest.mark.parametrize("module, name", sorted(set(qualified())))
def test_code_that_the_documentation_names_exists(module: str, name: str) -> None:
    thing: Any = importlib.import_module(f"transformerfam.{module}")
    for part in name.split("."):
        if hasattr(thing, "__path__"):  # a package does not bring its modules
            importlib.import_module(f"{thing.__name__}.{part}")
        known = getattr(thing, "__dataclass_fields__", {})
        assert hasattr(thing, part) or part in known, f"{module}.{name}"
        thing = getattr(thing, part, None)


def test_settings_that_the_documentation_names_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z]+)\.([a-z_]+)(?: = [^`]*)?`", text)
    modules = {path.stem for path in (ROOT / "src" / "transformerfam").glob("*.py")}
    wrong = [
        f"{section}.{name}"
        for section, name in named
        if section in SECTIONS and section not in modules and not is_setting(section, name)
    ]
    assert len(named) > 20 and not wrong, ", ".join(wrong)


def test_generated_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` would change nothing."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs")])
    page = importlib.import_module("generate")
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page.families_page(families) == families
    assert cli.docs() == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
