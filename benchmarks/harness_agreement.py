"""Do scores in lm-evaluation-harness equal those of its own Hugging Face backend?

    python benchmarks/harness_agreement.py --data FOLDER --limit 20

Asks the same model twice about the same rows: as `hf`, and as `transformerfam` without feedback and with
a window that covers every row, in blocks of 128 tokens. FOLDER holds files in the columns of llm-foundry
(arc_easy.jsonl, lambada_openai.jsonl, ...); those that are missing are left out. A rolling task reads
passages of the Python language reference, which every Python carries.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from transformerfam.embedded import embedded_folder
from transformerfam.harness import StreamingLM
from transformerfam.report import table
from transformerfam.text import language_reference

PASSAGE = 2000  # characters
GEOMETRY: dict[str, Any] = {
    "fam_length": 0,
    "sink_tokens": 0,
    "block_size": 128,
    "memory_segments": 15,
}

_CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query.strip()}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# `doc_to_text` that is a number says that the contexts are the choices.
_FIT = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "context_options",
    "doc_to_target": "continuation",
    "metric_list": [{"metric": "acc"}],
}
# Name of a file -> how the harness asks its rows.
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": _CHOOSE,
    "arc_challenge": _CHOOSE,
    "openbook_qa": {**_CHOOSE, "doc_to_text": "query"},
    "piqa": _CHOOSE,
    "winograd_wsc": _FIT,
    "winogrande": _FIT,
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "triviaqa_sm_sub": {
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "aliases",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [
            {
                "name": "first",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    "passages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(data: Path, folder: Path, limit: int) -> list[str]:
    """A YAML file for each task that has its rows; the names of the tasks."""
    prose = language_reference()
    rows = [{"text": prose[i * PASSAGE : (i + 1) * PASSAGE]} for i in range(limit)]
    (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = []
    for name, how in TASKS.items():
        file = (folder if name == "passages" else data) / f"{name}.jsonl"
        if not file.is_file():
            continue
        task = {
            "task": f"agree_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
            "test_split": "test",
            **how,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        names.append(task["task"])
    return names


def ask(model: Any, names: list[str], folder: Path, limit: int) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """The largest of log-likelihoods, or how many texts are the same."""
    by_number = [{s["doc_id"]: s["resps"] for s in samples} for samples in (ours, theirs)]
    pairs = [
        (a[0], b[0])
        for number in by_number[0]
        for a, b in zip(by_number[0][number], by_number[1][number], strict=True)
    ]
    if isinstance(pairs[0][0], str):
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts the same"
    numbers = [[float(x[0] if isinstance(x, (tuple, list)) else x) for x in p] for p in pairs]
    return f"{max(abs(a - b) for a, b in numbers):.1e} of {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--model", help="a folder of a plain model (default: the small one)")
    args = parser.parse_args()
    model = args.model or str(embedded_folder())
    with tempfile.TemporaryDirectory() as scratch:
        names = write_tasks(args.data, Path(scratch), args.limit)
        answers = []
        for made in (
            lambda: StreamingLM(model, dtype="float32", **GEOMETRY),
            lambda: HFLM(model, dtype="float32", device="cpu", batch_size=1),
        ):
            answers.append(ask(made(), names, Path(scratch), args.limit))
    ours, theirs = answers
    rows = []
    for name in names:
        for metric, value in ours["results"][name].items():
            metric_name = metric.partition(",")[0]
            if not isinstance(value, float) or "stderr" in metric:
                continue
            shown = [f"{value:.4f}", f"{theirs['results'][name][metric]:.4f}"]
            gap = difference(ours["samples"][name], theirs["samples"][name])
            rows.append([name.removeprefix("agree_"), metric_name, *shown, gap])
    print(table(["task", "metric", "transformerfam", "hf", "largest difference"], rows))


if __name__ == "__main__":
    main()
