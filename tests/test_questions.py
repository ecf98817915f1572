"""Each kind of question against a plain definition: one call of the model over the whole text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import converted, some_tokens
from torch import Tensor

from transformerfam import FamConfig, evaluate
from transformerfam.tasks.questions import Choose, Fit, Follow, Recite, Say, ask_together

CONFIG = FamConfig.paper(block_size=8, memory_segments=1, fam_length=2, sink_tokens=2)
IDS = some_tokens(1, 45)[0].tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return converted(CONFIG)


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """(T, V): log p of the token after each."""
    found: Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    said = list(ids)
    for _ in range(count):
        said.append(int(log_probabilities(model, said)[-1].argmax()))
    return said[len(ids) :]


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_recite_is_right_if_greedy_decoding_says_it(model: Any, wrong: int | None) -> None:
    answer = greedy(model, IDS, 5)
    if wrong is not None:
        answer[wrong] = (answer[wrong] + 1) % 64
    question = Recite(IDS, answer)
    metrics = question.ask(model)
    assert question.tokens == 50
    assert metrics["exact"] == float(greedy(model, IDS, 5) == answer)
    said = log_probabilities(model, [*IDS, *answer])[len(IDS) - 1 : -1].argmax(-1).tolist()
    right = sum(a == b for a, b in zip(said, answer, strict=True))
    assert metrics["tokens"] == pytest.approx(right / 5)


@pytest.mark.parametrize("seen", ["always", "asked"])
def test_questions_read_side_by_side_bring_what_each_brings_alone(seen: str) -> None:
    model = converted(CONFIG.replace(fam_seen=seen))
    questions = []
    for number, wrong in enumerate((None, 0, 3)):
        ids = some_tokens(1, 45, seed=number)[0].tolist()
        answer = greedy(model, ids, 5) if seen == "always" else ids[5:10]
        if wrong is not None:
            answer[wrong] = (answer[wrong] + 1) % 64
        questions.append(Recite(ids[38:], answer, text=ids[:38]))
    alone = [question.ask(model) for question in questions]
    assert ask_together(model, questions) == alone
    if seen == "always":
        assert [metrics["exact"] for metrics in alone] == [1, 0, 0]
    # Others are asked one by one, and all stay in their order.
    mixed: list[Any] = [
        questions[2],
        Choose(IDS, [[5, 6], [7]], 0),
        Recite(IDS, IDS[:2]),
        *questions,
    ]
    assert ask_together(model, mixed) == [question.ask(model) for question in mixed]


def test_choose_takes_the_likeliest_and_the_likeliest_by_length(model: Any) -> None:
    choices = [[5, 6], [7], [8, 9, 10, 11]]
    scores = []
    for choice in choices:
        table = log_probabilities(model, [*IDS, *choice])[len(IDS) - 1 :]
        scores.append(sum(float(table[i, token]) for i, token in enumerate(choice)))
    lengths = [3, 1, 9]
    normed = [s / n for s, n in zip(scores, lengths, strict=True)]
    for gold in range(3):
        metrics = Choose(IDS, choices, gold, lengths).ask(model)
        assert metrics["accuracy"] == float(max(scores) == scores[gold])
        assert metrics["accuracy_norm"] == float(max(normed) == normed[gold])


def test_fit_scores_the_continuation_alone(model: Any) -> None:
    contexts, continuation = [IDS[:20], IDS[5:31], [3]], [8, 9, 10]
    scores = []
    for context in contexts:
        table = log_probabilities(model, [*context, *continuation])[len(context) - 1 :]
        scores.append(sum(float(table[i, token]) for i, token in enumerate(continuation)))
    for gold in range(3):
        question = Fit(contexts, continuation, gold)
        assert question.ask(model) == {"accuracy": float(max(scores) == scores[gold])}
        assert question.tokens == 29


def test_say_ends_at_a_stop_and_is_scored_by_its_text(model: Any) -> None:
    said = greedy(model, IDS, 6)
    stop = said[4]
    first = said.index(stop)

    def score(text: str) -> dict[str, Any]:
        return {"length": len(text.split())}

    question = Say(IDS, 6, score, lambda ids: " ".join(map(str, ids)), stop=[stop])
    assert question.ask(model) == {"length": first, "said": " ".join(map(str, said[:first]))}


def test_follow_sums_by_place_and_its_sums_are_the_whole(model: Any) -> None:
    metrics = Follow(IDS, [10, 30, 50], [0, 8, 20]).ask(model)
    table = log_probabilities(model, IDS)[:-1]
    targets = torch.tensor(IDS[1:])
    losses = -table.gather(1, targets[:, None])[:, 0]
    hits = table.argmax(-1) == targets
    assert metrics["loss"] == pytest.approx(float(losses.mean()))
    assert metrics["accuracy"] == pytest.approx(float(hits.double().mean()))
    assert metrics["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / 90)
    # Target i of the list stands at place i + 1 of the text.
    assert metrics["scored"] == [7, 12, 25]
    assert metrics["nats"] == pytest.approx(
        [float(part.sum()) for part in losses.split([7, 12, 25])]
    )
    assert metrics["right"] == [int(part.sum()) for part in hits.split([7, 12, 25])]
    assert metrics["bytes"] == [10, 30, 50]


def test_a_text_of_one_token_says_nothing_of_a_model(model: Any) -> None:
    metrics = Follow(IDS[:1], [3], [0]).ask(model)
    assert (metrics["accuracy"], metrics["loss"], metrics["scored"]) == (0, 0, [0])
    assert evaluate.summarise([{"metrics": metrics}], "accuracy") is None
