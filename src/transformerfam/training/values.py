"""Plain values, as a TOML file or a command line gives them, to dataclasses of settings and back.

Goes by the fields' annotations and names a key as a person writes it, `data.sources.0.path`. Knows
no setting by name, and not what settings mean together.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from transformerfam.errors import UserError
from transformerfam.extras import require

T = TypeVar("T")


class Given(str):
    """What stands behind the `=` of KEY=VALUE on a command line; its key says how to read it."""


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text.

    Raises:
        ValueError: if it is none.
    """
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    values: dict[str, Any] = toml.loads(text)
    return values


# ---- values to settings


def settings_from(cls: type[T], values: Any, key: str) -> T:
    """A dataclass from a table of plain values.

    Args:
        cls: the dataclass. What it raises as ValueError is told with the key.
        values: its fields by name; a field that is left out has its default.
        key: what the table is called in messages.

    Raises:
        UserError: for a key that there is not, with the nearest one, and for a wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{key} must be a table of settings, not {_shown(values)}.")
    hints = field_types(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"There is no setting {key}.{name}{nearest(name, hints)}.")
    given = {name: converted(value, hints[name], f"{key}.{name}") for name, value in values.items()}
    try:
        return cls(**given)
    except ValueError as error:
        raise UserError(f"[{key}] cannot be used: {error}") from None


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The annotations of a dataclass by the names of its fields."""
    hints = _hints(cls)  # type: ignore[arg-type]  # a class can be hashed
    return {field.name: hints[field.name] for field in fields(cls)}


_hints = cache(get_type_hints)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` without its question mark, or all names where none is near."""
    names = list(names)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; perhaps {close[0]} is meant" if close else f"; there are {', '.join(names)}"


def converted(value: Any, hint: Any, key: str) -> Any:
    """`value` as a field of type `hint` holds it.

    Raises:
        UserError: if it is of another type; the sentence names `key`.
    """
    if isinstance(value, Given):
        value = _read_given(value, hint)
    for option in _options(hint):
        reader = _reader(option, key)
        if reader is not None and (found := reader(value)) is not None:
            return found
    raise UserError(f"{key} must be {kind(hint)}, not {_shown(value)}.")


def kind(hint: Any) -> str:
    """A type in words: `a whole number`, `one of a, b`."""
    return " or ".join(_kind(option) for option in _options(hint))


def _options(hint: Any) -> list[Any]:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [option for option in options if option is not type(None)]


def _kind(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        return f"a list of {'tables' if is_dataclass(of) else _kind(of).split()[-1] + 's'}"
    return names[hint]


def _reader(hint: Any, key: str) -> Callable[[Any], Any] | None:
    """A function that gives a value as `hint` holds it, or None if it is of another type."""

    def sequence(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return None
        of = get_args(hint)[0]
        if is_dataclass(of):
            assert isinstance(of, type)
            return tuple(settings_from(of, v, f"{key}.{i}") for i, v in enumerate(value))
        return tuple(converted(v, of, key) for v in value)

    if get_origin(hint) is tuple:
        return sequence
    if get_origin(hint) is Literal:
        # Strings only: 1 is in ("a", True), and a list cannot be looked for.
        return lambda v: str(v) if isinstance(v, str) and v in get_args(hint) else None
    readers: dict[Any, Callable[[Any], Any]] = {
        bool: lambda v: v if isinstance(v, bool) else None,
        int: lambda v: v if isinstance(v, int) and not isinstance(v, bool) else None,
        float: _float,
        str: lambda v: str(v) if isinstance(v, str) else None,
    }
    return readers[hint]


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def _read_given(text: str, hint: Any) -> Any:
    """A value of a command line: TOML, else a bare word. Lists may come without brackets."""
    options = _options(hint)
    value = _toml_value(text)
    lists = any(get_origin(option) is tuple for option in options)
    # One number alone is a list only where nothing but a list can stand.
    if lists and not isinstance(value, list) and ("," in text or len(options) == 1):
        value = _toml_value(f"[{text}]")
        if value is None:
            value = [part.strip() for part in text.split(",")]
    if value is None or (options == [str] and not isinstance(value, str)):
        return str(text)
    return value


def _toml_value(text: str) -> Any:
    """The value that TOML reads in a text, or None."""
    try:
        found = parse_toml(f"value = {text}")
    except ValueError:
        return None
    return found["value"] if set(found) == {"value"} else None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "a table"
    return str(list(value) if isinstance(value, tuple) else value)


# ---- settings to values


def plain_values(settings: Any) -> dict[str, Any]:
    """A dataclass as TOML could hold it: lists for tuples, and no key for what is None."""
    return {
        field.name: _plain(getattr(settings, field.name))
        for field in fields(settings)
        if getattr(settings, field.name) is not None
    }


def default_of(cls: type[Any], name: str) -> Any:
    """The default of a field of a dataclass; None where it has none."""
    found = next(field.default for field in fields(cls) if field.name == name)
    return None if found is MISSING else found


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return plain_values(value) if is_dataclass(value) else value


def toml_value(value: Any) -> str:
    """A plain value in TOML's spelling."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, save for one character that TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    assert isinstance(value, (int, float))
    return repr(value)


def toml_table(heading: str, values: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """A heading and the lines of a table of values that are no tables."""
    lines = [f"{name} = {toml_value(v)}" for name, v in values.items() if name not in skip]
    return "\n".join([heading, *lines]) + "\n"
