"""Tables and figures for which nothing is trained: drawings, shapes, and what this machine measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformerfam import report
from transformerfam.config import FamConfig
from transformerfam.reproduction import scales
from transformerfam.reproduction.items import Item
from transformerfam.reproduction.page import Page, held_or_not, papers_table, papers_tables
from transformerfam.reproduction.results import UNTRAINED

FLOPS_OF_AN_ACCELERATOR = 4e14  # an H100 in bfloat16, at two fifths of its peak
BENCH_LENGTHS = (2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True)
class Making:
    """What a page is made for.

    Attributes:
        folder: where its pictures go.
        command: that makes it.
        adapter: of the default model, where one is asked; None: nothing trained.
        lengths: in tokens, for the items of `WITH_LENGTHS`.
    """

    folder: Path
    command: str
    adapter: str | None = None
    lengths: tuple[int, ...] = BENCH_LENGTHS


def figure1(making: Making) -> Page:
    """Figures 1 and 2: attention patterns, drawn from the predicates that the code computes with."""
    from transformerfam.plots import draw_masks

    page = Page(
        "figure1", ["# Figures 1 and 2: attention patterns", "", f"    {making.command}", ""]
    )
    picture = making.folder / "figure1.png"
    draw_masks(picture)
    page.pictures.append(picture)
    page.lines += [
        "Who sees whom in sliding window attention, block sliding window attention, and TransformerFAM. "
        "Drawn from the predicates of `transformerfam.masks`, with which the model computes and of "
        "which tests compare each with a plain definition.",
        "",
        f"![Attention patterns]({picture.name})",
    ]
    return page


def figure11(making: Making) -> Page:
    """Figure 11: what block queries and FAM queries look at, in the default model."""
    from transformerfam.attention_maps import draw_attention_maps
    from transformerfam.inspection import inspect_stream
    from transformerfam.models import load
    from transformerfam.text import TokenIds, language_reference

    adapter = making.adapter
    model, tokenizer = load(adapter=adapter, config=None if adapter else UNTRAINED)
    ids = list(islice(TokenIds(tokenizer, [language_reference()]), 6 * model.fam_config.block_size))
    found = inspect_stream(model, ids, baseline=False)
    picture = making.folder / "figure11.png"
    draw_attention_maps(picture, found)
    B = found.config.block_size
    read, last, few = [], [], []
    for layer in found.layers:
        block = layer.written_by_slot[-B:]
        picked = block.sort(0, descending=True).values[: B // 10].sum(0) / block.sum(0)
        read.append(float(layer.shares[B:, 2].mean()))
        last.append(float(layer.shares[-B:, 2].mean()))
        few.append(float(picked.mean()))
    rows = [
        [str(layer.layer), f"{r:.3f}", f"{in_last:.3f}", f"{f:.2f}"]
        for layer, r, in_last, f in zip(found.layers, read, last, few, strict=True)
    ]
    asked = (
        " It shows its memory only to what is asked, and here everything is."
        if found.config.fam_seen == "asked"
        else ""
    )
    header = ["layer", "read from FAM", "in the last block", "by a tenth of the block's tokens"]
    page = Page(
        "figure11", ["# Figure 11: attention maps with FAM", "", f"    {making.command}", ""]
    )
    page.pictures.append(picture)
    page.lines += [
        f"SmolLM2-135M-Instruct, {'trained' if adapter else 'nothing trained'}, reads {len(ids):,} "
        f"tokens of the Python language reference in blocks of {B:,} with {found.config.fam_length} "
        f"feedback slots.{asked}",
        "",
        "## What held here",
        "",
        f"- That block queries read FAM throughout {_in_layers(read, 0.01)}: it gets {min(read):.3f} to "
        f"{max(read):.3f} of their attention; more than a hundredth counts.",
        f"- That FAM queries pick few block positions {_in_layers(few, 0.2)}: the tenth of a block's "
        f"tokens that gets most gets {min(few):.2f} to {max(few):.2f} of what they give to the block; "
        "more than a fifth counts.",
        "",
        f"![Attention maps]({picture.name})",
        "",
        "The share of tokens' attention that goes to FAM from block 1 on; and of what FAM queries give "
        "to the last block, the share that the tenth of its tokens gets that gets most.",
        "",
        report.markdown_table(header, rows),
    ]
    return page


def _in_layers(values: list[float], least: float) -> str:
    """Whether something that the paper shows is so in all layers that were looked at."""
    count = sum(value > least for value in values)
    if 0 < count < len(values):
        return f"**is open ({count} of {len(values)} layers)**"
    return held_or_not(count > 0)


def table3(making: Making) -> Page:
    """Tables 3 and 4: shapes and hyperparameters, built without weights."""
    config = FamConfig.paper()
    rows = []
    for shape in scales.PAPER_MODELS:
        weights = scales.count_weights(shape, config)
        rows.append(
            [
                shape.name,
                *(report.short(weights[k]) for k in ("all", "layers", "lora")),
                report.count(weights["prompt"]),
                f"{weights['prompt'] / weights['all']:.4%}",
            ]
        )
    header = ["model", "weights", "of its layers", "LoRA of rank 64", "FAM prompt", "of all"]
    return Page(
        "table3",
        [
            "# Tables 3 and 4: shapes and hyperparameters",
            "",
            f"    {making.command}",
            "",
            "The three sizes of table 3, built without weights as Llama decoders with PaLM's vocabulary "
            "(the paper's own are Flan-PaLM, whose layers differ). A conversion adds the prompt and "
            "nothing else. The recipe `paper` has the hyperparameters of table 4.",
            "",
            report.markdown_table(header, rows),
            "",
            *papers_tables(["table03_architecture", "table04_hyperparameters"]),
        ],
    )


def table10(making: Making) -> Page:
    """Table 10: what the long-context tasks are."""
    from transformerfam.tasks import TASKS

    rows = [[f"`{name}`", task.about, task.source] for name, task in TASKS.items()]
    return Page(
        "table10",
        [
            "# Table 10: the tasks",
            "",
            f"    {making.command}",
            "",
            "The tasks of `fam eval`, the paper's long-context tasks among them; their data comes from "
            "the hub or from local files.",
            "",
            report.markdown_table(["task", "what it asks", "after"], rows),
            "",
            *papers_tables(["table10_lct_tasks"]),
        ],
    )


def table13(making: Making) -> Page:
    """Tables 13 and 14: memory and time by length, FAM against BSWA."""
    from transformerfam import benchmark
    from transformerfam.models import load

    config = FamConfig.paper(sink_tokens=4)
    model, _ = load(config=config)
    rows, ratios = [], []
    for length, readers in benchmark.run(model, config, making.lengths, skip_full_beyond=1):
        fam, bswa = readers[0], readers[1]
        ratios = fam.ratios(bswa)
        low, median, high = _quartiles(ratios)
        peaks = [report.size(r.peak_bytes[length] or 0) for r in (fam, bswa)]
        rows.append(
            [
                report.count(length),
                f"{fam.prefill_seconds[length]:.1f} s",
                f"{bswa.prefill_seconds[length]:.1f} s",
                f"{median:.2f} ({low:.2f}–{high:.2f})",
                *peaks,
                report.size(fam.state_bytes[length]),
            ]
        )
    header = ["tokens", "FAM", "BSWA", "ratio", "FAM, peak", "BSWA, peak", "FAM, state"]
    return Page(
        "table13",
        [
            "# Tables 13 and 14: memory and time by length",
            "",
            f"    {making.command}",
            "",
            "SmolLM2-135M-Instruct on this machine reads random tokens, block 1024, 3 memory segments, "
            "64 slots; FAM and BSWA take turns chunk by chunk. The ratio is the median over the chunks "
            "read, with quartiles. Peaks are above the weights.",
            "",
            *_cheaper_with_length(ratios),
            report.markdown_table(header, rows),
            "",
            "The paper's ratios of time: "
            + ", ".join(f"{length} {ratio:.3f}" for length, ratio in _papers_ratios())
            + ".",
            "",
            *papers_tables(["table13_memory", "table14_time"]),
        ],
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _cheaper_with_length(ratios: Sequence[float]) -> list[str]:
    """Whether FAM costs the less beside its windows the longer the text, as a section of the page.

    It does if the middle half of the last quarter of all chunks lies below that of the first.
    """
    quarter = len(ratios) // 4
    if quarter < 2:
        return []
    first, last = _quartiles(ratios[:quarter]), _quartiles(ratios[-quarter:])
    verdict = "**is open**"
    if last[2] < first[0] or last[0] > first[2]:
        verdict = held_or_not(last[2] < first[0])
    shown = [f"{median:.2f} ({low:.2f}–{high:.2f})" for low, median, high in (first, last)]
    return [
        "## What held here",
        "",
        f"- That FAM costs less beside BSWA the longer the text {verdict}: {shown[0]} times its time in "
        f"the first {quarter} of {len(ratios)} chunks, {shown[1]} in the last {quarter}.",
        "",
    ]


def _papers_ratios() -> list[tuple[str, float]]:
    header, rows = papers_table("table14_time")
    bswa, fam = ([float(cell) for cell in row[1:]] for row in rows)
    return [(n, f / b) for n, f, b in zip(header[1:], fam, bswa, strict=True)]


# name -> what makes its page
MACHINE: dict[str, Callable[[Making], Page]] = {
    "figure1": figure1,
    "figure11": figure11,
    "table3": table3,
    "table10": table10,
    "table13": table13,
}
# Those that take other lengths.
WITH_LENGTHS = ("table13",)


def paper_page(name: str, item: Item, command: str) -> Page:
    """An item at the paper's size: every variant on every model of table 3, planned and estimated."""
    training, texts = (
        (scales.TUNING, "texts of the mix of instructions")
        if item.tuned
        else (scales.PASSKEY, "PassKey texts")
    )
    header = ["variant", "model", "state of a stream", "tokens, at most", "operations", "days"]
    rows = [row for variant in _of_the_paper(item) for row in _estimates(variant, training)]
    return Page(
        f"{name}-paper",
        [
            f"# {item.title}, at the paper's size",
            "",
            f"    {command}",
            "",
            f"{training['steps']:,} steps of {training['rows']} {texts} of up to "
            f"{training['longest']:,} tokens, counted as if all were as long, LoRA of rank 64, "
            "Adafactor (table 4, section 3.1). Models are built without weights; nothing is trained. "
            "Days are those of one accelerator that does "
            f"{FLOPS_OF_AN_ACCELERATOR:.0e} operations a second.",
            "",
            report.markdown_table(header, rows),
            "",
            *papers_tables(item.paper),
        ],
    )


def _of_the_paper(item: Item) -> list[tuple[str, FamConfig]]:
    variants = scales.distinct(item.experiment, scratch=True)
    return [(v.name, scales.paper_geometry(v, tuned=item.tuned)) for v in variants]


def _estimates(variant: tuple[str, FamConfig], training: dict[str, int]) -> list[list[str]]:
    name, config = variant
    rows = []
    for shape in scales.PAPER_MODELS:
        need = scales.estimate(shape, config, training)
        days = need["flops"] / FLOPS_OF_AN_ACCELERATOR / 86_400
        state = report.size(need["bytes"])
        tokens, operations = report.short(need["tokens"]), f"{need['flops']:.1e}"
        rows.append([name, shape.name, state, tokens, operations, f"{days:.1f}"])
    return rows
