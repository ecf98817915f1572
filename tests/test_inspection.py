"""A look inside the memory: what is told is what was computed, and looking changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, converted, some_tokens, tiny
from torch import Tensor
from variants import VARIANTS

from transformerfam import FamConfig, Memory, convert, read
from transformerfam.attention import AttentionMask, AttentionStyle, attend, attention_weights
from transformerfam.call import Attended, Read, Written
from transformerfam.errors import UserError
from transformerfam.inspection import (
    STRONGEST,
    Inspection,
    inspect_stream,
    key_names,
    map_grid,
    spread,
)

CONFIG = FamConfig(block_size=6, memory_segments=1, fam_length=3, sink_tokens=2)
WITH_FEEDBACK = [
    name
    for name, config in VARIANTS.items()
    if config.has_feedback and config.backend != "flex"  # on a CPU it is the same as eager
]
TOKENS = some_tokens(1, 23)[0].tolist()  # three blocks of 6 and five more


def model_of(config: FamConfig = CONFIG, family: str = "Llama", **changes: Any) -> Any:
    return convert(tiny(family, **changes), config, prompt="vocabulary")


def attentions(model: Any, tokens: list[int], chunk_tokens: int) -> list[Attended]:
    seen = told(model, tokens, chunk_tokens)
    return [one for one in seen if isinstance(one, Attended)]


def told(model: Any, tokens: list[int], chunk_tokens: int) -> list[Attended | Read | Written]:
    seen: list[Attended | Read | Written] = []
    for _ in read(model, tokens, chunk_tokens=chunk_tokens, observer=seen.append):
        pass
    return seen


# ---- the observer


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_weights_times_values_are_what_attention_gave(name: str) -> None:
    """For all blocks at once, for one at a time, and for pieces of blocks."""
    for chunk_tokens in (23, 6, 4):
        for seen in attentions(model_of(VARIANTS[name]), TOKENS, chunk_tokens):
            weights = seen.weights()
            groups = weights.shape[1] // seen.value.shape[1]
            values = seen.value.repeat_interleave(groups, dim=1)
            torch.testing.assert_close(weights @ values, seen.output, rtol=0, atol=1e-12)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_what_the_plan_hides_has_no_weight_and_what_it_shows_has_some(name: str) -> None:
    for seen in attentions(model_of(VARIANTS[name]), TOKENS, 23):
        if seen.block is None:
            visible = seen.plan.visible(None).expand(len(seen.query), *seen.weights().shape[1:])
            assert torch.equal(seen.weights() > 0, visible)
        else:
            assert (seen.weights() > 0).all()


def test_the_observer_is_told_of_every_layer_and_block() -> None:
    seen = attentions(model_of(), TOKENS, 23)
    expected = [(layer, block) for layer in range(3) for block in (0, 1, 2, None)]
    assert [(s.layer, s.block) for s in seen] == expected


@pytest.mark.parametrize("chunk_tokens", [23, 6, 4])
def test_it_is_told_what_each_block_has_left(chunk_tokens: int) -> None:
    model = model_of()
    seen = [s for s in told(model, TOKENS, chunk_tokens) if isinstance(s, Written)]
    for layer in range(3):
        written = [s.fam for s in seen if s.layer == layer]
        assert len(written) == 3
        for blocks, fam in enumerate(written, start=1):
            memory = Memory.for_model(model)
            for _ in read(model, TOKENS[: blocks * 6], memory):
                pass
            torch.testing.assert_close(fam, memory.fams[layer])


@pytest.mark.parametrize("name", ["feedback segments", "compressive", "bswa"])
def test_it_is_told_of_other_memories_of_past_blocks(name: str) -> None:
    """Whoever looks at attention sees as many queries of each layer as tokens were read."""
    seen = attentions(model_of(VARIANTS[name]), TOKENS[:18], 18)
    for layer in range(3):
        outputs = [s.output for s in seen if s.layer == layer and s.block is None]
        assert sum(len(output) * output.shape[2] for output in outputs) == 18
    assert len(seen) == 3 * (3 if name == "feedback segments" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observer_changes_nothing_in_any_family(family: str) -> None:
    model = model_of(family=family, dtype=torch.float32)  # experts know no float64
    ids = torch.tensor([TOKENS])
    before = copy.deepcopy(vars(model.get_decoder().layers[0]))
    seen: list[Attended | Read | Written] = []
    watched = Memory.for_model(model)
    with torch.no_grad():
        plain = model(ids).logits
        told = model(ids, past_key_values=watched, fam_observer=seen.append).logits
        again = model(ids).logits
    assert seen and torch.equal(plain, told) and torch.equal(plain, again)
    assert vars(model.get_decoder().layers[0]).keys() == before.keys()


def test_weights_are_those_of_every_backend() -> None:
    """A soft cap, a sink logit, a mask with a bias; two query heads to a key head."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 4, dtype=torch.float64) for heads in (4, 2))
    seen = torch.rand(2, 1, 5, 5) < 0.6
    seen[..., 0] = True
    mask = AttentionMask(seen, bias=torch.randn(5, dtype=torch.float64))
    # With the identity for values, what comes out is the weights.
    identity = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    for style in (
        AttentionStyle(0.5),
        AttentionStyle(0.5, softcap=0.8),
        AttentionStyle(0.5, sink_logits=torch.randn(4, dtype=torch.float64)),
    ):
        weights = attention_weights(q, k, mask, style)
        torch.testing.assert_close(weights, attend(q, k, identity, mask, style, "sdpa"))


def test_regions_of_the_plan_are_where_the_mask_lets_them_be_seen() -> None:
    config = CONFIG.replace(previous_fams=2)
    last = [s for s in attentions(model_of(config), TOKENS, 6) if s.block is None][-1]
    names, regions = key_names(last.plan), last.plan.key_regions
    assert {r: s.stop - s.start for r, s in regions.items()} == {
        "past": 6,
        "anchors": 2,
        "fams": 6,
        "own": 5,
    }
    assert names.tolist() == [*range(12, 18), 0, 1, *range(-1, -7, -1), *range(18, 23)]
    assert len(names) == last.key.shape[2]


# ---- what is told of a stream


def shown(config: FamConfig = CONFIG, **options: Any) -> tuple[Any, Inspection]:
    model = model_of(config)
    return model, inspect_stream(model, TOKENS, **options)


def test_shares_are_sums_of_weights_and_make_one() -> None:
    model, found = shown()
    seen = attentions(model, TOKENS, 6)
    for layer in found.layers:
        torch.testing.assert_close(layer.shares.sum(1), torch.ones(23))
        tokens = [s for s in seen if s.layer == layer.layer and s.block is None]
        for name, column in zip(("past", "anchors", "fams", "own"), layer.shares.T, strict=True):
            by_hand = torch.cat(
                [s.weights()[0][:, :, s.plan.key_regions[name]].sum(-1).mean(0) for s in tokens]
            )
            torch.testing.assert_close(column, by_hand.float())
        fam = layer.shares[:, 2]
        torch.testing.assert_close(layer.read_by_slot.sum(1), fam)
        torch.testing.assert_close(layer.read_by_head.mean(1), fam)
        assert not layer.shares[:6, [0, 2]].any()  # block 0 has neither past nor FAM
        assert layer.shares[6:, 2].all()


def test_writing_is_the_attention_of_fam_queries() -> None:
    model, found = shown()
    seen = attentions(model, TOKENS, 23)
    for layer in found.layers:
        writers = [s.weights()[0] for s in seen if s.layer == layer.layer and s.block is not None]
        by_slot = torch.cat([w[:, :, 3:].mean(0).T for w in writers]).float()
        torch.testing.assert_close(layer.written_by_slot, by_slot)
        per_block = layer.written_by_slot.unflatten(0, (3, 6)).sum(1)
        torch.testing.assert_close(per_block + layer.kept, torch.ones(3, 3))
        torch.testing.assert_close(
            layer.written_by_head.mean(1), layer.written_by_slot.mean(1), rtol=1e-4, atol=1e-6
        )


def test_norms_are_those_of_the_memorys_fams() -> None:
    model, found = shown()
    memory, states = Memory.for_model(model), []
    for start in range(0, 18, 6):
        for _ in read(model, TOKENS[start : start + 6], memory):
            states.append([fam[0].clone() for fam in memory.fams if fam is not None])
    for index, layer in enumerate(found.layers):
        for τ in range(3):
            for slot in range(3):
                now = states[τ][index][slot]
                rms = float((now @ now / len(now)) ** 0.5)
                assert float(layer.rms[τ, slot]) == pytest.approx(rms, rel=1e-6)
                if τ:
                    before = states[τ - 1][index][slot]
                    step = now - before
                    size = float((step @ step / len(step)) ** 0.5)
                    cosine = float(now @ before / (now.norm() * before.norm()))
                    assert float(layer.change[τ, slot]) == pytest.approx(size, rel=1e-6)
                    assert float(layer.cosine[τ, slot]) == pytest.approx(cosine, rel=1e-6)
        assert layer.change[0].isnan().all() and layer.cosine[0].isnan().all()


def test_losses_are_those_of_reading_with_and_without_feedback() -> None:
    model, found = shown()
    plain = converted(CONFIG.without_feedback())
    for losses, reader in ((found.losses, model), (found.losses_without, plain)):
        assert losses is not None and losses[0].isnan()
        expected = torch.cat([chunk.losses for chunk in read(reader, TOKENS)])
        torch.testing.assert_close(losses[1:], expected)
    # No token of block 0 sees a FAM.
    assert found.losses_without is not None
    torch.testing.assert_close(found.losses[1:7], found.losses_without[1:7])
    assert not torch.allclose(found.losses[7:], found.losses_without[7:])
    assert shown(baseline=False)[1].losses_without is None


def test_the_strongest_keys_are_the_largest_weights() -> None:
    model, found = shown()
    tokens = [s for s in attentions(model, TOKENS, 6) if s.layer == 1 and s.block is None]
    mean, names = tokens[2].weights()[0].mean(0), key_names(tokens[2].plan)
    for row, place in ((mean[4], 16), (mean[0], 12)):
        order = row.argsort(descending=True)[:STRONGEST]
        assert found.layers[1].strongest[place].tolist() == names[order].tolist()
        torch.testing.assert_close(found.layers[1].strongest_weights[place], row[order].float())


# ---- maps


def test_a_map_of_single_tokens_holds_the_weights() -> None:
    model, found = shown()
    seen = [s for s in attentions(model, TOKENS, 6) if s.layer == 2]
    tokens = [s for s in seen if s.block is None][1].weights()[0].float()
    fam = [s for s in seen if s.block is not None][1].weights()[0].float()
    drawn = found.layers[2].maps[1]
    assert found.grid.cell == 1
    assert found.map_keys[1] == {"past": 6, "anchors": 2, "fams": 3, "own": 6}
    torch.testing.assert_close(drawn[:, :6], tokens)
    torch.testing.assert_close(drawn[:, 6:, 8:], fam)
    assert not drawn[:, 6:, :8].any()


def test_coarse_maps_are_sums_over_keys_and_means_over_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = shown()[1]
    monkeypatch.setattr("transformerfam.inspection._BLOCK_CELLS", 2)
    coarse = shown()[1]
    assert coarse.grid.cell == 4
    assert coarse.map_keys[2] == {"past": 2, "anchors": 2, "fams": 3, "own": 2}

    def joined(x: Tensor, parts: list[list[int]]) -> Tensor:
        return torch.stack([x[:, :, part].sum(-1) for part in parts], dim=-1)

    keys = [[0, 1, 2, 3], [4, 5], [6], [7], [8], [9], [10], [11, 12, 13, 14], [15, 16]]
    whole = joined(fine.layers[0].maps[2], keys)
    expected = torch.cat(
        [whole[:, :4].mean(1, True), whole[:, 4:6].mean(1, True), whole[:, 6:]], dim=1
    )
    torch.testing.assert_close(coarse.layers[0].maps[2], expected)


def test_maps_stay_within_their_cells_and_there_is_always_one() -> None:
    wide = FamConfig(block_size=1024, memory_segments=3, fam_length=64)
    for config, blocks, maps in ((wide, 8, 54), (wide, 100, 32 * 40), (CONFIG, 3, 12)):
        grid = map_grid(config, blocks, maps)
        assert grid.blocks and grid.blocks[-1] == blocks - 1
        assert config.block_size / grid.cell <= 128
    assert spread(30, 6) == (0, 6, 12, 17, 23, 29)
    assert spread(2, 6) == (0, 1)
    assert spread(9, 1) == (8,)


# ---- refusals


def test_what_cannot_be_inspected_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="no feedback memory to look into"):
        shown(CONFIG.without_feedback())
    stack = FamConfig(block_size=6, memory_segments=0, fam_length=3, recurrence="rmt")
    with pytest.raises(UserError, match=r"recurrence='rmt' memory runs .* --recurrence layer\.$"):
        shown(stack)
    for change, option in (
        (
            {"memory_source": "output"},
            r"\(FM\) has no slots to look into; take --memory-source input",
        ),
        (
            {"compressive_memory": "delta"},
            r"\(Infini-attention\) has no slots .* --compressive-memory none",
        ),
    ):
        with pytest.raises(UserError, match=option):
            shown(CONFIG.without_feedback().replace(**change))
    with pytest.raises(UserError, match=r"has 5 tokens, less than one block of 6"):
        inspect_stream(model_of(), TOKENS[:5])
    for layers in ([3], [-1], []):
        with pytest.raises(UserError, match="layers of this model are 0 to 2"):
            shown(layers=layers)


def test_layers_can_be_chosen() -> None:
    assert [layer.layer for layer in shown(layers=[2, 0])[1].layers] == [0, 2]
    assert [layer.layer for layer in shown()[1].layers] == [0, 1, 2]
