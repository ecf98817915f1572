"""Requests of lm-evaluation-harness: scored as its own Hugging Face backend, or by one plain call."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TEXT

from transformerfam import models, stream
from transformerfam.errors import UserError

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import _transformerfam_lm_eval as hook
from transformerfam import harness
from transformerfam.harness import StreamingLM
from transformerfam.memory import Memory

# Windows that hold every text here, in blocks that none of them fits into.
PLAIN: dict[str, Any] = {"fam_length": 0, "sink_tokens": 0, "block_size": 16, "memory_segments": 31}
FEEDBACK: dict[str, Any] = {
    "fam_length": 4,
    "sink_tokens": 2,
    "block_size": 16,
    "memory_segments": 1,
}

PAIRS = [
    ("The harbour lay grey", " under the morning rain"),
    ("The harbour lay grey", " over"),
    ("The harbour lay grey", "er"),
    ("A context that ends in blanks  ", "and goes on"),
    ("", "Without a context"),
    ("<s>A beginning that is written out", " once"),
    ("Two lines\n", "\nand more"),
    (TEXT[:300], " and a whole block more than that fits into one"),
]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, n) for n, a in enumerate(arguments)]


def ours(folder: str, **arguments: Any) -> Any:
    return StreamingLM(folder, **{**PLAIN, **arguments})


def theirs(folder: str, **arguments: Any) -> Any:
    return HFLM(folder, device="cpu", dtype="float32", batch_size=1, **arguments)


def scores(model: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(
        instances("loglikelihood", *pairs), disable_tqdm=True
    )
    return found


def alike(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


# ---- without feedback: the same as the harness's own


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"prefix_token_id": 7},
        {"max_length": 40},
    ],
    ids=str,
)
def test_scores_are_those_of_the_harness(folder: str, arguments: dict[str, Any]) -> None:
    alike(
        scores(ours(folder, **arguments), *PAIRS),
        scores(theirs(folder, **arguments, truncation=True), *PAIRS),
    )


def test_greedy_continuations_are_told_from_others(folder: str) -> None:
    model = ours(folder)
    contexts = [context for context, _ in PAIRS if context and not context[-1].isspace()]
    said = model.generate_until(
        instances("generate_until", *((c, {"max_gen_toks": 1, "until": []}) for c in contexts))
    )
    # What was said may be joined to the end of the context when both are made tokens again.
    pairs = [
        (c, s)
        for c, s in zip(contexts, said, strict=True)
        if s and model.tok_encode(c + s)[:-1] == model.tok_encode(c)
    ]
    assert pairs
    assert all(greedy for _, greedy in scores(model, *pairs))
    assert not any(greedy for _, greedy in scores(model, *((c, f"{s}zz") for c, s in pairs)))


@pytest.mark.parametrize("max_length", [None, 24])
def test_whole_texts_are_scored_as_the_harness_does(folder: str, max_length: int | None) -> None:
    texts = [(TEXT[:250],), ("Short.",), ("",)]
    found = ours(folder, max_length=max_length).loglikelihood_rolling(
        instances("loglikelihood_rolling", *texts)
    )
    wanted = theirs(folder, max_length=max_length).loglikelihood_rolling(
        instances("loglikelihood_rolling", *texts)
    )
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("until", [["\n"], ["e", "zz"], [" th", "."], []], ids=str)
def test_what_is_said_is_what_the_harness_says(folder: str, until: list[str]) -> None:
    asked = [(text, {"until": list(until), "max_gen_toks": 12}) for text in ("The", TEXT[:200])]
    found = ours(folder).generate_until(instances("generate_until", *asked))
    wanted = theirs(folder).generate_until(instances("generate_until", *asked))
    assert found == wanted
    assert not any(stop in text for text in found for stop in until)


def test_conversations_are_rendered_as_the_harness_does(folder: str) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for reply in True, False:
        found = ours(folder).apply_chat_template(turns, add_generation_prompt=reply)
        assert found == theirs(folder).apply_chat_template(turns, add_generation_prompt=reply)
    assert ours(folder).chat_template(True) == theirs(folder).chat_template(True)
    model = ours(folder)
    model.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    assert model.apply_chat_template(turns) == "Why?"


# ---- with feedback: one stream


@torch.no_grad()
def nats(model: Any, context: list[int], continuation: list[int]) -> float:
    """log p of a continuation by one call over all, in the plain way."""
    table = model(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return math.fsum(float(table[p, t]) for p, t in zip(places, continuation, strict=True))


def test_nothing_is_cut_however_long(folder: str) -> None:
    model = ours(folder, **FEEDBACK)
    context = (TEXT * 2).strip()
    ids, more = model._encode_pair(context, " once more")
    assert len(ids) > model.model.config.max_position_embeddings
    ((found, _),) = scores(model, (context, " once more"))
    assert found == pytest.approx(nats(model.model, ids, more), abs=1e-3)
    (whole,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (context,)))
    assert whole == pytest.approx(nats(model.model, [model.prefix_token_id], ids), rel=1e-5)


def test_a_context_of_several_choices_is_read_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours(folder, **FEEDBACK)
    pairs = [(TEXT[:200], f" {word}") for word in ("one", "two", "three")] + [PAIRS[0]]
    apart = [scores(model, pair)[0] for pair in pairs]
    read: list[list[int]] = []
    absorb = stream.absorb

    def counting(model: Any, ids: list[int], memory: Memory) -> Any:
        read.append(ids)
        return absorb(model, ids, memory)

    monkeypatch.setattr(harness, "absorb", counting)
    alike(scores(model, *pairs), apart)
    assert read == [model.tok_encode(TEXT[:200]), model.tok_encode(PAIRS[0][0])]


def test_sampling_repeats_by_the_seed_of_torch(folder: str) -> None:
    model = ours(folder, **FEEDBACK)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 30, "max_gen_toks": 8, "until": []}

    def said(seed: int) -> list[str]:
        torch.manual_seed(seed)
        asked = instances("generate_until", ("The", options), ("The", options))
        found: list[str] = model.generate_until(asked)
        return found

    first = said(0)
    assert first == said(0) and first != said(1)
    assert first[0] != first[1]


# ---- arguments


def test_readers_and_geometry_are_arguments(folder: str) -> None:
    loaded, tokenizer = models.load(folder)

    def asked(reader: str) -> Any:
        return StreamingLM(loaded, tokenizer=tokenizer, reader=reader, **FEEDBACK)

    assert asked("full").model.fam_config.attention == "full"
    without = asked("bswa").model.fam_config
    assert (without.fam_length, without.sink_tokens) == (0, 0)
    assert asked("model").model.fam_config.fam_length == 4
    assert loaded.fam_config.fam_length == 0  # what was given stays as it was
    info = ours(folder, **FEEDBACK, dtype="float64").get_model_info()
    assert info["model_dtype"] == "torch.float64"
    assert info["model_geometry"]["fam_length"] == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"block": 3}, "has no model argument block"),
        ({"reader": "best"}, "There is no reader best"),
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"pretrained": object()}, "needs its tokenizer"),
        ({"pretrained": object(), "tokenizer": object()}, "is no TransformerFAM"),
    ],
    ids=["name", "reader", "geometry", "length", "no tokenizer", "another model"],
)
def test_arguments_that_cannot_be_are_refused(
    folder: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        StreamingLM(**{"pretrained": folder, **arguments})


def test_requests_that_cannot_be_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(folder, max_length=4)
    with pytest.raises(UserError, match="does not fit into max_length=4"):
        scores(model, ("The", " harbour lay grey under the rain"))
    with pytest.raises(UserError, match="leaves no room"):
        model.generate_until(instances("generate_until", ("The", {"max_gen_toks": 4})))
    for options in {"repetition_penalty": 2.0}, {"num_beams": 4}:
        with pytest.raises(UserError, match=f"cannot generate with {next(iter(options))}"):
            model.generate_until(
                instances("generate_until", ("The", {**options, "max_gen_toks": 1}))
            )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        ours(folder)


# ---- by name


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness as if it had not been imported with us."""
    kept = {name: cls for name, cls in model_registry.items() if name != "transformerfam"}
    monkeypatch.setattr(model_registry, "_objs", kept)


def test_the_name_is_known_as_soon_as_the_models_of_the_harness_are(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    monkeypatch.setattr(lm_eval, "models", lm_eval.models)
    monkeypatch.delitem(sys.modules, "lm_eval.models")
    waiting: Any = hook.Await()
    monkeypatch.setattr(sys, "meta_path", [waiting, *sys.meta_path])
    assert waiting.find_spec("lm_eval.tasks") is None
    importlib.import_module("lm_eval.models")
    assert waiting not in sys.meta_path
    assert model_registry.get("transformerfam") is StreamingLM
    hook.register()
    assert model_registry.get("transformerfam") is StreamingLM


def test_the_hook_is_installed_and_costs_nothing_when_python_starts() -> None:
    root = Path(__file__).parents[1]
    line = (root / "src" / "_transformerfam_lm_eval.pth").read_text()
    assert line == f"import {hook.__name__}\n"
    settings = (root / "pyproject.toml").read_text()
    for name in "_transformerfam_lm_eval.py", "_transformerfam_lm_eval.pth":
        assert f'"src/{name}" = "{name}"' in settings
    tree = ast.parse(Path(hook.__file__).read_text())
    brought = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in brought] == ["import sys"]


@pytest.mark.slow
def test_a_task_of_the_harness_is_asked_by_name(
    folder: str, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.register()
    rows: list[dict[str, Any]] = [
        {"query": "Is it grey?", "choices": [" yes", " not at all"], "gold": 0},
        {"query": "And the rain?", "choices": [" morning", " ship", " days"], "gold": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "made_up.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = simple_evaluate(
        model="transformerfam",
        model_args=f"pretrained={folder},block_size=16,fam_length=0",
        tasks=["made_up"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    model = StreamingLM(folder, block_size=16, fam_length=0)
    right = []
    for row in rows:
        said = [nats for nats, _ in scores(model, *((row["query"], c) for c in row["choices"]))]
        right.append(said.index(max(said)) == row["gold"])
    assert found["results"]["made_up"]["acc,none"] == sum(right) / 2
    assert found["config"]["model_geometry"]["block_size"] == 16


def test_its_own_command_line_knows_the_name_and_says_what_is_wrong(
    folder: str, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.__main__

    def refused() -> None:
        assert "transformerfam" in model_registry
        raise UserError("Something is wrong.")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", refused)
    with pytest.raises(SystemExit, match="Something is wrong"):
        harness.main()


@pytest.mark.slow
def test_the_harness_has_every_task_that_we_name() -> None:
    from transformerfam.tasks.gpt3 import HARNESS

    known = set(TaskManager().all_tasks)
    assert set(HARNESS.values()) <= known
