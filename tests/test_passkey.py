"""The feedback memory learns: a toy model carries a key over blocks that no window spans.

Memory segments are 0, so FAM is the only way from the key to the answer.
"""

from __future__ import annotations

import pytest

from transformerfam.reproduction import experiment, toy
from transformerfam.reproduction.items import ITEMS


@pytest.mark.slow
def test_feedback_carries_a_key_over_blocks_and_windows_do_not() -> None:
    its = ITEMS["figure3a"].experiment
    ways = {planned.variant: planned.run for planned in experiment.plan(its, [0])}
    asked = toy.ToyPasskeys(its.shape)

    with_fam, _ = toy.trained({**ways["FAM"], "steps": 300})
    found = {n: toy.digit_accuracy(with_fam, asked, n, 32) for n in (2, 4, 6, 12)}
    print("FAM:", found)
    assert found[4] >= 0.95, found

    without, _ = toy.trained({**ways["M0"], "steps": 100})
    blind = toy.digit_accuracy(without, asked, 4, 32)
    print("windows alone:", blind)
    assert blind < 0.2
