"""Write the generated pages: docs/cli.md, and the list in docs/families.md. Run by `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from families import FAMILIES  # noqa: E402  # the tests' tiny models are the list

from transformerfam import cli  # noqa: E402

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def family_list() -> str:
    """One line for each family that the tests run on, by name."""
    names = sorted(FAMILIES, key=str.lower)
    return "\n".join(f"- {name} (`{FAMILIES[name][0]}ForCausalLM`)" for name in names)


def families_page(page: str) -> str:
    """`page` with its list of families brought up to date.

    Raises:
        ValueError: if the marks around the list are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/families.md has lost its marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{family_list()}\n\n{END}{after}"


def main() -> None:
    """Write both pages."""
    page = DOCS / "families.md"
    page.write_text(families_page(page.read_text(encoding="utf-8")), encoding="utf-8")
    cli.write_docs(DOCS / "cli.md")


if __name__ == "__main__":
    main()
