"""The oracle held against facts that do not come from it.

Three sources: transformers' own Llama model; its own attention modules, run on token and FAM rows
laid side by side under a dense mask; and windows and a first update made by hand.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from oracle import OracleResult, make_exact, oracle
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from transformerfam.config import FamConfig

VOCAB, WIDTH = 50, 32
TIGHT = 1e-11  # for float64 where weights and logits are of the order of 1


def plain_llama(layers: int = 3, attention: str = "sdpa") -> Any:
    """A tiny random Llama in float32, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    model.set_attn_implementation(attention)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return model


@cache
def llama(layers: int = 3, attention: str = "sdpa") -> Any:
    """The same in float64 throughout. No test may change it."""
    return make_exact(plain_llama(layers, attention))


def text(length: int) -> Tensor:
    """Tokens that are all different, so that a token is known by its row of the embedding."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:length]


def prompt_rows(config: FamConfig) -> Tensor | None:
    """A prompt (N, d) in the scale of the embeddings; None without feedback."""
    if not config.has_feedback:
        return None
    rows = torch.randn(config.fam_length, WIDTH, generator=torch.Generator().manual_seed(2))
    return rows.double() * 0.25


def read(model: Any, config: FamConfig, ids: Tensor, start: int = 0) -> OracleResult:
    with torch.no_grad():
        return oracle(model, config, ids, prompt_rows(config), start)


def embedding_gradient(model: Any, value: Tensor, ids: Tensor) -> Tensor:
    """How much each token of the text, (T,), moves a value through its embedding."""
    table = model.model.embed_tokens.weight
    gradient: Tensor = torch.autograd.grad(value, table, retain_graph=True)[0]
    return gradient[ids].abs().amax(-1)


def additive(allowed: Tensor) -> Tensor:
    """(queries, keys) of booleans as transformers' 4D mask, (1, 1, queries, keys)."""
    closed = torch.finfo(torch.float64).min
    return torch.zeros(allowed.shape).double().masked_fill(~allowed, closed)[None, None]


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = TIGHT) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# ---- without feedback: transformers' model

BSWA = FamConfig.paper(fam_length=0, block_size=4, memory_segments=1)
FULL = FamConfig.paper(fam_length=0, block_size=8, attention="full")


@pytest.mark.parametrize(
    "config",
    [FULL, BSWA.replace(memory_segments=5), BSWA.replace(attention="swa", window=21)],
    ids=lambda config: config.attention,
)
def test_is_the_plain_model_when_the_window_covers_the_text(config: FamConfig) -> None:
    model, ids = llama(), text(21)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    result = read(model, config, ids)
    assert_close(result.logits, wanted)
    assert result.fams == []


def test_is_the_plain_model_in_its_own_float32() -> None:
    model, ids = plain_llama(), text(21)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    got = read(model, FULL, ids).logits
    assert got.dtype == torch.float32
    assert_close(got, wanted, 1e-4)


PATTERNS = {
    "full": FULL,
    "bswa": BSWA,
    "no past": BSWA.replace(memory_segments=0),
    "swa": BSWA.replace(attention="swa", window=3),
    "xl": BSWA.replace(attention="xl"),
    "longformer": BSWA.replace(attention="longformer", window=2, global_positions=(1, 7)),
}
# Each word is a query and each letter a key: two blocks of four tokens, and a half.
DRAWN = {
    "full": "x xx xxx xxxx xxxxx xxxxxx xxxxxxx xxxxxxxx xxxxxxxxx xxxxxxxxxx",
    "bswa": "x xx xxx xxxx xxxxx xxxxxx xxxxxxx xxxxxxxx ....xxxxx ....xxxxxx",
    "no past": "x xx xxx xxxx ....x ....xx ....xxx ....xxxx ........x ........xx",
    "swa": "x xx xxx .xxx ..xxx ...xxx ....xxx .....xxx ......xxx .......xxx",
    "xl": "x xx xxx xxxx .xxxx ..xxxx ...xxxx ....xxxx .....xxxx ......xxxx",
    "longformer": "x xx .xx .xxx .x.xx .x..xx .x...xx xxxxxxxx .x.....xx .x.....xxx",
}


def dense_pattern(config: FamConfig, length: int) -> Tensor:
    """Which token sees which, (length, length), by tensor arithmetic."""
    B, M = config.block_size, config.memory_segments
    t = torch.arange(length)
    behind = t[:, None] - t  # how far the key stands behind the query
    recent = (t // B)[:, None] - t // B <= M
    window = (behind < (config.window or M * B)) & (behind >= 0)
    special = torch.isin(t, torch.tensor(config.global_positions, dtype=torch.long))
    return {
        "full": behind >= 0,
        "bswa": (behind >= 0) & recent,
        "swa": window,
        "xl": window & recent,
        "longformer": window | ((special[:, None] | special) & (behind >= 0)),
    }[config.attention]


# transformers' eager attention takes its softmax in float32, hence the second tolerance.
@pytest.mark.parametrize("attention, tolerance", [("sdpa", TIGHT), ("eager", 1e-5)])
@pytest.mark.parametrize("name", PATTERNS)
def test_windows_are_those_drawn_by_hand(name: str, attention: str, tolerance: float) -> None:
    drawn = torch.tensor([[c == "x" for c in row.ljust(10)] for row in DRAWN[name].split()])
    assert torch.equal(dense_pattern(PATTERNS[name], 10), drawn)  # used further below
    model, ids = llama(attention=attention), text(10)
    with torch.no_grad():
        wanted = model(ids[None], attention_mask=additive(drawn)).logits[0]
    assert_close(read(model, PATTERNS[name], ids).logits, wanted, tolerance)


@pytest.mark.parametrize(
    "config",
    [
        BSWA.replace(block_size=5),
        BSWA.replace(memory_segments=2, attention="xl", window=9),
        BSWA.replace(block_size=8, attention="swa"),
        BSWA.replace(attention="longformer", window=5, global_positions=(0, 9, 10)),
    ],
    ids=lambda config: config.attention,
)
def test_longer_windows(config: FamConfig) -> None:
    model, ids = llama(), text(27)
    with torch.no_grad():
        wanted = model(ids[None], attention_mask=additive(dense_pattern(config, 27))).logits[0]
    assert_close(read(model, config, ids).logits, wanted)


SINKS = {  # and P, the tokens before a query's block that are kept
    "bswa": (BSWA.replace(sink_tokens=2), 4),
    "no past": (BSWA.replace(memory_segments=0, sink_tokens=4), 0),
    "swa": (BSWA.replace(attention="swa", window=6, sink_tokens=3), 8),
    "short swa": (BSWA.replace(block_size=8, attention="swa", window=3, sink_tokens=2), 8),
    "swa of one": (BSWA.replace(attention="swa", window=1, sink_tokens=2), 0),
    "xl": (BSWA.replace(memory_segments=2, attention="xl", window=5, sink_tokens=2), 8),
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks_stand_just_before_the_kept_past(name: str) -> None:
    # In a model of one layer a key depends on its token alone, so each query can be asked of
    # transformers by itself: the tokens that it sees, each with its position id.
    config, kept = SINKS[name]
    model, ids, S = llama(layers=1), text(18), config.sink_tokens
    pattern, got = dense_pattern(config, len(ids)), read(model, config, ids).logits
    used = 0
    for t in range(len(ids)):
        window = pattern[t].nonzero()[:, 0]
        sinks = (~pattern[t, : min(S, t + 1)]).nonzero()[:, 0]
        used += len(sinks)
        seen = torch.cat((ids[sinks], ids[window]))
        places = torch.cat((t - t % config.block_size - kept - S + sinks, window))[None]
        mask = additive(torch.ones(len(seen), len(seen), dtype=torch.bool))
        with torch.no_grad():
            logits = model(seen[None], position_ids=places, attention_mask=mask).logits
        assert_close(got[t], logits[0, -1])
    assert used > 0


# ---- with feedback: transformers' attention over rows laid side by side


def fam_places(config: FamConfig, block: int) -> Tensor:
    """Rotary positions of F_block, counted back from the first position of the next block."""
    N, next_block = config.fam_length, (block + 1) * config.block_size
    back = torch.arange(N, 0, -1).double()
    places = {"last": next_block - back, "float": next_block - back / (N + 1), "zero": 0 * back}
    return places[config.fam_position]


def side_by_side(
    model: Any, config: FamConfig, ids: Tensor, prompt: Tensor
) -> tuple[Tensor, list[list[Tensor]]]:
    """TransformerFAM by `LlamaAttention` on [tokens; sinks; FAMs; FAM input; FAM queries].

    Every layer sees the same rows as queries and as keys; a dense mask says who reads whom.
    """
    B, N, S, T = config.block_size, config.fam_length, config.sink_tokens, len(ids)
    layers, pattern = model.model.layers, dense_pattern(config, len(ids))
    inputs = [model.model.embed_tokens(ids), *(torch.empty(T, WIDTH).double() for _ in layers)]
    fams: list[list[Tensor]] = []
    for block in range(-(-T // B)):
        first, end = block * B, min(T, block * B + B)
        seen_fams = range(max(0, block - config.previous_fams), block)
        same = config.fam_query_position == "same"
        places = [torch.arange(end), first - config.memory_segments * B - S + torch.arange(S)]
        places += [fam_places(config, past) for past in (*seen_fams, block - 1, block - same)]
        own, sinks, older = slice(first, end), slice(end, end + S), slice(end + S, -2 * N)
        kf, qf = slice(-2 * N, -N), slice(-N, None)
        rotary = model.model.rotary_emb(inputs[0], torch.cat(places)[None])
        allowed = torch.eye(rotary[0].shape[1], dtype=torch.bool)  # the rest may see themselves
        allowed[own, :end] = pattern[own, :end]
        allowed[own, sinks] = ~pattern[own, :S] & (torch.arange(first, end)[:, None] >= S)
        allowed[own, older] = True
        allowed[qf] = False
        allowed[qf, kf] = allowed[qf, own] = True
        made: list[Tensor] = []
        for i, layer in enumerate(layers):
            before = fams[-1][i] if fams else made[i - 1] if made else prompt
            past = [fams[p][i] for p in seen_fams]
            rows = torch.cat([inputs[i][:end], inputs[i][:S], *past, before, before])
            normed = layer.input_layernorm(rows)[None]
            mixed = layer.self_attn(normed, rotary, additive(allowed))[0][0]
            if block == 0 and config.first_residual == "zero":
                rows[qf] = 0
            out = layer.mlp(layer.post_attention_layernorm(mixed + rows)) + mixed + rows
            inputs[i + 1][own] = out[own]
            scale = out[qf].pow(2).mean(-1, keepdim=True).sqrt()
            made.append(out[qf] / scale if config.feedback_norm == "rms" else out[qf])
        if end - first == B:
            fams.append(made)
    return model.lm_head(model.model.norm(inputs[-1])), fams


FAM = FamConfig.paper(block_size=4, memory_segments=1, fam_length=3)
FEEDBACK = {
    "default": FAM,
    "no past": FAM.replace(memory_segments=0),
    "B 8": FAM.replace(block_size=8, fam_length=8),
    "block_end": FAM.replace(fam_query_position="block_end"),
    "float": FAM.replace(fam_position="float"),
    "float, block_end": FAM.replace(fam_position="float", fam_query_position="block_end"),
    "zero": FAM.replace(fam_position="zero", fam_query_position="block_end"),
    "prompt": FAM.replace(first_residual="prompt"),
    "rms": FAM.replace(feedback_norm="rms"),
    "three FAMs": FAM.replace(previous_fams=3, memory_segments=0),
    "longer than a block": FAM.replace(fam_length=5, fam_position="float"),
    "sinks": FAM.replace(sink_tokens=2),
    "full": FAM.replace(attention="full"),
    "swa": FAM.replace(attention="swa", window=3),
    "xl": FAM.replace(attention="xl"),
    "longformer": FAM.replace(attention="longformer", window=2, global_positions=(1, 6)),
    "one token in a block": FAM.replace(block_size=1, fam_length=1, memory_segments=2),
}
every_variant = pytest.mark.parametrize("name", FEEDBACK)


@every_variant
def test_feedback_by_rows_side_by_side(name: str) -> None:
    config, model, ids = FEEDBACK[name], llama(), text(18)
    prompt = prompt_rows(config)
    assert prompt is not None
    with torch.no_grad():
        wanted_logits, wanted_fams = side_by_side(model, config, ids, prompt)
    result, tolerance = read(model, config, ids), 1e-5 if name == "rms" else TIGHT  # rms has an eps
    assert_close(result.logits, wanted_logits, tolerance)
    assert len(result.fams) == 18 // config.block_size
    for made, wanted in zip(result.fams, wanted_fams, strict=True):
        assert_close(torch.stack(made), torch.stack(wanted), tolerance)


@pytest.mark.parametrize("first_residual", ["zero", "prompt"])
@pytest.mark.parametrize("fam_query_position", ["same", "block_end"])
def test_first_update_by_hand(first_residual: Any, fam_query_position: Any) -> None:
    config = FAM.replace(first_residual=first_residual, fam_query_position=fam_query_position)
    model, ids, prompt = llama(layers=1), text(4), prompt_rows(config)
    assert prompt is not None
    layer, frequencies = model.model.layers[0], model.model.rotary_emb.inv_freq
    key_places = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]).double()
    query_places = {"same": key_places[:3], "block_end": key_places[-3:]}[fam_query_position]

    def turned(x: Tensor, places: Tensor) -> Tensor:  # (rows, heads, 8): four complex numbers each
        angle = places[:, None, None] * frequencies
        z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1).transpose(0, 1)

    with torch.no_grad():
        rows = layer.input_layernorm(torch.cat((prompt, model.model.embed_tokens(ids))))
        q = turned((rows[:3] @ layer.self_attn.q_proj.weight.T).view(3, 4, 8), query_places)
        k = turned((rows @ layer.self_attn.k_proj.weight.T).view(7, 2, 8), key_places)
        v = (rows @ layer.self_attn.v_proj.weight.T).view(7, 2, 8).transpose(0, 1)
        k, v = k[[0, 0, 1, 1]], v[[0, 0, 1, 1]]  # each pair of query heads shares a key head
        mixed = scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(3, 32)
        attended = mixed @ layer.self_attn.o_proj.weight.T
        if first_residual == "prompt":
            attended = attended + prompt
        wanted = layer.mlp(layer.post_attention_layernorm(attended)) + attended
    assert_close(read(model, config, ids).fams[0][0], wanted)


def test_first_block_reads_as_without_feedback() -> None:
    model, ids, without = llama(), text(8), FAM.without_feedback()
    difference = (read(model, FAM, ids).logits - read(model, without, ids).logits).abs().amax(-1)
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 1e-3).all()


def test_caps_of_the_feedback() -> None:
    # One layer and one block: what comes out is the unbounded F, rescaled where it is too large.
    model, ids = llama(layers=1), text(4)
    plain = read(model, FAM, ids).fams[0][0]
    rms = plain.pow(2).mean(-1, keepdim=True).sqrt()
    low, high = rms.min().item() / 2, rms.max().item() * 2
    below = read(model, FAM.replace(feedback_norm=high), ids).fams[0][0]
    above = read(model, FAM.replace(feedback_norm=low), ids).fams[0][0]
    mixed = read(model, FAM.replace(feedback_norm=(high, low, high)), ids).fams[0][0]
    assert torch.equal(below, plain)
    assert_close(above, plain * low / rms, 1e-5)  # the root mean square has an eps
    assert torch.equal(mixed, torch.stack([plain[0], above[1], plain[2]]))


# ---- properties


@every_variant
def test_a_token_changes_nothing_before_it(name: str) -> None:
    config, model = FEEDBACK[name], llama(layers=2)
    for length in (4, 11):
        ids = text(length)
        logits = read(model, config, ids).logits
        for t in {0, length // 2, length // 4 * 4 - 1, length - 1}:
            changed = ids.clone()
            changed[t] = (changed[t] + 1) % VOCAB
            other = read(model, config, changed).logits
            assert_close(other[:t], logits[:t])
            assert (other[t] - logits[t]).abs().max() > 1e-3


@every_variant
def test_no_gradient_comes_from_a_later_token(name: str) -> None:
    config, model, ids = FEEDBACK[name], llama(layers=2), text(11)
    logits = oracle(model, config, ids, prompt_rows(config)).logits
    for t in (0, 2, 3, 4, 6, 7, 8, 9):
        reach = embedding_gradient(model, logits[t].sum(), ids)
        assert (reach[t + 1 :] == 0).all()
        assert reach[t] > 0


def test_feedback_carries_what_the_window_has_left() -> None:
    # With M = 0 nothing but FAM can bring block 0 into block 2.
    model, ids, config = llama(layers=2), text(12), FEEDBACK["no past"]
    with_fam = oracle(model, config, ids, prompt_rows(config)).logits[-1].sum()
    without = oracle(model, config.without_feedback(), ids).logits[-1].sum()
    assert (embedding_gradient(model, with_fam, ids)[:4] > 0).all()
    assert (embedding_gradient(model, without, ids)[:4] == 0).all()


def test_gradient_of_the_prompt_by_differences() -> None:
    config, model, ids = FAM.replace(feedback_norm=0.5), llama(layers=2), text(9)
    prompt = prompt_rows(config)
    assert prompt is not None
    prompt.requires_grad_(True)

    def loss(rows: Tensor) -> Tensor:
        return oracle(model, config, ids, rows).logits[-1].logsumexp(0)

    (gradient,) = torch.autograd.grad(loss(prompt), prompt)
    step = 1e-5 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(prompt + step) - loss(prompt - step)) / 2e-5
    assert slope > 1e-4
    assert_close(gradient.norm(), slope, 1e-6)


@pytest.mark.parametrize(
    "config, reaches_back",
    [(FAM, True), (BSWA, False), (BSWA.replace(sink_tokens=2, memory_segments=0), False)],
    ids=["feedback", "bswa", "sinks"],
)
def test_stop_gradient_cuts_past_blocks_and_not_the_feedback(
    config: FamConfig, reaches_back: bool
) -> None:
    model, ids = llama(layers=2), text(8)
    flowing = oracle(model, config, ids, prompt_rows(config)).logits
    stopped = oracle(model, config.replace(stop_gradient=True), ids, prompt_rows(config)).logits
    assert torch.equal(flowing, stopped)
    assert (embedding_gradient(model, flowing[-1].sum(), ids)[:2] > 0).all()
    reach = embedding_gradient(model, stopped[-1].sum(), ids)
    assert (reach[4:] > 0).all()
    assert bool((reach[:4] > 0).any()) is reaches_back


@pytest.mark.parametrize("name", [n for n in FEEDBACK if n != "zero"])
def test_moving_all_positions_changes_nothing(name: str) -> None:
    config, model, ids = FEEDBACK[name], llama(layers=2), text(14)
    here, there = (read(model, config, ids, start) for start in (0, 2500 * config.block_size))
    assert_close(there.logits, here.logits, 1e-9)
    for made, wanted in zip(there.fams, here.fams, strict=True):
        assert_close(torch.stack(made), torch.stack(wanted), 1e-9)


def test_moving_all_positions_matters_to_fam_at_zero() -> None:
    model, ids = llama(layers=2), text(14)
    here, there = (read(model, FEEDBACK["zero"], ids, start).logits for start in (0, 8))
    assert_close(there[:4], here[:4], 1e-9)  # block 0 sees no FAM
    assert (there[4:] - here[4:]).abs().amax(-1).min() > 1e-4


@every_variant
def test_a_longer_text_begins_as_the_shorter_one(name: str) -> None:
    config, model, ids = FEEDBACK[name], llama(layers=2), text(13)
    whole = read(model, config, ids)
    for length in (3, 4, 9):
        part = read(model, config, ids[:length])
        assert_close(part.logits, whole.logits[:length])
        assert len(part.fams) == length // config.block_size
        for made, wanted in zip(part.fams, whole.fams, strict=False):
            assert_close(torch.stack(made), torch.stack(wanted))


@pytest.mark.parametrize(
    "shape, rows, start, words",
    [
        ((1, 4), 3, 0, "one row"),
        ((0,), 3, 0, "at least 1"),
        ((4,), 3, 2, "multiple"),
        ((4,), None, 0, "needed"),
        ((4,), 2, 0, "must be"),
    ],
)
def test_refuses_what_does_not_fit(
    shape: tuple[int, ...], rows: int | None, start: int, words: str
) -> None:
    prompt = None if rows is None else torch.zeros(rows, WIDTH).double()
    with pytest.raises(ValueError, match=words):
        oracle(llama(layers=1), FAM, torch.zeros(shape, dtype=torch.long), prompt, start)
