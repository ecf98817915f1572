"""Packages that not everybody needs: imported when used, and asked for by name when missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from transformerfam.errors import UserError


class MissingExtraError(UserError, ImportError):
    """A package of an extra is not installed; the message names the command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which belongs to the extra `extra` of this package.

    Raises:
        MissingExtraError: if its package is not installed. A package that is there and fails to
            import raises what it raises: installing it again would not help.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"This needs {package}; install it with: pip install 'transformerfam[{extra}]'"
        ) from None
