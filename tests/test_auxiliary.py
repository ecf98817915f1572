"""Auxiliary losses against loops over rows and queries, and what they do in a step of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, converted, some_tokens, tiny
from oracle import Key as OracleKey
from oracle import attend, fam_keys, make_exact, oracle, project
from test_steps import B, assert_same, batch, gradients, recipe, stepper
from torch import Tensor

from transformerfam import FamConfig, convert
from transformerfam.auxiliary import FeedbackLosses
from transformerfam.errors import UserError
from transformerfam.training.batches import Batch

CONFIG = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=1)
BOTH: dict[str, Any] = {"diversity_weight": 3.0, "reconstruction_weight": 20.0}


def exact(config: FamConfig = CONFIG) -> Any:
    return convert(make_exact(tiny()), config)


def alike(fam: Tensor) -> Tensor:
    """D of F (N, d), pair by pair."""
    pairs = [
        (a @ b / (a.norm() * b.norm())) ** 2
        for i, a in enumerate(fam)
        for j, b in enumerate(fam)
        if i != j
    ]
    return torch.stack(pairs).mean()


def unlike_block(model: Any, depth: int, hidden: Tensor, fam: Tensor, block: int) -> Tensor:
    """R of one layer and block, query by query; hidden (B, d) enters the layer."""
    layer = model.model.layers[depth]
    queries, keys, values = (x.detach() for x in project(layer, hidden))
    own = [OracleKey(keys[i], values[i], block * B + i) for i in range(B)]
    of_fam = fam_keys(model, model.fam_config, layer, fam, block, 0)
    differences = []
    for i in range(B):
        found = attend(model, layer, queries[i], block * B + i, of_fam)
        wanted = attend(model, layer, queries[i], block * B + i, own)
        differences.append((found - wanted.detach()) ** 2)
    return torch.stack(differences).mean()


def plain(model: Any, ids: Tensor, weights: FeedbackLosses) -> Tensor:
    """The total of one row of whole blocks, by the formulas and the oracle's F."""
    fams = oracle(model, model.fam_config, ids, model.model.fam_prompt.weight).fams
    with torch.no_grad():
        entering = model(ids[None], output_hidden_states=True).hidden_states
    found = []
    for block, of_layers in enumerate(fams):
        for depth, fam in enumerate(of_layers):
            hidden = entering[depth][0, block * B : (block + 1) * B]
            found.append(
                weights.diversity * alike(fam)
                + weights.reconstruction * unlike_block(model, depth, hidden, fam, block)
            )
    return torch.stack(found).mean()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (2.0, 5.0)], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"fam_position": "zero"}, {"fam_query": "static"}], ids=str
)
def test_losses_and_gradients_are_those_of_the_formulas(
    weights: tuple[float, float], changes: dict[str, Any]
) -> None:
    model = exact(CONFIG.replace(**changes))
    ids = some_tokens(1, 3 * B)
    losses = FeedbackLosses(*weights)
    model(ids, use_cache=False, fam_losses=losses)
    total = losses.total()
    total.sum().backward()
    ours = gradients(model)
    expected = plain(model, ids[0], losses)
    torch.testing.assert_close(total, expected[None], rtol=1e-7, atol=0)
    expected.backward()
    theirs = gradients(model)
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-6 * float(theirs[name].abs().max())
        )


def test_rows_of_a_ragged_batch_have_the_losses_that_they_have_alone() -> None:
    model = exact()
    ids = some_tokens(3, 3 * B)
    mask = torch.ones(3, 3 * B, dtype=torch.long)
    mask[1, :5], mask[2, B - 1 :] = 0, 0
    with torch.no_grad():
        together = FeedbackLosses(1.0, 1.0)
        model(ids, attention_mask=mask, use_cache=False, fam_losses=together)
        for row in range(2):
            alone = FeedbackLosses(1.0, 1.0)
            model(ids[row : row + 1, mask[row].bool()], use_cache=False, fam_losses=alone)
            torch.testing.assert_close(together.total()[row : row + 1], alone.total())
    assert float(together.total()[2]) == 0  # it finished no block


def test_a_call_that_finishes_no_block_adds_nothing() -> None:
    losses = FeedbackLosses(1.0, 1.0)
    exact()(some_tokens(1, B - 1), fam_losses=losses)
    assert float(losses.total()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_them_down(family: str) -> None:
    model: Any = converted(CONFIG, family, torch.float32)
    losses = FeedbackLosses(1.0, 1.0)
    with torch.no_grad():
        model(some_tokens(1, B), use_cache=False, fam_losses=losses)
    assert losses.total().shape == (1,)
    assert float(losses.total()) > 0


# ---- in a step of training


@pytest.mark.parametrize("depth", [0, 2])
def test_checkpointing_changes_no_gradient_and_truncation_cuts_it(depth: int) -> None:
    ids = some_tokens(2, 4 * B + 1)
    found = []
    for checkpointing in (False, True):
        one = stepper(recipe(bptt_blocks=depth, **BOTH))
        if checkpointing:
            one.base.activation_checkpointing_enable()
        one.run(0, [batch(ids)])
        found.append(gradients(one.base))
    assert_same(*found)
    without = stepper(recipe(bptt_blocks=depth))
    without.run(0, [batch(ids)])
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.allclose(found[0][name], gradients(without.base)[name], rtol=1e-3)


def test_a_step_adds_them_row_by_row_to_the_mean_loss() -> None:
    ids = some_tokens(2, 3 * B + 1)
    weights = torch.ones(2, 3 * B)
    weights[0, : 2 * B] = 0.0
    one, other = stepper(recipe(**BOTH)), stepper(recipe())
    told = one.run(0, [batch(ids, weights)])
    assert told == pytest.approx(other.run(0, [batch(ids, weights)]), rel=1e-9)  # it is left out
    model = stepper(recipe()).base
    losses = FeedbackLosses(BOTH["diversity_weight"], BOTH["reconstruction_weight"])
    logits = model(ids[:, :-1], use_cache=False, fam_losses=losses).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    of_rows = weights.sum(1) * losses.total()
    (((each * weights.flatten()).sum() + of_rows.sum()) / weights.sum()).backward()
    whole = gradients(one.base)
    assert_same(whole, gradients(model))
    parts = stepper(recipe(**BOTH))
    parts.run(0, [batch(ids[:1], weights[:1]), batch(ids[1:], weights[1:])])
    assert_same(gradients(parts.base), whole)


def test_what_fills_up_a_row_has_no_part_in_them() -> None:
    ids = some_tokens(2, 3 * B + 1)
    filled_up, alone = stepper(recipe(**BOTH)), stepper(recipe(**BOTH))
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    weights, valid = torch.ones(2, 3 * B), torch.ones(2, 3 * B, dtype=torch.bool)
    inputs[0, B + 2 :], weights[0, B + 2 :], valid[0, B + 2 :] = 0, 0, False
    filled_up.run(0, [Batch(inputs, targets, weights, valid, (True, True))])
    alone.run(0, [batch(ids[:1, : B + 3]), batch(ids[1:])])
    assert_same(gradients(filled_up.base), gradients(alone.base))


def test_without_weights_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("computed for nothing")

    monkeypatch.setattr("transformerfam.training.steps.FeedbackLosses", never)
    stepper(recipe()).run(0, [batch(some_tokens(1, B + 1))])
    without = recipe(fam={"fam_length": 0}, **BOTH)
    stepper(without).run(0, [batch(some_tokens(1, B + 1))])


def test_refuses_weights_that_mean_nothing() -> None:
    with pytest.raises(UserError, match="diversity_weight must be at least 0"):
        recipe(diversity_weight=-1.0)
    with pytest.raises(UserError, match=r'under fam\.recurrence="rmt" there is none'):
        recipe(fam={"recurrence": "rmt", "memory_segments": 0}, reconstruction_weight=1.0)
    with pytest.raises(UserError, match="fam_length=1 has only one"):
        recipe(fam={"fam_length": 1}, diversity_weight=1.0)
