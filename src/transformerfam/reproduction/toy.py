"""PassKey without words: a small decoder from scratch, and texts of token ids made as needed.

A marker and a few digits stand somewhere in random filler; at the end a query mark asks for the
digits. With several keys each has a name, and the query names one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.conversion import convert
from transformerfam.data.examples import Example
from transformerfam.data.rows import Source
from transformerfam.modules import decoder_of
from transformerfam.reproduction.experiment import Shape
from transformerfam.reproduction.runs import Run
from transformerfam.training.adaptation import adapt
from transformerfam.training.probes import logits_from
from transformerfam.training.recipe import Recipe
from transformerfam.training.trainer import Trainer

Where = Literal["start", "anywhere", "late"]

# Token ids: 0 to 9 are digits.
MARKER, QUERY, FIRST_NAME, FIRST_FILLER, VOCABULARY = 10, 11, 12, 16, 64


def toy_model(
    config: FamConfig,
    shape: Shape,
    seed: int,
    *,
    vocabulary: int = VOCABULARY,
    rope_theta: float = 10_000.0,
    gates: float | None = None,
) -> Any:
    """A TransformerFAM with random weights; `gates`: β of a compressive memory, if not as usual."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    llama = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=shape.block,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    # Of a model that has learned nothing no token is better to start from than another.
    model = convert(LlamaForCausalLM(llama), config, prompt="vocabulary", seed=seed)
    if gates is not None:
        torch.nn.init.constant_(decoder_of(model).memory_gates.weight, gates)
    return model


@dataclass(frozen=True)
class ToyPasskeys:
    """A `Source` of PassKey texts of whole blocks; all rows of a step have the same length.

    Attributes:
        shape: of texts and batch.
        keys: keys in a text, one of which is asked for.
        where: `start`: keys in the first blocks, one a block; `anywhere`: each in a block of its own
            (while there are enough) before the last; `late`: the key asked for in the block before
            the last, the others anywhere. In its block a key always stands at the same place: what
            is to be learned is to remember, not to search.
        most_blocks: of a text; the fewest are 2.
        seed: of everything.
    """

    shape: Shape
    keys: int = 1
    where: Where = "start"
    most_blocks: int = 6
    seed: int = 0

    @classmethod
    def named(cls, shape: Shape, name: str, most_blocks: int = 6, seed: int = 0) -> ToyPasskeys:
        """From a name such as "3 late"."""
        keys, where = name.split()
        return cls(shape, int(keys), where, most_blocks, seed)  # type: ignore[arg-type]

    def draw(self, number: int) -> Example:
        """The number-th text; row r of the batch reads r, r + rows, r + 2 · rows, ..."""
        step = number // self.shape.rows
        blocks = random.Random(f"{self.seed}/blocks/{step}").randint(2, self.most_blocks)
        return self.example(random.Random(f"{self.seed}/text/{number}"), blocks)

    def example(self, rng: random.Random, blocks: int) -> Example:
        """A text of so many blocks, whose last tokens are the question and the digits."""
        block, digits = self.shape.block, self.shape.digits
        ids = [rng.randrange(FIRST_FILLER, VOCABULARY) for _ in range(blocks * block)]
        keys = [[rng.randrange(10) for _ in range(digits)] for _ in range(self.keys)]
        asked = rng.randrange(self.keys)
        for key, place in enumerate(self._places(rng, blocks, asked)):
            said = [MARKER, *self._name(key), *keys[key]]
            # Keys that share a block do not overlap: each has its own part of any block.
            start = place * block + key * (block // self.keys)
            ids[start : start + len(said)] = said
        question = [QUERY, *self._name(asked), *keys[asked]]
        ids[-len(question) :] = question
        weights = [0.0] * (len(ids) - digits) + [1.0] * digits
        return Example(tuple(ids), tuple(weights))

    def _name(self, key: int) -> list[int]:
        """One key needs no name."""
        return [FIRST_NAME + key] if self.keys > 1 else []

    def _places(self, rng: random.Random, blocks: int, asked: int) -> list[int]:
        """The block of each key; the last block is for the question."""
        before = blocks - 1
        if self.where == "start":
            return [min(key, before - 1) for key in range(self.keys)]
        if before >= self.keys:
            places = rng.sample(range(before), self.keys)
        else:
            places = [rng.randrange(before) for _ in range(self.keys)]
        if self.where == "late":
            places[asked] = before - 1
        return places


@dataclass(frozen=True)
class TakingTurns:
    """A `Source` that takes every step from the next of several, so that a step is of one kind."""

    sources: tuple[ToyPasskeys, ...]

    def draw(self, number: int) -> Example:
        """See `Source`."""
        step = number // self.sources[0].shape.rows
        return self.sources[step % len(self.sources)].draw(number)


def digit_accuracy(
    model: Any,
    source: ToyPasskeys,
    blocks: int,
    count: int,
    read: Callable[[Any, Tensor, int], Tensor] = logits_from,
) -> float:
    """Share of the digits of `count` keys, after texts that training never sees; chance is 0.1.

    `read` gives the model's predictions after the tokens of ids (R, T) from a place on.
    """
    rng = random.Random(f"asked/{blocks}")
    ids = torch.tensor([list(source.example(rng, blocks).ids) for _ in range(count)])
    digits = source.shape.digits
    model.eval()
    logits = read(model, ids, ids.shape[1] - digits - 1)
    return float((logits[:, :-1].argmax(-1) == ids[:, -digits:]).float().mean())


def sources_of(run: Run) -> TakingTurns:
    """What a run is trained on."""
    shape, most = Shape(**run["shape"]), run["most_blocks"]
    named = [ToyPasskeys.named(shape, name, most, run["seed"]) for name in run["trained"]]
    return TakingTurns(tuple(named))


def trained(run: Run) -> tuple[Any, list[float]]:
    """A toy model that has learned, and the loss of each step; see `experiment.plan`."""
    return train(run, sources_of(run), VOCABULARY)


def train(run: Run, source: Source, vocabulary: int) -> tuple[Any, list[float]]:
    """A toy model of that vocabulary from scratch, trained on a source as the run says."""
    recipe, shape = recipe_of(run), Shape(**run["shape"])
    model = toy_model(recipe.fam, shape, run["seed"], vocabulary=vocabulary, **run["model"])
    adapt(model, recipe.train, run["seed"])
    losses = Trainer(recipe, model, source, quiet=True).run().losses
    return model, [loss for loss in losses if loss is not None]


def recipe_of(run: Run) -> Recipe:
    """How a toy is trained."""
    shape = Shape(**run["shape"])
    geometry = {"block_size": shape.block, "sink_tokens": 0, "first_residual": "zero"}
    return Recipe.from_dict(
        {
            "fam": {**geometry, **run["fam"]},
            "train": {"what": "full"},
            "data": {
                "layout": "single",
                "length": run["most_blocks"] * shape.block,
                "batch_size": shape.rows,
            },
            "optimizer": {"beta2": 0.999, **run["optimizer"]},
            # A model that has learned nothing cannot be harmed.
            "feedback": {"bias_steps": 0, **run["feedback"]},
            "run": {"steps": run["steps"], "seed": run["seed"], "activation_checkpointing": False},
        }
    )


def asked(
    model: Any, run: Run, read: Callable[[Any, Tensor, int], Tensor] = logits_from
) -> Mapping[str, Mapping[str, float]]:
    """What was asked -> blocks -> share of digits said right; `read` as in `digit_accuracy`."""
    shape, count = Shape(**run["shape"]), run["count"]
    return {
        name: {
            str(blocks): digit_accuracy(model, ToyPasskeys.named(shape, name), blocks, count, read)
            for blocks in run["lengths"]
        }
        for name in run["asked"]
    }
