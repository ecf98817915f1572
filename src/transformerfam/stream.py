"""Token ids in and out, a stream of any length, one memory of fixed size. Knows nothing of text.

`read` scores a stream, `generate` continues one. Both hold the tokens, logits and hidden states of one
chunk at a time; what was read before is in the `Memory` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from transformerfam.call import Observer
from transformerfam.memory import Memory

# A chunk amortises the cost of a call; its logits, in float32, are the largest thing in it.
_CHUNK_TOKENS = 2048
_CHUNK_LOGIT_BYTES = 256 << 20
_LOSS_ROWS = 256


@dataclass(frozen=True)
class Chunk:
    """What `read` did with one chunk of a stream.

    Attributes:
        tokens: tokens in this chunk.
        position: tokens that the stream has behind it after this chunk.
        scored: tokens of this chunk that were predicted: all, but for the first of a fresh stream, and
            the first after a call that did not keep the memory's `next_logits`.
        nats: sum of -log p over the scored tokens.
        losses: (scored,) float32 on the CPU, -log p of each scored token in nats.
        hits: (scored,) bool on the CPU, whether each scored token was the likeliest.
        memory: the memory after this chunk; the next chunk advances the same object.
    """

    tokens: int
    position: int
    scored: int
    nats: float
    losses: Tensor
    hits: Tensor
    memory: Memory

    @property
    def loss(self) -> float | None:
        """Mean loss in nats a token; None if nothing was scored."""
        return self.nats / self.scored if self.scored else None


def read(
    model: Any,
    tokens: Iterable[int],
    memory: Memory | None = None,
    *,
    chunk_tokens: int | None = None,
    observer: Observer | None = None,
) -> Iterator[Chunk]:
    """Read a stream of tokens of any length, and score how well each was predicted.

    Every token but the first of a fresh stream is scored, with the tokens before it, across chunks
    and across `memory.save` and `Memory.load`; where the memory was advanced by the model itself, which
    keeps no `next_logits`, the first token after that is not scored either. No gradients.

    Args:
        model: a TransformerFAM.
        tokens: ids of one stream, taken lazily: a generator over an endless source will do. A tensor
            of shape (T,) or (1, T) will do too.
        memory: where the stream stands, one row; advanced in place. None: a fresh stream.
        chunk_tokens: tokens of a call. By default about 2048, fewer for a large vocabulary (the
            logits of a chunk take at most 256 MB), in steps that end where blocks end.
        observer: told of what is computed (`call.Observer`); for `inspection`.

    Yields:
        A `Chunk` after each call. Between two of them the memory may be forked, saved or asked.

    Raises:
        ValueError: for a memory of several rows or another geometry, for what is not the ids of one
            stream, or a token id that the model does not have; tokens before the bad chunk have been
            read by then.
    """
    memory = single_row(model, memory)
    chunk_length = chunk_lengths(model, memory, chunk_tokens)
    source = iter(_one_stream(tokens))
    while ids := list(islice(source, chunk_length(memory.position[0]))):
        before = memory.next_logits
        logits = _advance(model, ids, memory, keep=0, observer=observer)
        losses, hits = scores(logits, ids, before)
        yield Chunk(
            tokens=len(ids),
            position=memory.position[0],
            scored=len(losses),
            nats=float(losses.sum(dtype=torch.float64)),
            losses=losses,
            hits=hits,
            memory=memory,
        )
        del logits, losses, hits  # not two chunks at once


def absorb(model: Any, tokens: Iterable[int], memory: Memory | None = None) -> Memory:
    """Read a stream without scoring it, which saves the output head, and return its memory.

    Of a sequence, such as a list, only what can matter is read: under windows without a memory the
    tokens that no later one can reach through all layers are passed over, and the memory is the same.

    Args:
        model: a TransformerFAM.
        tokens: ids of one stream, as for `read`; taken lazily, but for a sequence.
        memory: where the stream stands, one row; advanced in place. None: a fresh stream.

    Returns:
        `memory`, whose `next_logits` predict what comes next.

    Raises:
        ValueError: as `read`; where tokens are passed over, before anything is read.
    """
    memory, tokens = single_row(model, memory), _one_stream(tokens)
    if isinstance(tokens, Sequence):
        _absorb_within_reach(model, list(tokens), memory)
    else:
        _absorb_all(model, tokens, memory)
    return memory


def _absorb_all(model: Any, tokens: Iterable[int], memory: Memory) -> None:
    chunk_length = chunk_lengths(model, memory, None)
    source = iter(tokens)
    while ids := list(islice(source, chunk_length(memory.position[0]))):
        _advance(model, ids, memory, keep=1)


def _absorb_within_reach(model: Any, ids: list[int], memory: Memory) -> None:
    B, position = memory.config.block_size, memory.position[0]
    reach = memory.config.blocks_within_reach(len(memory))
    # The block being read is read to its end: the first one has the anchors, and blocks begin whole.
    end = -(-max(position, 1) // B) * B
    start = (position + len(ids) - 1) // B * B - (reach or 0) * B
    if reach is None or start <= end:
        _absorb_all(model, ids, memory)
        return
    check_vocabulary(model, ids)
    _absorb_all(model, ids[: end - position], memory)
    undo = memory.undo()
    try:
        memory.position = (start,)
        _absorb_all(model, ids[start - position :], memory)
    except BaseException:
        undo()  # between the two places the memory is that of neither
        raise


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; 1 samples the model's own distribution.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability.
        seed: makes a run repeatable; None: a new one each time.

    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def chooser(self) -> Callable[[Tensor], int]:
        """A function from logits (V,) to a token id, with a random state of its own."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return lambda logits: self._choose(logits.float().cpu(), generator)

    def _choose(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        # Divided after the maximum is taken off, so that a tiny temperature cannot overflow.
        scaled, order = ((logits - logits.max()) / self.temperature).sort(descending=True)
        if self.top_k:
            scaled, order = scaled[: self.top_k], order[: self.top_k]
        p = scaled.softmax(0)
        # A token stays if those before it have not reached top_p: the likeliest always does.
        p = torch.where(p.cumsum(0) - p < self.top_p, p, 0.0)
        return int(order[torch.multinomial(p, 1, generator=generator)])


def generate(
    model: Any,
    tokens: Iterable[int],
    memory: Memory | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Read `tokens`, then continue the stream one token at a time; both count as asked.

    Whenever a token is yielded the memory has consumed it: stop iterating at any time and the memory
    holds exactly what was read and yielded. A token of `stop` ends the stream; it is neither yielded
    nor consumed. No gradients.

    Args:
        model: a TransformerFAM.
        tokens: new tokens of the stream, of any length; may be empty if `memory.next_logits` is set,
            as it is after `read`, `generate` and loading what they saved.
        memory: where the stream stands, one row; advanced in place. None: a fresh stream.
        max_new_tokens: most tokens to yield.
        sampling: how to choose; by default the likeliest token.
        stop: token ids that end the stream.

    Raises:
        ValueError: as `read`; also if there is nothing to continue.
    """
    choose = (sampling or Sampling()).chooser()
    memory = single_row(model, memory)
    with memory.asked():
        absorb(model, tokens, memory)
    for _ in range(max_new_tokens):
        if memory.next_logits is None:
            raise ValueError("There is nothing to continue: give at least one token.")
        token = choose(memory.next_logits[0])
        if token in stop:
            return
        with memory.asked():
            _advance(model, [token], memory, keep=1)
        yield token


# ---- parts


def _one_stream(tokens: Iterable[int]) -> Iterable[int]:
    """Token ids of one stream, also from tensors as tokenizers make them."""
    if isinstance(tokens, Mapping):
        raise ValueError(
            "Token ids of one stream are wanted, not all that a tokenizer gives; give its input_ids."
        )
    if not isinstance(tokens, Tensor):
        return tokens
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(
            f"Token ids of one stream are wanted, not a tensor of shape {tuple(tokens.shape)} and type "
            f"{str(tokens.dtype).removeprefix('torch.')}."
        )
    ids: list[int] = tokens.tolist()
    return ids


def single_row(model: Any, memory: Memory | None) -> Memory:
    """The memory of one stream; a fresh one for None."""
    memory = Memory.for_model(model) if memory is None else memory
    if memory.rows != 1:
        raise ValueError(
            f"A stream is read with a memory of one row, and this one has {memory.rows}; "
            "take one with memory.select_rows([row])."
        )
    return memory


def chunk_lengths(model: Any, memory: Memory, chosen: int | None) -> Callable[[int], int]:
    """How many tokens to take at a position of the stream."""
    if chosen is not None:
        if chosen < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chosen}.")
        return lambda position: chosen
    B = memory.config.block_size
    most = _CHUNK_LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size)
    most = max(1, min(most, _CHUNK_TOKENS))
    if most >= B:
        whole = most // B * B
        return lambda position: whole - position % B
    # Equal parts of a block, the last of which ends where the block ends.
    part = -(-B // -(-B // most))
    return lambda position: min(part - position % B % part, B - position % B)


@torch.no_grad()
def _advance(
    model: Any, ids: list[int], memory: Memory, *, keep: int, observer: Observer | None = None
) -> Tensor:
    """Logits (keep or T, V) of new tokens, with the memory advanced and its prediction set."""
    check_vocabulary(model, ids)
    inputs = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with evaluating(model):
        logits: Tensor = model(
            input_ids=inputs,
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=keep,
            **({} if observer is None else {"fam_observer": observer}),
        ).logits[0]
    memory.next_logits = logits[-1:].float().clone()  # a copy: the rest of the chunk can be freed
    return logits


def check_vocabulary(model: Any, ids: Sequence[int]) -> None:
    """Raises ValueError for an id that the model does not have."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    try:
        bad = next((i for i in ids if not 0 <= i < vocabulary), None)
    except TypeError:
        raise ValueError(
            "Token ids of one stream are wanted: whole numbers, one after the other."
        ) from None
    if bad is not None:
        raise ValueError(f"Token {bad} is not in the model's vocabulary of {vocabulary} tokens.")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout meanwhile; a model in training is handed back in training."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@torch.no_grad()
def scores(logits: Tensor, ids: list[int], before: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T or T - 1,) of each token: -log p under the prediction before it; was it the likeliest."""
    targets = torch.tensor(ids, device=logits.device)
    predictions = [] if before is None or not ids else [(before, targets[:1])]
    # In slices, or a chunk of half-precision logits would be held twice over in float32.
    for start in range(0, len(ids) - 1, _LOSS_ROWS):
        stop = min(start + _LOSS_ROWS, len(ids) - 1)
        predictions.append((logits[start:stop], targets[start + 1 : stop + 1]))
    if not predictions:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    losses = [cross_entropy(p.float(), t, reduction="none") for p, t in predictions]
    hits = [p.argmax(-1) == t for p, t in predictions]
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()
