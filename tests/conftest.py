"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("command_line")

from command_line import book, fam, folder, processes  # noqa: E402

__all__ = ["book", "fam", "folder", "processes"]
