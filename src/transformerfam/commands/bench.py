"""`fam bench`: time and memory of FAM, windows and full attention by length, as ratios."""

from __future__ import annotations

import argparse
import json
import platform
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options

if TYPE_CHECKING:
    from transformerfam.benchmark import Reader
    from transformerfam.config import FamConfig

HELP = "measure time and memory against windows alone and against full attention"
_DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam bench`."""
    parser.description = (
        "Read the same random tokens with a feedback memory, with the same windows without it, and "
        "with the untouched model, in turns, and say what prefill and one more token cost at each "
        "length. Trust the ratios; times are this machine's."
    )
    parser.add_argument(
        "--lengths",
        metavar="TOKENS",
        type=_lengths,
        default=_DEFAULT_LENGTHS,
        help="lengths at which to measure, 1024,2048,... (default: 1024 to 32768, doubling)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(1),
        help="measure full attention no further than this",
    )
    parser.add_argument(
        "--chunk",
        metavar="TOKENS",
        type=options.whole(1),
        default=2048,
        help="tokens of a call (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", metavar="COUNT", type=options.whole(1), help="CPU threads (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_model(parser)
    options.add_geometry(parser)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({options.whole(1)(part) for part in text.split(",")}))


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    from transformerfam import benchmark, models
    from transformerfam.commands._session import check_device

    if args.threads:
        torch.set_num_threads(args.threads)
    check_device(args.device)
    progress = report.Progress(quiet=args.json)
    model, _ = models.load(
        args.model or models.EMBEDDED, dtype=args.dtype, device=args.device, adapter=args.adapter
    )
    config = options.changed(_own_geometry(model), options.geometry_changes(args))
    found: dict[str, Reader] = {}
    for length, readers in benchmark.run(
        model, config, args.lengths, chunk=args.chunk, skip_full_beyond=args.full_limit
    ):
        found.update({reader.name: reader for reader in readers})
        progress.update(f"{report.count(length)} tokens measured", now=True)
    progress.clear()
    measured = list(found.values())
    if args.json:
        print(json.dumps(_as_json(measured, config), indent=1))
    else:
        print(_as_text(measured, config))
    return 0


def _own_geometry(model: Any) -> FamConfig:
    """What a model was made with; the default of a memory for one that has none yet."""
    from transformerfam.config import FamConfig
    from transformerfam.models import reading_config

    own: FamConfig = model.fam_config
    return FamConfig() if own == reading_config() else own


def _as_text(readers: list[Reader], config: Any) -> str:
    first, *others = readers
    sections = [
        ("prefill, ms a token", lambda r, n: 1000 * r.prefill_seconds[n] / n, "{:.2f}"),
        ("one more token, ms", lambda r, n: 1000 * r.decode_seconds[n], "{:.1f}"),
    ]
    out = [
        f"{config.describe()}; {_machine(first.model)}",
    ]
    for title, value, form in sections:
        rows = []
        for n in first.prefill_seconds:
            cells = [form.format(value(r, n)) if n in r.prefill_seconds else "–" for r in readers]
            ratios = [
                f"{value(first, n) / value(r, n):.2f}" if n in r.prefill_seconds else "–"
                for r in others
            ]
            rows.append([report.count(n), *cells, *ratios])
        ratio_names = [f"{first.name} / {r.name.removesuffix(' attention')}" for r in others]
        out.append(report.table([title, *(r.name for r in readers), *ratio_names], rows))
    out.append(
        f"Median over all calls: {first.name} takes {first.against(others[0]):.2f} times as long as "
        f"{others[0].name}."
    )
    for title, sizes in (
        ("state", [r.state_bytes for r in readers]),
        ("peak above weights", [r.peak_bytes for r in readers]),
    ):
        rows = []
        for n in first.state_bytes:
            values = [size.get(n) for size in sizes]
            rows.append([report.count(n), *("–" if v is None else report.size(v) for v in values)])
        out.append(report.table([title, *(r.name for r in readers)], rows))
    return "\n\n".join(out)


def _as_json(readers: list[Reader], config: Any) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "machine": _machine(readers[0].model),
        "readers": {
            r.name: {
                "call_seconds": r.call_seconds,
                "prefill_seconds": r.prefill_seconds,
                "decode_seconds": r.decode_seconds,
                "state_bytes": r.state_bytes,
                "peak_bytes": r.peak_bytes,
            }
            for r in readers
        },
    }


def _machine(model: Any) -> str:
    import torch

    place = model.get_input_embeddings().weight.device
    device = (
        torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    return f"{device}, torch {torch.__version__}, {platform.machine()}"
