"""What a person can get wrong, told in one sentence. Knows no torch."""

from __future__ import annotations


class UserError(Exception):
    """What the user gave cannot be used; the message is one sentence, written for the user.

    The base of `ModelError`, `UnsupportedModelError`, `MemoryFileError` and `MissingExtraError`, which
    are what Python would raise there too (a ValueError, an ImportError).
    """


def reason_of(error: Exception) -> str:
    """What the operating system says of a failure, as a part of a sentence."""
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()
