"""Ways to refuse a setting, each in one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformerfam.errors import UserError


def refuse_unless(holds: bool, sentence: str) -> None:
    """Raises UserError with that sentence unless something holds."""
    if not holds:
        raise UserError(sentence)


def at_least(least: float, section: str, settings: Any, names: Iterable[str]) -> None:
    """Refuse settings of a section that are less."""
    for name in names:
        value = getattr(settings, name)
        refuse_unless(value >= least, f"{section}.{name} must be at least {least}, not {value}.")


def above_zero(section: str, settings: Any, names: Iterable[str]) -> None:
    """Refuse settings of a section that are 0 or less."""
    for name in names:
        value = getattr(settings, name)
        refuse_unless(value > 0, f"{section}.{name} must be above 0, not {value}.")


def probability(section: str, settings: Any, name: str) -> None:
    """Refuse a setting that is not from 0 to 1."""
    value = getattr(settings, name)
    refuse_unless(
        0 <= value <= 1, f"{section}.{name} is a probability, from 0 to 1, and cannot be {value}."
    )


def ascending(key: str, lengths: Sequence[int]) -> None:
    """Refuse lengths that do not rise, or are less than a token."""
    refuse_unless(
        all(n >= 1 for n in lengths) and list(lengths) == sorted(lengths),
        f"{key} must be lengths in tokens in ascending order, not {list(lengths)}.",
    )


def place(key: str, where: str | float) -> None:
    """Where a pass key stands."""
    good = where in ("start", "anywhere") if isinstance(where, str) else 0 <= where <= 1
    refuse_unless(good, f"{key} must be start, anywhere, or a depth from 0 to 1, not {where}.")
