"""Blocks of prose that are read once, before the first step, for texts that are put together of them."""

from __future__ import annotations

import random
from typing import Any

import torch

from transformerfam.data.rows import Mixture, Source
from transformerfam.errors import UserError
from transformerfam.layer_memory import KeyValue
from transformerfam.memory import Memory
from transformerfam.replay import Recording, record
from transformerfam.stream import evaluating

_STREAMS = 4  # that are read side by side


class Library:
    """Blocks of prose that were read once.

    Args:
        model: a TransformerFAM.
        source: what a recipe reads; gives the prose.
        blocks: P, how many at least; streams that are read side by side have as many each.
        seed: of the places of the prose.

    Attributes:
        ids: (P, B), what they say.
        tokens: of each layer, keys, rotated in the frame of their block, and values, (P, Hk, B, D).
    """

    def __init__(self, model: Any, source: Source, blocks: int, seed: int) -> None:
        self.tokens: list[KeyValue] = []
        streams = min(_STREAMS, blocks)
        each = -(-blocks // streams)
        B = model.fam_config.block_size
        rng = random.Random(f"{seed}/library")
        texts = [_prose(source, rng, (each + 1) * B) for _ in range(streams)]
        ids = torch.tensor(texts, device=model.get_input_embeddings().weight.device)
        # The first token of a stream is one to look at for nothing: its block is like no other.
        self.ids = ids[:, B:].unflatten(1, (each, B)).flatten(0, 1)
        memory = Memory.for_model(model, streams)
        with evaluating(model):
            for block, part in enumerate(ids.split(B, dim=1)):
                (read,) = record(model, part, memory)
                if block:
                    self._put(slice(block - 1, None, each), read)

    def __len__(self) -> int:
        return len(self.ids)

    def _put(self, places: slice, read: Recording) -> None:
        if not self.tokens:
            self.tokens = [
                kv.map(lambda x: x.new_empty(len(self), *x.shape[1:])) for kv in read.tokens
            ]
        for kept, new in zip(self.tokens, read.tokens, strict=True):
            kept.keys[places] = new.keys
            kept.values[places] = new.values

    def block(self, layer: int, place: int) -> KeyValue:
        """Keys and values of a block in a layer, (1, Hk, B, D), as views."""
        return self.tokens[layer].map(lambda x: x[place : place + 1])


def _prose(source: Source, rng: random.Random, tokens: int) -> list[int]:
    """So many tokens of what the sources hide things in."""
    if isinstance(source, Mixture):
        source = source.sources[source.place(rng.getrandbits(32))[0]]
    if not hasattr(source, "prose"):
        raise UserError("replay.blocks needs sources of made-up texts, whose prose is read once.")
    ids: list[int] = source.prose(rng, tokens)
    return ids
