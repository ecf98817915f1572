"""The same comparisons beyond toys: SmolLM2 on one accelerator, and the paper's own size on paper.

`small` trains the default model by the shipped recipe `passkey` with blocks of a quarter of the
paper's. `paper` holds the paper's hyperparameters (table 4, section 3.1) and shapes (table 3); it
builds the models without weights, plans, and estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from transformerfam.config import FamConfig
from transformerfam.cost import ModelShape, state_bytes, tuning_flops
from transformerfam.errors import UserError
from transformerfam.reproduction.experiment import Experiment, Planned, Variant
from transformerfam.reproduction.items import Item
from transformerfam.reproduction.runs import Result, Run

if TYPE_CHECKING:
    from transformerfam.training.recipe import Recipe

# A toy has blocks of 16 and, but for table 5, 8 slots where the paper has 1024 and 64.
_TOY_BLOCK, _TOY_SLOTS, _SLOTS = 16, 8, 64
_SEGMENTS = 3  # of a FAM beside PassKey


@dataclass(frozen=True)
class PaperModel:
    """A model of table 3.

    Attributes:
        name: by its weights.
        layers, width, heads: of the decoder.
        feedforward: width of the feed-forward, in widths of the model.
        key_heads: heads of keys and values; 1: multi-query attention.
    """

    name: str
    layers: int
    width: int
    feedforward: int
    heads: int
    key_heads: int


PAPER_MODELS = (
    PaperModel("1B", 18, 1536, 8, 12, 12),
    PaperModel("8B", 32, 4096, 4, 32, 32),
    PaperModel("24B", 56, 4096, 8, 32, 1),
)
_VOCABULARY = 256_000  # PaLM's
LORA_RANK = 64
PASSKEY = {"steps": 5000, "rows": 128, "longest": 18_432}
TUNING = {"steps": 50_000, "rows": 128, "longest": 8_704}


def paper_geometry(variant: Variant, block: int = 1024, *, tuned: bool = False) -> FamConfig:
    """A toy variant's geometry at the paper's size, or at that of another block size.

    Args:
        variant: of a toy.
        block: B.
        tuned: of a model tuned on instructions: a FAM has past blocks beside it (table 4).
    """
    fam = {k: v for k, v in variant.fam.items() if k not in ("feedback_norm", "feedback_rms")}
    if fam.get("fam_length"):
        fam["fam_length"] = fam["fam_length"] * _SLOTS // _TOY_SLOTS
        if tuned:
            fam["memory_segments"] = _SEGMENTS
    fam.update(variant.paper)
    if fam.get("fam_length"):
        fam["fam_length"] = max(1, fam["fam_length"] * block // 1024)
    if fam.get("window"):
        fam["window"] = fam["window"] * block // _TOY_BLOCK
    return FamConfig.paper(**{"block_size": block, **fam})


def distinct(its: Experiment, *, scratch: bool = False) -> list[Variant]:
    """Variants that differ at another size than a toy's; of those that come to the same, the last.

    Rates, steps and open gates are a toy's own, and so is linear attention.

    Args:
        its: what is compared.
        scratch: models are trained from nothing, so that they may have another rotary base.
    """
    kept: dict[str, Variant] = {}
    for variant in its.variants:
        own = {name: value for name, value in variant.model.items() if name != "gates"}
        if not own or (scratch and set(own) == {"rope_theta"}):
            said = asdict(paper_geometry(variant)), dict(variant.feedback), own
            kept[repr(said)] = variant
    return [variant for variant in its.variants if variant in kept.values()]


# ---- small

SMALL_LONGEST = 18_432  # of the recipe `passkey`


def small_item(item: Item) -> Item:
    """An item as its page at this scale tells of it."""
    about = (
        "PassKey as in figure 10: a key at the start, then filler. Settings of training that variants "
        "are compared by are off in the others."
    )
    its = replace(item.experiment, unit="tokens", longest=SMALL_LONGEST)
    return replace(item, about=about, experiment=its)


def small_plan(
    its: Experiment, seeds: Sequence[int], *, lengths: Sequence[int] | None, steps: int | None
) -> Iterator[Planned]:
    """The runs of an experiment for the default model on one accelerator.

    Raises:
        UserError: for what has no counterpart there.
    """
    if its.kind != "passkey":
        raise UserError(
            "At the scale small this item needs texts to train on; train with `fam train "
            "paper` and measure with `fam eval --tasks documents`."
        )
    if its.asked != ("1 start",):
        raise UserError(
            "At the scale small one key at the start is asked for, and this item asks for others; "
            "train with `fam train passkey` and measure with `fam eval --tasks passkey-late,passkey-3`."
        )
    compared = {name for variant in its.variants for name in variant.feedback}
    for seed in seeds:
        for variant in distinct(its):
            geometry = paper_geometry(variant, block=256)
            feedback = {**dict.fromkeys(sorted(compared), 0), **variant.feedback}
            if geometry.is_static or geometry.through_stack:
                feedback["state_passing"] = (
                    0  # these cannot begin with the F that the recipe passes
                )
            run = {
                "kind": "small",
                "seed": seed,
                "steps": steps or 1000,
                "lengths": list(lengths or (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)),
                "fam": geometry.to_dict(),
                "feedback": feedback,
                "count": its.count,
            }
            yield Planned(variant.name, seed, run)


def small_work(run: Run) -> Result:
    """Train SmolLM2 by the recipe `passkey` under the run's geometry, and ask it."""
    import time

    from transformerfam.tasks import TASKS, Wanted
    from transformerfam.training.adaptation import load_for_training
    from transformerfam.training.inputs import open_source
    from transformerfam.training.trainer import Trainer

    recipe = small_recipe(run)
    model, tokenizer = load_for_training(recipe)
    began = time.monotonic()
    trained = Trainer(
        recipe, model, open_source(recipe, tokenizer), tokenizer=tokenizer, quiet=True
    )
    losses = [loss for loss in trained.run().losses if loss is not None]
    seconds = time.monotonic() - began
    wanted = Wanted(tokenizer, run["lengths"], samples=run["count"], seed=run["seed"])
    accuracy = {}
    for case in TASKS["passkey"].cases(wanted):
        metrics = [case.make(i).ask(model.eval()) for i in range(case.count)]
        accuracy[str(case.setting["length"])] = sum(m["exact"] for m in metrics) / len(metrics)
    return {
        "accuracy": {"1 start": accuracy},
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": round(seconds, 1),
    }


def small_recipe(run: Run) -> Recipe:
    """The recipe `passkey` with the settings that a run changes."""
    from transformerfam.training.recipe import Recipe, find

    recipe = Recipe.load(find("passkey"))
    return recipe.replace(
        fam=FamConfig.from_dict(run["fam"]),
        feedback=replace(recipe.feedback, **run["feedback"]),
        run=replace(recipe.run, seed=run["seed"], steps=run["steps"]),
        probes=replace(recipe.probes, every=0),
    )


# ---- the paper's size


@cache
def count_weights(shape: PaperModel, config: FamConfig) -> Mapping[str, int]:
    """Build a model of table 3 without weights, and count: layers, all, the prompt, LoRA's."""
    import torch

    model = _build(shape, config)
    decoder = model.get_decoder()
    layers = [p for layer in decoder.layers for p in layer.parameters()]
    matrices = [
        m for layer in decoder.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)
    ]
    prompt = getattr(decoder, "fam_prompt", None)
    return {
        "layers": sum(p.numel() for p in layers),
        "all": sum(p.numel() for p in model.parameters()),
        "prompt": 0 if prompt is None else prompt.weight.numel(),
        "lora": sum(LORA_RANK * (m.in_features + m.out_features) for m in matrices),
    }


def _build(shape: PaperModel, config: FamConfig) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from transformerfam.conversion import family_config, family_model

    its_config = family_config(LlamaConfig)(
        hidden_size=shape.width,
        intermediate_size=shape.feedforward * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=True,
        fam=config.to_dict(),
    )
    with torch.device("meta"):
        return family_model(LlamaForCausalLM)(its_config)


def estimate(shape: PaperModel, config: FamConfig, training: Mapping[str, int]) -> dict[str, float]:
    """What training at the paper's size takes.

    Returns:
        `tokens` read and `flops` (`cost.tuning_flops`), if all texts were as long as the longest, and
        `bytes` of state of one stream in bfloat16 after it.
    """
    weights = count_weights(shape, FamConfig.paper())
    head = shape.width // shape.heads
    sizes = ModelShape(
        layers=shape.layers,
        layer_weights=weights["layers"],
        head_weights=_VOCABULARY * shape.width,
        attention_width=shape.width,
        key_value_width=shape.key_heads * head,
        hidden_size=shape.width,
        head_size=head,
    )
    tokens = training["steps"] * training["rows"] * training["longest"]
    each = tuning_flops(config, sizes, training["longest"])
    return {
        "tokens": tokens,
        "flops": float(each * training["steps"] * training["rows"]),
        "bytes": state_bytes(config, sizes, training["longest"], number_bytes=2),
    }
