"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import settings

os.environ.pop("TERM", None)  # a dumb one is told of progress in another way
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")
pytest.register_assert_rewrite("command_line")

from command_line import book, fam, folder, processes  # noqa: E402
from families import FAMILIES  # noqa: E402
from variants import VARIANTS  # noqa: E402

__all__ = ["book", "fam", "folder", "processes"]

# With these, of every kind of layer and memory, a test is quick; with the others it is a slow one.
QUICK_VARIANTS = {
    *("paper", "bswa with sinks", "static prefix", "float, query at block end", "cap per slot"),
    *("rms of 3", "fam bias", "xl with sinks", "longformer", "bigbird", "stopped gradient"),
    *("feedback segments", "compressive, delta"),
}
QUICK_FAMILIES = {"Cohere 2", "GPT-NeoX", "Gemma 2", "gpt-oss", "Llama", "Phi-3", "Qwen3-MoE"}
# What the whole rests on is shown with all of them.
WITH_ALL = {
    "test_logits_and_every_fam_equal_the_oracle",
    "test_feedback_off_and_a_window_that_holds_all_is_the_original",
}


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: Sequence[pytest.Function]) -> None:
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        name, family = values.get("name"), values.get("family")
        others = (name in VARIANTS and name not in QUICK_VARIANTS) or (
            family in FAMILIES and family not in QUICK_FAMILIES
        )
        if others and item.originalname not in WITH_ALL:
            item.add_marker(pytest.mark.slow)
