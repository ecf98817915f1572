"""The state of a batch of streams: what a TransformerFAM carries from block to block.

`Memory` is a transformers `Cache` of fixed size. It holds keys, values and FAM rows, and how far each
row has read; it knows nothing of text, nor how the tensors in it are computed (`feedback.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from transformerfam.config import FamConfig
from transformerfam.layer_memory import LayerMemory

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel


class Memory(Cache):
    """The memory of `rows` streams read side by side: fixed in size, however much was read.

    A memory is advanced in place by `model(input_ids, past_key_values=memory)` and by
    `model.generate(..., past_key_values=memory)`, and only when the whole call has succeeded (where
    `generate` makes several continuations of a row, it advances copies). The tokens given with it are
    always *new* ones: it never needs the old text again.

    Attributes:
        config: the geometry it was made under.
        position: tokens that each row has consumed, whole numbers of any size.
        layers_memory: one `LayerMemory` a layer; None before the first token.
        next_logits: (rows, vocabulary) float32, the model's prediction after the last token. Kept by
            `transformerfam.read` so that a resumed stream scores its very first token; else None.
        passed: for each row whether its stream began with the FAM of another (`begin_with`).
        passed_fams: that FAM, each layer's (rows, N, d), until something is read; else None.
        written: (rows, S, d), memory tokens that the top layer wrote and the next block reads, under
            `recurrence` "rmt" and "autocompressor"; S is 0 in the first block. None: nothing read, or
            another recurrence.
        offset: position of the first token (B.2, random position offset). It matters only where FAM
            stands at position `zero`; all other scores depend on differences of positions.
        asking: whether tokens that are read now see FAM where `FamConfig.fam_seen` is "asked", see
            `asked`. Not part of what a memory file holds: a memory that is loaded reads.
    """

    def __init__(self, config: FamConfig, rows: int = 1, layers: int = 1) -> None:
        super().__init__(layers=[])
        if rows < 1 or layers < 1:
            raise ValueError("A memory needs at least one row and one layer.")
        self.config = config
        self.position: tuple[int, ...] = (0,) * rows
        self.layers_memory: list[LayerMemory | None] = [None] * layers
        self.next_logits: Tensor | None = None
        self.passed: tuple[bool, ...] = (False,) * rows
        self.passed_fams: tuple[Tensor, ...] | None = None
        self.written: Tensor | None = None
        self.offset = 0.0
        self.asking = False

    @classmethod
    def for_model(cls, model: PreTrainedModel, rows: int = 1) -> Memory:
        """An empty memory for `model`, a TransformerFAM."""
        config = getattr(model, "fam_config", None)
        if config is None:
            raise ValueError(
                "This model is not a TransformerFAM; convert it first: convert(model, config)."
            )
        return cls(config, rows, model.config.get_text_config().num_hidden_layers)

    # ---- looking

    @property
    def rows(self) -> int:
        """Streams in this memory."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for _, t in self.tensors()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of everything held, in a fixed order."""
        for index, layer in enumerate(self.layers_memory):
            if layer is not None:
                for name, tensor in layer.named_tensors():
                    yield f"{index}.{name}", tensor
        if self.written is not None:
            yield "written", self.written
        if self.next_logits is not None:
            yield "next_logits", self.next_logits

    @property
    def fams(self) -> list[Tensor | None]:
        """F of each layer, (rows, N, d), after the last finished block of each row."""
        if self.passed_fams is not None:
            return list(self.passed_fams)
        return [None if layer is None else layer.fam for layer in self.layers_memory]

    @property
    def untouched(self) -> tuple[bool, ...]:
        """For each row whether it has read nothing and was passed nothing."""
        return tuple(not p and not was for p, was in zip(self.position, self.passed, strict=True))

    @property
    def past_length(self) -> int:
        """P, kept past in tokens; grows only where everything is kept."""
        if self.config.past_length is not None:
            return self.config.past_length
        first = self.layers_memory[0]
        if first is None:
            return 0
        fams = self.config.previous_fams * self.config.fam_length
        return first.keys.shape[2] - fams - self.config.block_size

    def __repr__(self) -> str:
        return f"Memory(rows={self.rows}, position={self.position}, nbytes={self.nbytes:,})"

    def __len__(self) -> int:
        return len(self.layers_memory)

    # ---- changing as a whole

    def advance(
        self,
        layers: Sequence[LayerMemory],
        counts: Sequence[int],
        next_logits: Tensor | None = None,
        written: Tensor | None = None,
    ) -> None:
        """Take over the state after `counts` more tokens of each row."""
        self.written = written
        self.layers_memory = list(layers)
        self.position = tuple(p + n for p, n in zip(self.position, counts, strict=True))
        self.next_logits = next_logits
        self.passed_fams = None

    def begin_with(self, fams: Sequence[Tensor]) -> None:
        """Let all streams begin with a FAM that was written elsewhere (random state passing, B.2).

        The first block then sees it, and updates it instead of the prompt. Windows begin empty.

        Args:
            fams: F of each layer, (rows, N, d) or (1, N, d) for all rows alike.

        Raises:
            ValueError: if something was read already, or the FAM does not fit.
        """
        if self.config.through_stack:
            raise ValueError(
                "A FAM can be passed from layer to layer, and under "
                f"recurrence={self.config.recurrence!r} layers have none."
            )
        if any(self.position):
            raise ValueError("Only a stream that has read nothing can begin with a FAM.")
        if self.config.fam_query == "static":
            raise ValueError(
                "With fam_query='static' a stream needs the prompt that rose through its own first "
                "block; it cannot begin with the FAM of another."
            )
        N = self.config.fam_length
        fits = [f.dim() == 3 and f.shape[0] in (1, self.rows) and f.shape[1] == N for f in fams]
        if not N or len(fams) != len(self) or not all(fits):
            raise ValueError(
                f"This memory needs a FAM of {len(self)} layers, {self.rows} rows and {N} slots."
            )
        self.passed_fams = tuple(f.expand(self.rows, -1, -1) for f in fams)
        self.passed = (True,) * self.rows
        self.layers_memory = [None] * len(self)

    def beginning(
        self, prefix: Sequence[Tensor] | None
    ) -> tuple[Sequence[Tensor] | None, tuple[bool, ...]]:
        """F_{-1} of each layer, and for each row whether it begins with it in the next call.

        Args:
            prefix: each layer's (1, N, d), with which rows begin that were passed nothing.
        """
        if self.passed_fams is not None and not torch.is_inference_mode_enabled():
            # Inference tensors cannot be saved for backward.
            self.passed_fams = tuple(f.clone() if f.is_inference() else f for f in self.passed_fams)
        if prefix is None:
            return self.passed_fams, self.passed
        if self.passed_fams is None:
            return prefix, self.untouched
        if all(self.passed):
            return self.passed_fams, self.passed
        passed = torch.tensor(self.passed, device=prefix[0].device)[:, None, None]
        fams = zip(self.passed_fams, prefix, strict=True)
        return [torch.where(passed, fam.to(own), own) for fam, own in fams], (True,) * self.rows

    @contextmanager
    def asked(self) -> Iterator[None]:
        """In here tokens see FAM, also where only those do that are asked (`FamConfig.fam_seen`)."""
        before, self.asking = self.asking, True
        try:
            yield
        finally:
            self.asking = before

    def restart(self, rows: Sequence[bool]) -> Memory:
        """A new memory in which the rows marked True begin a new stream, and the others go on.

        What comes next is then not known of all rows: `next_logits` is None.

        Raises:
            ValueError: if there is not one mark for each row.
        """
        if len(rows) != self.rows:
            raise ValueError(f"restart needs a mark for each of {self.rows} rows, not {len(rows)}.")
        stays = [not new for new in rows]
        if all(stays):
            return self.fork()

        def kept(t: Tensor) -> Tensor:
            mask = torch.tensor(stays, device=t.device).view(-1, *(1,) * (t.dim() - 1))
            return torch.where(mask, t, 0)

        position = tuple(p * s for p, s in zip(self.position, stays, strict=True))
        passed = tuple(p and s for p, s in zip(self.passed, stays, strict=True))
        new = self._mapped(kept, position, passed)
        new.next_logits = None
        if not any(passed):
            new.passed_fams = None
        if not any(stays):
            new.written = None
        return new

    def fork(self) -> Memory:
        """A copy that goes its own way."""
        return self._mapped(Tensor.clone, self.position, self.passed)

    def select_rows(self, indices: Sequence[int] | Tensor) -> Memory:
        """A new memory of the given rows, by number, in that order; a row may come several times.

        Raises:
            ValueError: for marks instead of numbers.
        """
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool:
            raise ValueError("select_rows takes the numbers of rows, not a mark for each.")
        index = index.long()
        return self._mapped(
            lambda t: t.index_select(0, index.to(t.device)),
            tuple(self.position[r] for r in index.tolist()),
            tuple(self.passed[r] for r in index.tolist()),
        )

    def to(self, device: torch.device | str) -> Memory:
        """A copy on another device."""
        return self._mapped(lambda t: t.to(device, copy=True), self.position, self.passed)

    def detach(self) -> Memory:
        """A memory of the same values through which no gradient flows (the tensors are shared)."""
        return self._mapped(Tensor.detach, self.position, self.passed)

    def _mapped(
        self,
        change: Callable[[Tensor], Tensor],
        position: tuple[int, ...],
        passed: tuple[bool, ...],
    ) -> Memory:
        new = Memory(self.config, len(position), len(self.layers_memory))
        new.position = position
        spare = self._spare_past(position)
        new.layers_memory = [
            None if m is None else m.map(change).without_oldest(spare) for m in self.layers_memory
        ]
        new.next_logits = None if self.next_logits is None else change(self.next_logits)
        new.written = None if self.written is None else change(self.written)
        new.passed, new.offset, new.asking = passed, self.offset, self.asking
        if self.passed_fams is not None:
            new.passed_fams = tuple(change(f) for f in self.passed_fams)
        return new

    def _spare_past(self, position: tuple[int, ...]) -> int:
        """How much of a kept past that grows none of the rows at these places has filled."""
        if self.config.past_length is not None or self.config.through_stack:
            return 0
        B = self.config.block_size
        return max(0, self.past_length - max(position, default=0) // B * B)

    def __copy__(self) -> Memory:
        """Not a second name for the same tensors, which are filled in place."""
        return self.fork()

    def undo(self) -> Callable[[], None]:
        """A function that puts the memory back to where it is now. Costs nothing."""
        names = ["position", "layers_memory", "next_logits", "written"]
        names += ["passed", "passed_fams", "offset"]
        before = {name: getattr(self, name) for name in names}

        def put_back() -> None:
            for name, value in before.items():
                setattr(self, name, value)

        return put_back

    def _become(self, other: Memory) -> None:
        """Take over the state of another memory of the same geometry, which nobody else has."""
        self.position = other.position
        self.layers_memory = other.layers_memory
        self.next_logits, self.written = other.next_logits, other.written
        self.passed, self.passed_fams, self.offset = other.passed, other.passed_fams, other.offset

    # ---- files

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Write to `path`, whole or not at all; see `transformerfam.memory_file`."""
        from transformerfam.memory_file import save_memory

        save_memory(self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> Memory:
        """Read a memory that `model` made. Raises MemoryFileError for any other file."""
        from transformerfam.memory_file import load_memory

        return load_memory(path, model)

    # ---- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: `generate` skips this many of the ids that it is given, and all are new."""
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no largest length."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not treat it as a static cache."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: what a feedback memory has read it cannot unread."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether something was read."""
        return self.layers_memory[0] is not None

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer whether it forgets."""
        return [not self.config.keeps_everything] * len(self.layers_memory)

    @property
    def batch_size(self) -> int:
        """Rows, under the name that transformers uses."""
        return self.rows

    @property
    def max_batch_size(self) -> int:
        """Rows, under the name that transformers uses."""
        return self.rows

    def reset(self) -> None:
        """Forget everything."""
        self.asking = False
        self._become(Memory(self.config, self.rows, len(self.layers_memory)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row beam_idx[r] was (beam search)."""
        self._become(self.select_rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._become(self.select_rows(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._become(self.select_rows(torch.arange(self.rows).repeat_interleave(repeats)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless there is nothing to remove."""
        if tokens_to_remove:
            raise ValueError(
                "A feedback memory cannot unread tokens; keep a memory.fork() to go back to."
            )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not a key-value list: refused."""
        raise RuntimeError("A Memory belongs to a TransformerFAM; this model was not converted.")


def all_or_nothing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A causal language model's `forward` or `generate` that leaves the memory as it was if it fails.

    The decoder has advanced it by then, but the head or the loss may still run out of memory, or the
    next token's call be interrupted.
    """
    signature = inspect.signature(method)

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory = signature.bind_partial(self, *args, **kwargs).arguments.get("past_key_values")
        undo = memory.undo() if isinstance(memory, Memory) else None
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            if undo is not None:
                undo()
            raise

    return run
