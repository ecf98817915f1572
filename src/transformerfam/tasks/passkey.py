"""PassKey (figure 10): keep a number in mind while a lot of irrelevant text goes by."""

from __future__ import annotations

from functools import partial

from transformerfam.data.passkey import DEFAULT_SENTENCES, PasskeyTexts
from transformerfam.tasks.cases import Case, Wanted, by_length
from transformerfam.tasks.questions import Recite

VERSION = 1
# where the key asked for stands, and how many keys there are
SETTINGS: dict[str, tuple[str | float, int]] = {
    "passkey": ("start", 1),
    "passkey-middle": (0.5, 1),
    "passkey-late": (0.95, 1),
    "passkey-anywhere": ("anywhere", 1),
    "passkey-3": ("anywhere", 3),
}


def cases(name: str, wanted: Wanted) -> list[Case]:
    """A case for each length; metric `exact`: the whole key is said right."""
    where, keys = SETTINGS[name]
    texts = PasskeyTexts(
        wanted.tokenizer,
        lengths=wanted.lengths,
        where=where,
        keys=keys,
        filler=wanted.filler or DEFAULT_SENTENCES,
        seed=wanted.seed,
    )
    return by_length(name, VERSION, wanted, partial(_question, name, wanted, texts), "exact")


def _question(name: str, wanted: Wanted, texts: PasskeyTexts, length: int, number: int) -> Recite:
    sample = texts.sample(wanted.rng(name, length, number), length)
    ids, asked, start = sample.example.ids, sample.example.asked_from, sample.answer.start
    facts = {"depth": round(sample.depth, 4), "key": sample.key}
    return Recite(ids[asked:start], ids[start:], facts, text=ids[:asked])
