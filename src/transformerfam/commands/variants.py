"""`fam variants`: what can be set, where it comes from, and what it costs."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.config import FamConfig
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.cost import ModelShape
    from transformerfam.variants import Variant

HELP = "list the variants that can be set, with their papers, settings and costs"

EPILOG = """\
examples:
  fam variants
  fam variants --block-size 512 --length 1000000
  fam variants --model my-model --json

Settings are those of a recipe: fam train paper fam.fam_start=prefix. Those of [fam] are options of
the other commands too: --fam-start prefix. Costs are counted from the geometry (transformerfam.cost),
nothing is run.
"""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam variants`."""
    parser.description = (
        "List every variant that can be set: its paper, what it changes, the settings that give it, "
        "the state that it carries after a text of some length, and what it computes for a token."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="whose shape counts: a folder, a .gguf file or a name on the Hugging Face hub, of which "
        "only the configuration is read (default: the shape of SmolLM2-135M)",
    )
    parser.add_argument(
        "--length",
        metavar="TOKENS",
        type=options.whole(1),
        default=65536,
        help="length of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(_BYTES),
        default="float32",
        help="type of the state (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="give the list as JSON")
    options.add_geometry(parser, "What all variants have in common. By default the paper's.")


def run(args: argparse.Namespace) -> int:
    """List."""
    from transformerfam.variants import VARIANTS

    base = options.changed(FamConfig.paper(), options.geometry_changes(args))
    shape = _shape(args.model)
    found = [_facts(variant, base, shape, args) for variant in VARIANTS]
    if args.json:
        print(json.dumps(found))
        return 0

    print(
        f"State and operations for {args.model or 'the shape of SmolLM2-135M'} in {args.dtype}, after "
        f"{args.length:,} tokens.\nCommon geometry: {base.describe()}.\n"
    )
    print("\n\n".join(map(_text, found)))
    return 0


def _facts(
    variant: Variant, base: FamConfig, shape: ModelShape, args: argparse.Namespace
) -> dict[str, Any]:
    from transformerfam.cost import flops, state_bytes

    try:
        config = variant.config(base)
    except ValueError as error:
        raise UserError(f"{variant.name} does not go with this geometry: {error}") from None
    return {
        "name": variant.name,
        "paper": variant.paper,
        "about": variant.about,
        "settings": variant.settings,
        "state_bytes": state_bytes(config, shape, args.length, _BYTES[args.dtype]),
        "grows": config.slots is None,
        "flops_per_token": flops(config, shape, args.length) / args.length,
    }


def _text(facts: dict[str, Any]) -> str:
    grows = "grows" if facts["grows"] else "stands still"
    lines = [
        facts["about"],
        facts["settings"] or "no settings: this is what the paper proposes",
        f"state {report.size(facts['state_bytes'])}, {grows}; "
        f"{report.short(facts['flops_per_token'])}FLOP a token",
    ]
    return f"{facts['name']} ({facts['paper']})\n" + textwrap.indent("\n".join(lines), "  ")


def _shape(name: str | None) -> ModelShape:
    from transformerfam.cost import SMOLLM2

    if name is None:
        return SMOLLM2
    from transformerfam.commands.info import model_shape
    from transformerfam.models import skeleton

    return model_shape(skeleton(name))
