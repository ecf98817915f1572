"""FAM that tokens see only where something is asked (`fam_seen="asked"`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import some_tokens, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracle import make_exact, oracle
from test_adapted import with_adapter
from torch import Tensor

from transformerfam import FamConfig, Memory, convert, read
from transformerfam.conversion import reconfigure, twin
from transformerfam.side_by_side import score_each
from transformerfam.stream import absorb, generate
from transformerfam.tasks.questions import Recite

B = 6
CONFIG = FamConfig(
    block_size=B, memory_segments=1, fam_length=3, sink_tokens=2, previous_fams=2, fam_seen="asked"
)
IDS = some_tokens(2, 4 * B + 3)
T = IDS.shape[1]


def model_of(config: FamConfig = CONFIG) -> Any:
    return convert(make_exact(tiny()), config).eval()


def asked_in(*ranges: range) -> Tensor:
    """(rows, T) bool: which tokens of each row are asked."""
    return torch.tensor([[t in asked for t in range(T)] for asked in ranges])


@pytest.mark.parametrize("ranges", [(range(15, 19), range(7, T)), (range(0), range(T))])
def test_tokens_that_are_asked_see_fam_and_others_do_not(ranges: tuple[range, ...]) -> None:
    model = model_of()
    memory = Memory.for_model(model, 2)
    ours = model(input_ids=IDS, past_key_values=memory, fam_asked=asked_in(*ranges)).logits
    for row, asked in enumerate(ranges):
        prompt = model.model.fam_prompt.weight
        expected = oracle(make_exact(tiny()), CONFIG, IDS[row], prompt, asked=asked)
        torch.testing.assert_close(ours[row], expected.logits, rtol=0, atol=1e-9)
        for fam, wanted in zip(memory.fams, expected.fams[-1], strict=True):
            assert fam is not None
            torch.testing.assert_close(fam[row], wanted, rtol=0, atol=1e-9)


def test_reading_is_that_of_the_windows_and_fam_reads_along() -> None:
    model = model_of()
    memory, windows = Memory.for_model(model), twin(model, model.fam_config.without_feedback())
    ours = model(input_ids=IDS[:1], past_key_values=memory).logits
    torch.testing.assert_close(ours, windows(input_ids=IDS[:1]).logits, rtol=0, atol=1e-12)
    blind = model_of(CONFIG.replace(fam_seen="always", fam_bias=-1e4))
    read_along = Memory.for_model(blind)
    blind(input_ids=IDS[:1], past_key_values=read_along)
    for fam, wanted in zip(memory.fams, read_along.fams, strict=True):
        assert fam is not None and wanted is not None
        torch.testing.assert_close(fam, wanted, rtol=0, atol=1e-9)


@given(cut=st.integers(1, T - 1), step=st.integers(1, T))
def test_asking_in_calls_is_asking_by_token(cut: int, step: int) -> None:
    model = model_of()
    whole = model(input_ids=IDS[:1], fam_asked=asked_in(range(cut, T))).logits[0]
    memory, parts = Memory.for_model(model), []
    for start in range(0, cut, step):
        ids = IDS[:1, start : min(cut, start + step)]
        parts.append(model(input_ids=ids, past_key_values=memory).logits[0])
    with memory.asked():
        for start in range(cut, T, step):
            ids = IDS[:1, start : start + step]
            parts.append(model(input_ids=ids, past_key_values=memory).logits[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)


def test_rows_that_are_filled_up_ask_as_they_do_alone() -> None:
    model = model_of()
    short = 2 * B + 1
    mask = torch.ones_like(IDS)
    mask[1, short:] = 0
    asked = asked_in(range(20, T), range(9, short))
    ours = model(input_ids=IDS, attention_mask=mask, fam_asked=asked).logits
    for row, length in enumerate((T, short)):
        alone = model(
            input_ids=IDS[row : row + 1, :length], fam_asked=asked[row : row + 1, :length]
        )
        torch.testing.assert_close(ours[row, :length], alone.logits[0], rtol=0, atol=1e-9)


def test_generating_asks_and_reading_does_not() -> None:
    model, text, question = model_of(), IDS[0, :20].tolist(), IDS[1, :4].tolist()
    memory = absorb(model, text)
    assert not memory.asking
    said = list(generate(model, question, memory.fork(), max_new_tokens=5))
    seeing = memory.fork()
    with seeing.asked():
        absorb(model, question, seeing)
        assert seeing.fork().asking
    assert seeing.next_logits is not None and not seeing.asking
    assert said[0] == int(seeing.next_logits.argmax())
    given_ids = torch.tensor([question])
    other = model.generate(
        given_ids, past_key_values=memory.fork(), max_new_tokens=5, do_sample=False
    )
    assert other[0, len(question) :].tolist() == said
    # Asked and told from the first token on, it is a memory that is always seen.
    always = model_of(CONFIG.replace(fam_seen="always"))
    alone = list(generate(model, text, max_new_tokens=5))
    assert alone == list(generate(always, text, max_new_tokens=5))
    (chunk,) = read(model, text)
    unseen = twin(model, model.fam_config.without_feedback())
    torch.testing.assert_close(chunk.losses, next(read(unseen, text)).losses, rtol=0, atol=1e-12)


def test_no_gradient_goes_through_tokens_that_see_nothing_that_learns() -> None:
    """So reading costs no backward pass: only FAM's own way through the layers has one."""
    model = with_adapter(CONFIG.replace(adapted="fam"))
    memory = Memory.for_model(model.base_model.model)
    read_part = model(input_ids=IDS[:1, : 3 * B], past_key_values=memory)
    assert not read_part.logits.requires_grad
    with memory.asked():
        model(input_ids=IDS[:1, 3 * B :], past_key_values=memory).logits.logsumexp(
            -1
        ).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = with_adapter(CONFIG.replace(adapted="fam"))
    logits = whole(input_ids=IDS[:1], fam_asked=asked_in(range(3 * B, T))[:1]).logits
    logits[:, 3 * B :].logsumexp(-1).sum().backward()
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, found[name], rtol=0, atol=1e-9)


def test_what_is_seen_is_no_part_of_a_memory() -> None:
    model = model_of()
    memory = absorb(model, IDS[0].tolist())
    always = reconfigure(model, CONFIG.replace(fam_seen="always"))
    list(generate(always, IDS[1].tolist(), memory, max_new_tokens=1))
    assert CONFIG.changed(fam_length=0).fam_seen == "always"
    with pytest.raises(ValueError, match="fam_seen need a feedback memory"):
        CONFIG.replace(fam_length=0, previous_fams=1)
    with pytest.raises(ValueError, match="leave fam_seen out"):
        FamConfig(recurrence="rmt", memory_segments=0, fam_seen="asked")


@pytest.mark.parametrize("asked", [torch.ones(1, 3, dtype=torch.bool), torch.ones(1, T)])
def test_every_token_is_asked_or_not(asked: Tensor) -> None:
    with pytest.raises(ValueError, match=f"each of the {T} new tokens of 1 rows"):
        model_of()(input_ids=IDS[:1], fam_asked=asked)


def test_what_generate_made_or_was_given_reads_again_afterwards() -> None:
    model, ids = model_of(), IDS[:1, :9]
    memory = Memory.for_model(model)
    more: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    assert not model.generate(ids, **more).past_key_values.asking
    assert not model.generate(ids, past_key_values=memory, **more).past_key_values.asking
    several = {**more, "do_sample": True, "num_return_sequences": 2}
    made = model.generate(ids, past_key_values=Memory.for_model(model), **several)
    assert not made.past_key_values.asking and not memory.asking
    with memory.asked():
        model.generate(ids, past_key_values=memory, **more)
        assert memory.asking
        memory.reset()
        assert not memory.asking
    with pytest.raises(ValueError, match="leave use_cache out"):
        model.generate(ids, use_cache=False, max_new_tokens=1)


def test_choices_are_asked_one_by_one_as_side_by_side() -> None:
    model, text = model_of(), IDS[0, :20].tolist()
    memory, choices = absorb(model, text), [IDS[1, :3].tolist(), IDS[1, 4:9].tolist()]
    together = [scored.nats for scored in score_each(model, choices, memory)]
    alone = [next(score_each(model, [choice], memory)).nats for choice in choices]
    assert together == pytest.approx(alone, rel=1e-5)
    unasked = [sum(c.nats for c in read(model, choice, memory.fork())) for choice in choices]
    assert together != pytest.approx(unasked, rel=1e-3) and not memory.asking


def test_the_question_of_a_task_is_asked_and_its_text_is_read() -> None:
    model, text, question = model_of(), IDS[0, :20].tolist(), IDS[1, :4].tolist()
    with torch.no_grad():
        ids = torch.tensor([[*text, *question]])
        asked = torch.arange(ids.shape[1])[None] >= len(text)
        likeliest = int(model(input_ids=ids, fam_asked=asked).logits[0, -1].argmax())
    said = Recite(question, [likeliest], text=text).ask(model)
    assert said == {"exact": 1.0, "tokens": 1.0}
