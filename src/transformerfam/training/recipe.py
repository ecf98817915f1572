"""A recipe: everything that a training run can be told, as a TOML file and as a value.

Knows the sections by name and where shipped recipes are; what settings mean together is in
`checks`. Brings no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformerfam.config import OF_FEEDBACK, FamConfig
from transformerfam.errors import UserError, reason_of
from transformerfam.training import checks, values
from transformerfam.training.settings import (
    DataSettings,
    FeedbackSettings,
    ModelSettings,
    OptimizerSettings,
    ProbeSettings,
    ReplaySettings,
    RunSettings,
    SourceSettings,
    TrainSettings,
)

_SOURCES = "sources"
# Settings of a geometry that cannot be set without FAM.
_OF_FAM = (*OF_FEEDBACK, "feedback_rms", "adapted")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Two that are equal describe the same run.

    Raises:
        UserError: for settings that cannot work together, with the reason.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    fam: FamConfig = field(default_factory=FamConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    run: RunSettings = field(default_factory=RunSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)

    def __post_init__(self) -> None:
        checks.check(self)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a TOML file.

        Args:
            path: the file.
            overrides: `section.key=VALUE`, which count more than the file. VALUE is written as in
                TOML; a word without quotes is a text, and a list may go without brackets.

        Raises:
            UserError: if there is no such file or setting, or a value cannot be used.
        """
        return cls.from_dict(changed(_read(Path(path)), overrides))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """The recipe of plain values: sections by name, in each its settings by name.

        Raises:
            UserError: for an unknown section or setting, or a value that cannot be used.
        """
        for name in table:
            if name not in SECTIONS:
                raise UserError(
                    f"A recipe has no section [{name}]{values.nearest(name, SECTIONS)}."
                )
        sections = {}
        for name, section in table.items():
            _check_place(name, section)
            sections[name] = values.settings_from(SECTIONS[name], section, name)
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and for `from_dict`."""
        return {name: values.plain_values(getattr(self, name)) for name in SECTIONS}

    def to_toml(self) -> str:
        """A recipe file with every setting that counts."""
        table = self.to_dict()
        sources = table["data"].pop(_SOURCES)
        parts = []
        for name, section in table.items():
            parts.append(values.toml_table(f"[{name}]", section))
            if name == "data":
                parts += [
                    values.toml_table(f"[[data.{_SOURCES}]]", s, checks.not_for(s["kind"]))
                    for s in sources
                ]
        return "\n".join(parts)

    def replace(self, **sections: Any) -> Recipe:
        """A copy with some sections exchanged, checked anew."""
        return replace(self, **sections)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSettings,
    "fam": FamConfig,
    "train": TrainSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "feedback": FeedbackSettings,
    "replay": ReplaySettings,
    "run": RunSettings,
    "probes": ProbeSettings,
}

_TABLES = {**SECTIONS, "data.sources": SourceSettings}


def default_value(section: str, name: str) -> Any:
    """What a setting is where the recipe does not say; `data.sources` is a section here."""
    return values.default_of(_TABLES[section], name)


# ---- recipes that come with the package


def shipped() -> dict[str, Path]:
    """The recipes of the package by name."""
    folder = Path(str(files("transformerfam"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        UserError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise UserError(
        f"There is no recipe file {name}, and none of that name comes with transformerfam; those "
        f"are {', '.join(known)}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return values.parse_toml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {reason_of(error)}.") from None
    except ValueError as error:  # no UTF-8, or no TOML
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{path} is no TOML file that can be read: {reason}.") from None


def _check_place(name: str, section: Any) -> None:
    """Name the section that a misplaced setting belongs to."""
    if not isinstance(section, Mapping):
        return
    own = values.field_types(SECTIONS[name])
    for key in section:
        homes = [other for other, cls in _TABLES.items() if key in values.field_types(cls)]
        if key not in own and homes:
            home = "[[data.sources]]" if homes[0] == "data.sources" else f"[{homes[0]}]"
            raise UserError(f"[{name}] has no setting {key}; it belongs into {home}.")


# ---- settings from the command line


def changed(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`table` with `section.key=VALUE` put in. VALUE stays a text, see `values.Given`.

    Raises:
        UserError: for what is not of that form, or leads nowhere.
    """
    result: dict[str, Any] = {k: _copied(v) for k, v in table.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2 or not all(path):
            raise UserError(f"{override!r} is no setting; write section.key=VALUE, run.steps=100.")
        _put(result, path, values.Given(text.strip()))
    fam = result.get("fam")
    if isinstance(fam, dict) and fam.get("fam_length") == values.Given("0"):
        # The baseline of a recipe: what it says of FAM says nothing then.
        for name in [n for n in _OF_FAM if not isinstance(fam.get(n), values.Given)]:
            fam.pop(name, None)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _put(table: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put `value` at `data.sources.0.path` and the like; the next number makes a new table."""
    place: Any = table
    for depth, name in enumerate(path[:-1]):
        shown = ".".join(path[: depth + 1])
        if isinstance(place, list):
            place = place[_index(name, place, shown)]
        else:
            inside: Any = [] if path[:depth] == ["data"] and name == _SOURCES else {}
            place = place.setdefault(name, inside)
        if not isinstance(place, (dict, list)):
            raise UserError(f"{shown} is no table of settings, so there is no {'.'.join(path)}.")
    if isinstance(place, list):
        raise UserError(
            f"{'.'.join(path[:-1])} is a list; write {'.'.join(path[:-1])}.0.KEY=VALUE."
        )
    place[path[-1]] = value


def _index(name: str, place: list[Any], shown: str) -> int:
    if not name.isdecimal() or int(name) > len(place):
        raise UserError(f"There is no {shown}; this recipe has {len(place)} sources, from 0.")
    if int(name) == len(place):
        place.append({})
    return int(name)
