"""From the settings of a recipe to what is read: the source, the rows of the batch, the probes.

The one place that knows both settings and `transformerfam.data`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformerfam.data.examples import BadRow, Example, from_row, repeat_marker
from transformerfam.data.facts import FactTexts
from transformerfam.data.files import Rows, open_rows, plain_texts
from transformerfam.data.haystack import Haystack
from transformerfam.data.passkey import DEFAULT_SENTENCES, PasskeyTexts
from transformerfam.data.passkey import prose as passkey_prose
from transformerfam.data.rows import (
    FileSource,
    Mixture,
    RepeatTask,
    RowReader,
    Source,
    row_reader,
)
from transformerfam.errors import UserError
from transformerfam.training.probes import HeldOut, Passkey, Probe
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import SourceSettings

_TRIED = 100  # texts, to see whether all fit
_SPARE = 20  # tokens, for questions that are longer than those that were tried


@dataclass
class PasskeySource:
    """Texts as long as each other in all rows of a step: a batch then needs no filling up.

    Attributes:
        texts: makes them.
        rows: of a step.
        seed: of lengths; sources that share it and have the same lengths are as long in each step.
        longest: none is longer, unless all lengths are; None: no limit.
        alike: whether those of a step are as long as each other; else each has a length of its own.
    """

    texts: PasskeyTexts
    rows: int
    longest: int | None = None
    alike: bool = True
    seed: int = 0
    makes_up: ClassVar[bool] = True

    def draw(self, number: int) -> Example:
        """See `Source`."""
        shared = number // self.rows if self.alike else number
        length = random.Random(f"{self.seed}/length/{shared}").choice(self._lengths())
        return self.texts.example(random.Random(f"{self.texts.seed}/passkey/{number}"), length)

    def prose(self, rng: random.Random, tokens: int) -> list[int]:
        """So many tokens of what things are hidden in, as `PasskeyTexts` fills up with it."""
        return self.texts.prose(rng, tokens)

    def _lengths(self) -> Sequence[int]:
        if self.longest is None or max(self.texts.lengths) <= self.longest:
            return self.texts.lengths
        short = [n for n in self.texts.lengths if n <= self.longest]
        return short or [min(self.texts.lengths)]


class _Prose:
    """What sources hide things in: the same texts are cut into sentences and tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._made: dict[tuple[str, int], Haystack] = {}

    def of(self, path: str, digits: int) -> Haystack:
        """The sentences of the texts at `path`, see `passkey.prose`."""
        if (path, digits) not in self._made:
            self._made[path, digits] = passkey_prose(self._tokenizer, _filler(path), digits)
        return self._made[path, digits]


def open_source(
    recipe: Recipe, tokenizer: Any, *, note: Callable[[str], None] | None = None
) -> Source:
    """What a recipe reads.

    Args:
        recipe: settings.
        tokenizer: a tokenizer of transformers.
        note: told of rows that cannot be used.

    Raises:
        UserError: for data that cannot be used, with file and line.
    """
    prose = _Prose(tokenizer)
    sources = [
        (_source(settings, recipe, tokenizer, place, note, prose), settings.share)
        for place, settings in enumerate(recipe.data.sources)
    ]
    if not sources:
        raise UserError("The recipe has no data; give data.sources.0.path=FILE.")
    return sources[0][0] if len(sources) == 1 else Mixture(sources, seed=recipe.run.seed)


def row_readers(recipe: Recipe, source: Source, tokenizer: Any = None) -> list[RowReader]:
    """The readers of all rows of the batch, over all processes; the tokenizer is for the repeat task."""
    data, repeat = recipe.data, None
    if data.repeat_length:
        repeat = RepeatTask(
            repeat_marker(tokenizer), data.repeat_length, data.repeat_weight, recipe.run.seed
        )
    return [
        row_reader(
            data.layout, source, row=r, rows=data.batch_size, length=data.length, repeat=repeat
        )
        for r in range(data.batch_size)
    ]


def open_probes(recipe: Recipe, tokenizer: Any) -> list[Probe]:
    """What a recipe measures.

    Raises:
        UserError: for held-out texts that cannot be used.
    """
    settings, probes = recipe.probes, list[Probe]()
    if settings.heldout:
        rows = open_rows(settings.heldout, bad_rows="refuse")
        count = min(len(rows), settings.heldout_rows)
        names = [_short_name(rows, i) for i in range(count)]
        if len(set(names)) < count:  # files of one name in several folders
            names = [rows.places(i) for i in range(count)]
        texts = {name: _heldout(tokenizer, rows, i) for i, name in enumerate(names)}
        limit = settings.heldout_tokens
        cut = {name: Example(e.ids[:limit], e.weights[:limit]) for name, e in texts.items()}
        for name, example in cut.items():
            if not any(example.weights[1:]):
                raise UserError(f"Nothing counts in the first {limit:,} tokens of {name}.")
        probes.append(HeldOut(cut))
    if settings.passkey_lengths:
        texts_made = PasskeyTexts(
            tokenizer,
            lengths=settings.passkey_lengths,
            digits=settings.passkey_digits,
            keys=settings.passkey_keys,
            where=settings.passkey_where,
            filler=_filler(settings.passkey_filler),
        )
        _check_room(texts_made, "probes.passkey_lengths")
        probes.append(
            Passkey(texts_made, settings.passkey_lengths, settings.passkey_samples, recipe.run.seed)
        )
    return probes


def _heldout(tokenizer: Any, rows: Rows, index: int) -> Example:
    """A held-out text: one that cannot be used is refused, since all runs shall measure the same."""
    try:
        return from_row(tokenizer, rows[index])
    except BadRow as bad:
        raise UserError(f"{rows.places(index)} cannot be used: {bad.reason}.") from None


def _source(
    settings: SourceSettings,
    recipe: Recipe,
    tokenizer: Any,
    place: int,
    note: Callable[[str], None] | None,
    prose: _Prose,
) -> Source:
    # Two sources of one kind are not to read the same.
    seed = recipe.run.seed * 1000 + place
    if settings.kind == "files":
        rows = open_rows(settings.path, split=settings.split, bad_rows=settings.bad_rows)
        if rows.bad.count and note is not None:
            note(
                f"{settings.path}: {rows.bad.count:,} rows cannot be used, {len(rows):,} can: "
                + "; ".join(rows.bad.examples)
            )
        return FileSource(rows, tokenizer, seed=seed, shuffle=settings.shuffle)
    kind = FactTexts if settings.kind == "facts" else PasskeyTexts
    texts = kind(
        tokenizer,
        lengths=settings.lengths,
        steps_of=settings.lengths_in_steps_of,
        digits=settings.digits,
        keys=settings.keys,
        where=settings.where,
        filler=prose.of(settings.filler or recipe.data.filler, settings.digits),
        filler_share=settings.filler_share,
        asked_prose=settings.asked_prose,
        asked=settings.asked,
        within=recipe.fam.block_size if recipe.replay.blocks else 0,
        chat=settings.chat,
        seed=seed,
    )
    _check_room(texts, f"data.sources.{place}.lengths")
    if texts.within:
        _check_within(texts, f"data.sources.{place}")
    longest = recipe.data.begin_length or None
    alike = settings.lengths_alike
    return PasskeySource(
        texts, recipe.data.batch_size, longest, alike, seed=recipe.run.seed if alike else seed
    )


def left_out(source: Source, readers: Sequence[RowReader]) -> tuple[int, list[str]]:
    """Examples that were of no use when they were drawn: how many, and why the first few were."""
    sources = source.sources if isinstance(source, Mixture) else [source]
    late = [s.rows.late for s in sources if isinstance(s, FileSource)]
    reasons = [reason for bad in late for reason in bad.examples]
    skipped = sum(reader.skipped for reader in readers)
    if skipped:
        reasons.append(f"{skipped:,} too short, or too long for data.length")
    return skipped + sum(reader.stood_in for reader in readers), reasons


def _check_room(texts: PasskeyTexts, key: str) -> None:
    """Texts that are longer than they are called would be measured under a wrong name."""
    if min(texts.lengths) < texts.bare_length:
        raise UserError(
            f"{key} has {min(texts.lengths):,}, but such a text takes {texts.bare_length:,} "
            "tokens without any filler."
        )


def _check_within(texts: PasskeyTexts, key: str) -> None:
    """Texts that are replayed tell all in their first block and ask behind it."""
    examples = [texts.example(random.Random(n), min(texts.lengths)) for n in range(_TRIED)]
    told = max(example.told for example in examples)
    if told > texts.within:
        raise UserError(
            f"{key} tells in its first {told:,} tokens what replay.blocks needs in one block of "
            f"{texts.within:,}; take fewer keys or larger blocks."
        )
    asked = min(example.asked_from for example in examples)
    if asked < texts.within:
        raise UserError(
            f"{key}.lengths has {min(texts.lengths):,}, and such a text is asked from {asked:,} on; "
            f"replay.blocks needs that behind a block of {texts.within:,}. Make lengths "
            f"{texts.within - asked + _SPARE:,} more."
        )


def _filler(path: str) -> Sequence[str]:
    """The texts at `path`, or the sentences of the literature."""
    if not path:
        return DEFAULT_SENTENCES
    texts = plain_texts(path)
    if not texts:
        raise UserError(f"{path} holds no plain text to fill PassKey texts with.")
    return texts


def _short_name(rows: Rows, index: int) -> str:
    """A row's place without its folder."""
    return Path(rows.places(index)).name
