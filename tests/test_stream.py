"""Streams of tokens: every token scored once, whatever the chunks, saved or not; and continued."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, converted, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import VARIANTS

from transformerfam import side_by_side, stream
from transformerfam.config import FamConfig
from transformerfam.memory import Memory
from transformerfam.side_by_side import absorb_rows, hits_of_rows, score_each
from transformerfam.stream import Sampling, absorb, generate, read

CONFIG = FamConfig.paper(block_size=8, memory_segments=1, fam_length=3, sink_tokens=2)
TEXT = some_tokens(1, 61, seed=1)[0].tolist()
MODEL = converted(CONFIG)


def losses_in_one_call(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def losses_of(chunks: Iterator[stream.Chunk]) -> torch.Tensor:
    return torch.cat([chunk.losses for chunk in chunks])


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 8, 20, 1000])
def test_every_token_is_scored_with_all_that_came_before(chunk_tokens: int | None) -> None:
    chunks = list(read(MODEL, TEXT, chunk_tokens=chunk_tokens))
    assert sum(chunk.tokens for chunk in chunks) == len(TEXT)
    assert sum(chunk.scored for chunk in chunks) == len(TEXT) - 1
    assert [c.position for c in chunks] == list(itertools.accumulate(c.tokens for c in chunks))
    same(torch.cat([chunk.losses for chunk in chunks]), losses_in_one_call(MODEL, TEXT))
    for chunk in chunks:
        assert chunk.losses.dtype == torch.float32
        assert not chunk.losses.requires_grad
        assert chunk.nats == pytest.approx(chunk.losses.double().sum().item())
        assert chunk.loss == (chunk.nats / chunk.scored if chunk.scored else None)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=4).map(sorted))
def test_reading_in_parts_and_from_files_is_reading_once(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("parts") / "memory"
    memory, parts = Memory.for_model(MODEL), []
    for a, b in itertools.pairwise([0, *cuts, len(TEXT)]):
        parts += [chunk.losses for chunk in read(MODEL, TEXT[a:b], memory)]
        memory.save(path, MODEL)
        memory = Memory.load(path, MODEL)
    same(torch.cat(parts), losses_in_one_call(MODEL, TEXT))


def test_the_stream_is_taken_lazily_and_can_be_endless() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        for token in itertools.cycle(TEXT):
            taken += 1
            yield token

    chunks = read(MODEL, endless(), chunk_tokens=16)
    sizes = set()
    for number, chunk in enumerate(itertools.islice(chunks, 20), start=1):
        assert taken == 16 * number
        sizes.add(chunk.memory.nbytes)
    assert len(sizes) == 1


def test_a_chunk_holds_the_memory_that_goes_on_and_a_fork_stays() -> None:
    chunks = read(MODEL, TEXT, chunk_tokens=16)
    first = next(chunks)
    kept = first.memory.fork()
    second = next(chunks)
    assert second.memory is first.memory
    assert kept.position == (16,)
    same(losses_of(read(MODEL, TEXT[16:], kept)), losses_in_one_call(MODEL, TEXT)[15:])


def test_default_chunks_end_where_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHUNK_TOKENS", 20)
    memory = Memory.for_model(MODEL)
    assert [c.position for c in read(MODEL, TEXT[:3], memory)] == [3]
    assert [c.position for c in read(MODEL, TEXT[3:], memory)] == [16, 32, 48, 61]
    monkeypatch.setattr(stream, "_CHUNK_LOGIT_BYTES", 3 * 4 * VOCABULARY)
    positions = [c.position for c in read(MODEL, TEXT[:20])]
    assert positions == [3, 6, 8, 11, 14, 16, 19, 20]


def test_no_gradients_no_dropout_and_training_mode_is_given_back() -> None:
    model = converted(CONFIG, attention_dropout=0.5)
    expected = losses_of(read(model, TEXT))
    model.train()
    chunks = read(model, TEXT, chunk_tokens=16)
    first = next(chunks)
    assert torch.is_grad_enabled()  # not switched off for whoever asked for the chunk
    assert model.training
    same(torch.cat([first.losses, losses_of(chunks)]), expected)


def test_what_cannot_be_read_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="one row"):
        next(read(MODEL, TEXT, Memory.for_model(MODEL, rows=2)))
    with pytest.raises(ValueError, match="chunk_tokens"):
        next(read(MODEL, TEXT, chunk_tokens=0))
    memory = Memory.for_model(MODEL)
    with pytest.raises(ValueError, match=f"Token {VOCABULARY} is not in"):
        list(read(MODEL, [3, VOCABULARY], memory))
    assert memory.position == (0,)
    assert list(read(MODEL, [])) == []


# ---- generating


def test_ids_may_come_as_tokenizers_give_them() -> None:
    ids = [3, 4, 5, 6]
    expected = [chunk.nats for chunk in read(MODEL, ids)]
    for ids_given in (torch.tensor(ids), torch.tensor([ids])):
        assert [chunk.nats for chunk in read(MODEL, ids_given)] == expected
        assert absorb(MODEL, ids_given).position == (4,)
    mistakes: list[Any] = [torch.tensor([ids, ids]), torch.ones(4), {"input_ids": [ids]}, [ids]]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="Token ids of one stream are wanted"):
            list(read(MODEL, wrong))


def test_continuations_of_what_foretells_nothing_are_refused() -> None:
    memory = Memory.for_model(MODEL)
    MODEL(torch.tensor([[3, 4, 5]]), past_key_values=memory)
    with pytest.raises(ValueError, match="has no next_logits to score first tokens with"):
        list(score_each(MODEL, [[6], [7]], memory))


def test_generate_continues_as_the_model_does() -> None:
    prompt, more = TEXT[:13], 14
    memory = Memory.for_model(MODEL)
    tokens = list(generate(MODEL, prompt, memory, max_new_tokens=more))
    expected = MODEL.generate(
        torch.tensor([prompt]), max_new_tokens=more, do_sample=False, eos_token_id=None
    )
    assert tokens == expected[0, 13:].tolist()
    assert memory.position == (13 + more,)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_memory_holds_exactly_what_was_yielded(taken: int) -> None:
    memory = Memory.for_model(MODEL)
    list(read(MODEL, TEXT[:10], memory))
    tokens = list(itertools.islice(generate(MODEL, [], memory, max_new_tokens=20), taken))
    rest = losses_of(read(MODEL, TEXT[10:30], memory))
    whole = losses_in_one_call(MODEL, [*TEXT[:10], *tokens, *TEXT[10:30]])
    same(rest, whole[-20:])


def test_a_stop_token_is_neither_yielded_nor_consumed() -> None:
    memory = Memory.for_model(MODEL)
    tokens = list(generate(MODEL, TEXT[:10], max_new_tokens=20))
    stop = tokens[4]
    until = tokens[: tokens.index(stop)]
    assert list(generate(MODEL, TEXT[:10], memory, max_new_tokens=20, stop={stop})) == until
    assert memory.position == (10 + len(until),)


def test_sampling_follows_the_distribution_and_its_limits() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def draw(**options: Any) -> Counter[int]:
        choose = Sampling(temperature=1.0, seed=0, **options).chooser()
        return Counter(choose(p.log()) for _ in range(2000))

    frequencies = [draw()[i] / 2000 for i in range(4)]
    assert frequencies == pytest.approx(p.tolist(), abs=0.04)
    assert set(draw(top_k=2)) == {0, 1}
    assert set(draw(top_p=0.6)) == {0, 1}
    assert set(draw(top_p=0.01)) == {0}
    assert Sampling(temperature=1e-30, seed=0).chooser()(p.log()) == 0
    assert Sampling().chooser()(p.log()) == 0


def test_sampling_is_repeatable_with_a_seed_only() -> None:
    def run(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=2.0, seed=seed)
        return list(generate(MODEL, TEXT[:5], max_new_tokens=20, sampling=sampling))

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_sampling_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_nothing_to_continue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to continue"):
        next(generate(MODEL, [], max_new_tokens=1))
    memory = Memory.for_model(MODEL)
    first = list(generate(MODEL, TEXT[:9], memory, max_new_tokens=3))
    memory.save(tmp_path / "memory", MODEL)
    loaded = Memory.load(tmp_path / "memory", MODEL)
    after = list(generate(MODEL, [], loaded, max_new_tokens=3))
    assert first + after == list(generate(MODEL, TEXT[:9], max_new_tokens=6))


# ---- several continuations of one stream

CONTINUATIONS = [TEXT[20:23], TEXT[30:31], [], TEXT[40:57], TEXT[20:23]]


@pytest.mark.parametrize("before", [0, 2, 13])
@pytest.mark.parametrize(
    "name", ["bswa", "bswa with sinks", "swa with sinks", "narrow swa", "xl with sinks"]
)
def test_windows_pass_over_what_they_cannot_reach(name: str, before: int) -> None:
    config = VARIANTS[name].without_feedback()
    model = converted(config)
    reach = config.blocks_within_reach(len(Memory.for_model(model)))
    assert reach is not None
    for length in range(6 * reach + 1, 6 * reach + 26, 4):
        text = some_tokens(1, before + length + 9, seed=length)[0].tolist()
        here, after = before + length, text[before + length :]
        memory = absorb(model, text[before:here], absorb(model, text[:before]))
        whole = absorb(model, iter(text[:here]))
        assert memory.position == whole.position
        assert memory.next_logits is not None
        assert whole.next_logits is not None
        same(memory.next_logits, whole.next_logits)
        same(losses_of(read(model, after, memory)), losses_of(read(model, after, whole)))


def test_a_failure_behind_what_was_passed_over_leaves_a_memory_to_go_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = converted(VARIANTS["bswa"])
    text = some_tokens(1, 100)[0].tolist()
    advance = stream._advance

    def failing(model: Any, ids: list[int], memory: Memory, **options: Any) -> Any:
        if memory.position[0] > 6:
            raise RuntimeError("out of memory")
        return advance(model, ids, memory, **options)

    memory = Memory.for_model(model)
    monkeypatch.setattr(stream, "_advance", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        absorb(model, deque(text), memory)
    monkeypatch.undo()
    assert memory.position == (6,)
    same(losses_of(read(model, text[6:], memory)), losses_in_one_call(model, text)[5:])


def test_only_windows_without_a_memory_pass_anything_over(monkeypatch: pytest.MonkeyPatch) -> None:
    promised = {n for n, config in VARIANTS.items() if config.blocks_within_reach(3) is not None}
    assert promised == {"bswa", "bswa with sinks"}
    counts: list[int] = []
    advance = stream._advance

    def counting(model: Any, ids: list[int], *rest: Any, **options: Any) -> Any:
        counts.append(len(ids))
        return advance(model, ids, *rest, **options)

    monkeypatch.setattr(stream, "_advance", counting)
    absorb(converted(VARIANTS["bswa"]), some_tokens(1, 200)[0].tolist())
    # The first block, and before the last two tokens one past block of 6 for each of three layers.
    assert sum(counts) == 6 + 3 * 6 + 2
    absorb(converted(VARIANTS["paper"]), some_tokens(1, 200)[0].tolist())
    assert sum(counts) == 26 + 200


@pytest.mark.parametrize("asked", [False, True])
def test_streams_side_by_side_are_read_as_each_alone(asked: bool) -> None:
    model = converted(CONFIG.replace(fam_seen="asked" if asked else "always"))
    rows = [some_tokens(1, 40, seed=n)[0].tolist() for n in range(3)]
    together = absorb_rows(model, [ids[:30] for ids in rows])
    absorb_rows(model, [[], [], []], together)
    assert together.position == (30, 30, 30)
    together.asking = asked
    hits = hits_of_rows(model, [ids[30:] for ids in rows], together, last=9)
    assert hits.shape == (3, 9) and together.position == (40, 40, 40)
    for row, ids in enumerate(rows):
        alone = absorb(model, ids[:30])
        alone.asking = asked
        (chunk,) = read(model, ids[30:], alone)
        assert hits[row].tolist() == chunk.hits[-9:].tolist()
        for (name, one), (_, many) in zip(alone.tensors(), together.tensors(), strict=False):
            if name != "next_logits":
                torch.testing.assert_close(many[row : row + 1], one, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="as long as each other"):
        absorb_rows(model, [[1, 2], [3]])
    with pytest.raises(ValueError, match="Token 64 is not in the model's vocabulary"):
        absorb_rows(model, [[1, 2], [3, VOCABULARY]])


@pytest.mark.parametrize("before", [0, 13])
@pytest.mark.parametrize("name", ["paper", "sinks, no segments", "full without feedback", "RMT"])
def test_continuations_side_by_side_are_scored_as_each_alone(name: str, before: int) -> None:
    rmt = FamConfig(block_size=6, memory_segments=0, fam_length=2, recurrence="rmt")
    model = converted(rmt if name == "RMT" else VARIANTS[name])
    memory = absorb(model, TEXT[:before])
    for ids, scored in zip(CONTINUATIONS, score_each(model, CONTINUATIONS, memory), strict=True):
        alone = list(read(model, ids, memory.fork()))
        assert scored.nats == pytest.approx(sum(chunk.nats for chunk in alone), abs=1e-4)
        assert scored.hits.tolist() == [hit for chunk in alone for hit in chunk.hits.tolist()]
    assert memory.position == (before,)


def test_continuations_that_take_too_much_memory_side_by_side_are_read_in_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = absorb(MODEL, TEXT[:13])
    at_once = [scored.nats for scored in score_each(MODEL, CONTINUATIONS, memory)]
    for room in (1, 2):  # rows
        each = memory.nbytes + 4 * VOCABULARY * 17
        monkeypatch.setattr(side_by_side, "_SIDE_BY_SIDE_BYTES", room * each)
        in_groups = [scored.nats for scored in score_each(MODEL, CONTINUATIONS, memory)]
        assert in_groups == pytest.approx(at_once, abs=1e-4)
    with pytest.raises(ValueError, match=f"Token {VOCABULARY} is not in"):
        list(score_each(MODEL, [[1], [VOCABULARY]], memory))
