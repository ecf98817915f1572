"""The model card: README.md beside what was trained, as the Hugging Face hub shows it.

Pure text from a recipe, results and facts. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformerfam import report
from transformerfam.embedded import EMBEDDED
from transformerfam.training import values
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import SourceSettings

_PACKAGES = ("transformerfam", "torch", "transformers", "peft", "accelerate")
# What the default model is called on the hub.
_EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# What a geometry adds to a model, by the names of `FamConfig.added_modules`.
_ADDED = {"fam_prompt": "FAM prompt", "memory_gates": "gates of the memory"}
_PAPERS = {
    "TransformerFAM": "2404.09173",
    "Infini-attention": "2404.07143",
    "RMT": "2207.06881",
    "AutoCompressor": "2305.14788",
}


def model_card(recipe: Recipe, results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """README.md of what a recipe made.

    Args:
        recipe: what was done.
        results: what the probes measured at the end: name of the probe -> names and numbers.
        facts: what else is known of the run: `seconds`, `steps`, `tokens`, `processes`, `left_out`,
            in numbers, and `versions`, package -> version, by default those that are installed. None
            is needed.

    Returns:
        YAML front matter for the hub, then Markdown.
    """
    parts = [
        _front_matter(recipe),
        _what(recipe),
        _loading(recipe),
        "## Geometry\n\n"
        + report.markdown_table(("field", "value"), _rows(recipe.fam.to_dict()))
        + "\n",
        _training(recipe, facts),
    ]
    if results:
        parts.append(_results(recipe, results))
    parts.append(f"## Recipe\n\n```toml\n{recipe.to_toml()}```\n")
    return "\n".join(parts)


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- parts


def _front_matter(recipe: Recipe) -> str:
    adapter = recipe.train.what != "full"
    kind = "compressive" if recipe.fam.compressive_memory != "none" else "feedback"
    tags = ["transformerfam", f"{kind}-memory", "long-context"] + ["lora"] * adapter
    lines = ["---"]
    if base := _on_hub(recipe.model.base):
        lines += [
            f"base_model: {base}",
            f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        ]
    lines += [f"library_name: {'peft' if adapter else 'transformers'}"]
    lines += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    if datasets := [name for s in recipe.data.sources if (name := _data_on_hub(s))]:
        lines += ["datasets:", *(f"- {name}" for name in dict.fromkeys(datasets))]
    return "\n".join([*lines, "---", ""])


def _on_hub(base: str) -> str | None:
    """The name of a model on the hub; None for folders and files, which the hub would not find."""
    if base == EMBEDDED:
        return _EMBEDDED_ON_HUB
    elsewhere = base.endswith(".gguf") or Path(base).exists()
    return base if _HUB_NAME.fullmatch(base) and not elsewhere else None


def _data_on_hub(source: SourceSettings) -> str | None:
    path = source.path
    named = source.kind == "files" and _HUB_NAME.fullmatch(path) and not Path(path).suffix
    return path if named and not Path(path).exists() else None


def _what(recipe: Recipe) -> str:
    fam, base = recipe.fam, recipe.model.base
    if fam.through_stack:
        memory = f"{fam.fam_length} memory tokens from block to block ({fam.recurrence})"
    elif fam.compressive_memory != "none":
        memory = f"a compressive memory in each head ({fam.compressive_memory} rule)"
    elif fam.memory_source == "output":
        memory = "past blocks as the layers' outputs"
    elif fam.has_feedback:
        memory = f"a feedback memory of {fam.fam_length} slots in each layer"
    else:
        memory = "no feedback memory"
    kind = "A model" if recipe.train.what == "full" else "An adapter"
    name = fam.memory_name if fam.memory_name in _PAPERS else "TransformerFAM"
    return (
        f"# {Path(recipe.run.output).name or 'TransformerFAM'}\n\n"
        f"{kind} of `{base}`, which reads texts of any length with it: in blocks of "
        f"{fam.block_size:,} tokens, the {fam.memory_segments} blocks before in sight, and {memory} "
        f"([{name}](https://arxiv.org/abs/{_PAPERS[name]})). Trained was {_trained(recipe)}.\n"
    )


def _trained(recipe: Recipe) -> str:
    """What of the model was trained, in words."""
    if recipe.train.what == "full":
        return "every weight"
    added = " and the ".join(_ADDED[name] for name in recipe.fam.added_modules)
    if recipe.train.what == "prompt":
        return f"the {added} alone"
    where = "" if recipe.fam.adapted == "all" else " where FAM goes through them"
    return f"LoRA on its matrices{where}" + (f" and the {added}" if added else "")


def _loading(recipe: Recipe) -> str:
    return (
        "## How to load it\n\n"
        "With `folder` the place of these files:\n\n"
        '```python\nimport transformerfam\n\nmodel, tokenizer = transformerfam.load("folder")\n```\n\n'
        "or on the command line:\n\n"
        "```bash\nfam read book.txt --model folder\n```\n"
        + (
            ""
            if recipe.train.what == "full" or recipe.fam.adapted == "fam"
            else "\n`fam merge folder merged` makes a model of its own of it.\n"
        )
    )


def _training(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    longest = facts.get("longest", recipe.data.length)
    sources = "<br>".join(_source(source, longest) for source in recipe.data.sources)
    rows = [("data", sources or "not of the recipe")]
    rows.append(("steps", f"{facts.get('steps', recipe.run.steps):,}"))
    rows.append(("rows of a step", f"{recipe.data.batch_size:,}"))
    if "tokens" in facts:
        rows.append(("tokens read", f"{facts['tokens']:,}"))
    if recipe.replay.blocks and recipe.fam.has_feedback:
        count, times = recipe.replay.blocks, recipe.replay.times
        blocks = f"{count:,} blocks of prose, each text with {times} drawn parts of them"
        rows.append(("replayed, and counted as read", blocks))
    if "seconds" in facts:
        rows.append(("duration", report.duration(facts["seconds"])))
    if facts.get("left_out"):
        rows.append(("examples left out", f"{facts['left_out']:,}"))
    if facts.get("processes", 1) > 1:
        rows.append(("processes", str(facts["processes"])))
    rows.append(("seed", str(recipe.run.seed)))
    versions = facts.get("versions") or package_versions()
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return "## Training\n\n" + report.markdown_table(("", ""), rows) + "\n"


def _source(source: SourceSettings, longest: int) -> str:
    """A source, whose texts came to `longest` tokens at most if they are made as needed."""
    what = f"`{source.path}`" if source.kind == "files" else source.described(longest)
    return what if source.share == 1 else f"{what}, share {source.share:g}"


def _results(recipe: Recipe, results: Mapping[str, Any]) -> str:
    notes = {
        "heldout": "Mean loss of a token in nats, on texts that were not trained on.",
        "passkey": f"Share of keys said without a mistake, of {recipe.probes.passkey_samples} at each "
        "length in tokens.",
    }
    parts = ["## Results\n"]
    for name, numbers in results.items():
        head = f"### {name}\n\n"
        note = f"{notes[name]}\n\n" if name in notes else ""
        listed = numbers if isinstance(numbers, Mapping) else {name: numbers}
        parts.append(head + note + report.markdown_table(("", "value"), _rows(listed)) + "\n")
    return "\n".join(parts)


def _rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), _cell(value)) for name, value in numbers.items() if value is not None]


def _cell(value: Any) -> str:
    if isinstance(value, (bool, str, list, tuple)):
        return f"`{values.toml_value(value)}`"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
