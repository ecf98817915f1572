"""Facts: an everyday fact is told, a lot of irrelevant text goes by, and someone asks about it.

A model with a chat template is asked in it, as `fam read --ask` does, and the beginning of the answer is
given: what is left to say is what had to be remembered, a place, a thing, a number.
"""

from __future__ import annotations

from functools import partial

from transformerfam.data.facts import FactTexts
from transformerfam.data.passkey import DEFAULT_SENTENCES
from transformerfam.tasks.cases import Case, Wanted, by_length
from transformerfam.tasks.questions import Recite

VERSION = 1
WHERE = {"facts": "start", "facts-anywhere": "anywhere"}


def cases(name: str, wanted: Wanted) -> list[Case]:
    """A case for each length; metric `exact`: what the fact is about is said right, word for word."""
    texts = FactTexts(
        wanted.tokenizer,
        lengths=wanted.lengths,
        where=WHERE[name],
        filler=wanted.filler or DEFAULT_SENTENCES,
        chat=bool(wanted.tokenizer.chat_template),
        seed=wanted.seed,
    )
    return by_length(name, VERSION, wanted, partial(_question, name, wanted, texts), "exact")


def _question(name: str, wanted: Wanted, texts: FactTexts, length: int, number: int) -> Recite:
    sample = texts.sample(wanted.rng(name, length, number), length)
    ids, asked = sample.example.ids, sample.example.asked_from
    key = wanted.encoder.encode(f" {sample.key}", first=False)
    # Behind it at most a full stop and the end of the turn.
    start = max(i for i in range(asked, len(ids)) if list(ids[i : i + len(key)]) == key)
    facts = {"depth": round(sample.depth, 4), "key": sample.key}
    return Recite(ids[asked:start], key, facts, text=ids[:asked])
