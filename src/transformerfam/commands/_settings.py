"""Every setting of a recipe, with its type, its default and its meaning. Knows no torch."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from typing import Any

from transformerfam import report
from transformerfam.commands._options import GEOMETRY

# The lists of tables stand as sections of their own.
_SOURCES = "data.sources"


@dataclass(frozen=True)
class Setting:
    """One line of a recipe."""

    name: str
    kind: str
    default: str
    meaning: str


def all_settings() -> dict[str, list[Setting]]:
    """Section -> its settings, in the order of a recipe."""
    from transformerfam.training import recipe, settings

    found: dict[str, list[Setting]] = {}
    for section, cls in recipe.SECTIONS.items():
        found[section] = _of(section, cls)
        if section == "data":
            found[_SOURCES] = _of(_SOURCES, settings.SourceSettings)
    return found


def meaning_of_section(section: str) -> str:
    """What a section is about, in one sentence."""
    from transformerfam.training import recipe, settings

    if section == "fam":
        return "The geometry: blocks, windows and the feedback memory."
    cls: Any = settings.SourceSettings if section == _SOURCES else recipe.SECTIONS[section]
    return str(cls.__doc__).strip()


def heading(section: str) -> str:
    """How a section begins in a file."""
    return f"[[{section}]]" if section == _SOURCES else f"[{section}]"


def as_text(width: int) -> str:
    """All settings for a terminal of `width` columns."""
    indent = " " * 6
    fill = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    lines = []
    for section, found in all_settings().items():
        lines += [f"{heading(section)}  {meaning_of_section(section)}"]
        for setting in found:
            lines.append(f"  {setting.name} = {setting.default}   {setting.kind}")
            lines += fill.wrap(setting.meaning)
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown() -> str:
    """All settings as tables, one for each section."""
    parts = []
    for section, found in all_settings().items():
        rows = [
            [f"`{s.name}`", f"`{s.default}`".replace("`–`", "–"), s.kind, s.meaning] for s in found
        ]
        table = report.markdown_table(["setting", "default", "type", "meaning"], rows)
        parts.append(f"### `{heading(section)}`\n\n{meaning_of_section(section)}\n\n{table}\n")
    return "\n".join(parts).rstrip()


def _of(section: str, cls: type[Any]) -> list[Setting]:
    from transformerfam.training import recipe, values

    hints = values.field_types(cls)
    found = []
    for field in fields(cls):
        if (section, field.name) == ("data", "sources"):
            continue
        default = recipe.default_value(section, field.name)
        shown = "–" if default is None else values.toml_value(default)
        meaning = field.metadata.get("meaning") or GEOMETRY[field.name][1]
        found.append(Setting(field.name, values.kind(hints[field.name]), shown, meaning))
    return found
