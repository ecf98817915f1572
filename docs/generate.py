"""Write the generated pages: docs/cli.md, and parts of families.md, recipes.md and evaluation.md.

Run by `make docs`.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from families import FAMILIES  # noqa: E402  # the tests' tiny models are the list

from transformerfam import cli  # noqa: E402
from transformerfam.commands import _settings  # noqa: E402
from transformerfam.tasks import TASKS  # noqa: E402
from transformerfam.tasks.gpt3 import HARNESS  # noqa: E402


def family_list() -> str:
    """One line for each family that the tests run on, by name."""
    names = sorted(FAMILIES, key=str.lower)
    return "\n".join(f"- {name} (`{FAMILIES[name][0]}ForCausalLM`)" for name in names)


def families_page(page: str) -> str:
    """`page` with its list of families brought up to date."""
    return with_part(page, "families", family_list())


def recipes_page(page: str) -> str:
    """`page` with its tables of settings brought up to date."""
    return with_part(page, "settings", _settings.as_markdown())


def evaluation_page(page: str) -> str:
    """`page` with its table of tasks and its command for the harness brought up to date."""
    rows = [f"| `{name}` | {task.about} | {task.source} |" for name, task in TASKS.items()]
    header = ["| task | asks for | after |", "| --- | --- | --- |"]
    page = with_part(page, "tasks", "\n".join([*header, *rows]))
    return with_part(page, "gpt3", f"```bash\n{harness_command()}\n```")


def harness_command() -> str:
    """Every task of table 12 that lm-evaluation-harness has."""
    return f"lm_eval --model transformerfam --tasks {','.join(HARNESS.values())}"


def with_part(page: str, name: str, text: str) -> str:
    """`page` with `text` between the marks of `name`.

    Raises:
        ValueError: if the marks are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"A page has lost its marks {begin} and {end}.")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    """Write all of them."""
    pages = {
        "families": families_page,
        "recipes": recipes_page,
        "evaluation": evaluation_page,
    }
    for name, made in pages.items():
        page = DOCS / f"{name}.md"
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")
    cli.write_docs(DOCS / "cli.md")


if __name__ == "__main__":
    main()
