"""Whatever a memory goes through, each of its rows is its own stream, read alone and in one go.

Rows are read in pieces of any length beside others of any length, asked, copied, saved, loaded, put in
another order, begun anew, and begun with what another stream left. After every step what a row says is
what its tokens say that are read from the first to the last without any of that.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import converted, some_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor
from variants import VARIANTS

from transformerfam import FamConfig, Memory

B = 6
_ASKED: dict[str, Any] = {
    "fam_seen": "asked",
    "sink_tokens": 2,
    "feedback_norm": "rms",
    "first_residual": "prompt",
}
GEOMETRIES = {
    "asked": FamConfig(block_size=B, memory_segments=1, fam_length=3, **_ASKED),
    **{
        name: VARIANTS[name]
        for name in (
            *("paper", "sinks", "no memory segments", "three previous fams", "prefix", "static"),
            *(
                "float",
                "zero",
                "cap per slot",
                "full",
                "swa with sinks",
                "sparse",
                "bswa with sinks",
            ),
            *("feedback segments", "compressive, delta"),
        )
    },
}
_MODELS: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in _MODELS:
        _MODELS[name] = converted(GEOMETRIES[name], num_hidden_layers=2)
    return _MODELS[name]


@dataclass
class Row:
    """One stream: the FAM it began with, its tokens, and which of them were asked."""

    began: list[Tensor] | None = None
    tokens: list[int] = field(default_factory=list)
    asked: list[bool] = field(default_factory=list)

    def copy(self) -> Row:
        return Row(self.began, list(self.tokens), list(self.asked))

    def alone(self, model: Any) -> Tensor:
        """(T, V) logits of all tokens, read in one call."""
        memory = Memory.for_model(model)
        if self.began is not None:
            memory.begin_with(self.began)
        ids, asked = torch.tensor([self.tokens]), torch.tensor([self.asked])
        given = {"fam_asked": asked} if model.fam_config.fam_seen == "asked" else {}
        logits: Tensor = model(ids, past_key_values=memory, **given).logits[0]
        return logits


@dataclass
class Life:
    """A memory and the streams that its rows are."""

    memory: Memory
    rows: list[Row]

    def copied(self, memory: Memory) -> Life:
        return Life(memory, [row.copy() for row in self.rows])


class MemoryLife(RuleBasedStateMachine):
    """Any order of everything that can be done with memories."""

    lives = Bundle("lives")

    @initialize(target=lives, name=st.sampled_from(sorted(GEOMETRIES)), rows=st.integers(1, 3))
    def begin(self, name: str, rows: int) -> Life:
        self.model, self.seed = model_of(name), 0
        self.known: list[Life] = []
        return self._keep(Life(Memory.for_model(self.model, rows), [Row() for _ in range(rows)]))

    def _keep(self, life: Life) -> Life:
        self.known.append(life)
        return life

    @rule(life=lives, asked=st.booleans())
    def read(self, life: Life, asked: bool) -> None:
        """A block and something on, so that every row has something to lose."""
        self._read(life, [B + 1 + r for r in range(len(life.rows))], asked)

    @rule(life=lives, data=st.data(), asked=st.booleans())
    def read_any(self, life: Life, data: st.DataObject, asked: bool) -> None:
        rows = len(life.rows)
        counts = data.draw(st.lists(st.integers(0, 2 * B + 1), min_size=rows, max_size=rows))
        self._read(life, counts, asked)

    def _read(self, life: Life, counts: list[int], asked: bool) -> None:
        width = max(1, *counts)
        self.seed += 1
        ids = some_tokens(len(life.rows), width, seed=self.seed)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        life.memory.asking = asked
        with torch.no_grad():
            logits = self.model(ids, attention_mask=mask, past_key_values=life.memory).logits
            life.memory.asking = False
            for r, (row, count) in enumerate(zip(life.rows, counts, strict=True)):
                row.tokens += ids[r, :count].tolist()
                row.asked += [asked] * count
                if count:
                    alone = row.alone(self.model)[-count:]
                    torch.testing.assert_close(logits[r, :count], alone, rtol=0, atol=1e-9)

    @rule(target=lives, life=lives)
    def fork(self, life: Life) -> Life:
        return self._keep(life.copied(life.memory.fork()))

    @rule(target=lives, life=lives)
    def save_and_load(self, life: Life) -> Life:
        if life.memory.passed_fams is not None:  # refused until something is read
            return life
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "life.fam"
            life.memory.save(path, self.model)
            return self._keep(life.copied(Memory.load(path, self.model)))

    @rule(target=lives, life=lives, data=st.data())
    def pick(self, life: Life, data: st.DataObject) -> Life:
        numbers = st.integers(0, len(life.rows) - 1)
        picked = data.draw(st.lists(numbers, min_size=1, max_size=3))
        return self._keep(
            Life(life.memory.select_rows(picked), [life.rows[n].copy() for n in picked])
        )

    @rule(target=lives, life=lives, data=st.data())
    def restart(self, life: Life, data: st.DataObject) -> Life:
        count = len(life.rows)
        anew = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        rows = [Row() if new else row.copy() for new, row in zip(anew, life.rows, strict=True)]
        return self._keep(Life(life.memory.restart(anew), rows))

    @rule(target=lives, life=lives)
    def pass_on(self, life: Life) -> Life:
        """New streams begin with what others left, where they have left it and it can be passed on."""
        fams = [fam.clone() for fam in life.memory.fams if fam is not None]
        config = self.model.fam_config
        if not fams or not config.fam_length or config.fam_query == "static":
            return life
        memory = Memory.for_model(self.model, len(life.rows))
        memory.begin_with(fams)
        rows = [Row([fam[r : r + 1] for fam in fams]) for r in range(len(life.rows))]
        return self._keep(Life(memory, rows))

    @rule(life=lives)
    def reset(self, life: Life) -> None:
        life.memory.reset()
        life.rows = [Row() for _ in life.rows]

    @invariant()
    def positions_are_counts_of_tokens(self) -> None:
        for life in getattr(self, "known", []):
            assert life.memory.position == tuple(len(row.tokens) for row in life.rows)


TestMemoryLife = MemoryLife.TestCase
TestMemoryLife.settings = settings(
    max_examples=100,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
