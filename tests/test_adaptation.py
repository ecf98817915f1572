"""What is trained of a model, and that what was learned is the same wherever it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from families import converted, some_tokens, tiny
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import BASE, Counting, recipe, trainer
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

import transformerfam
from transformerfam import Memory
from transformerfam.data.rows import Piece
from transformerfam.errors import UserError
from transformerfam.models import ModelError, is_trained, put_adapter
from transformerfam.training import adaptation
from transformerfam.training.batches import Batch
from transformerfam.training.recipe import Recipe
from transformerfam.training.trainer import Trained, Trainer

# Gemma scales and caps, Qwen norms queries and keys, Phi has one matrix for q, k and v.
SOME = ["Llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Gemma 2", "Qwen3", "Phi-3"))]
IDS = some_tokens(2, 23)


def base_folder(place: Path, family: str = "Llama", **changes: Any) -> str:
    folder = place / "base"
    tiny(family, dtype=torch.float32, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def trained_on(made: Recipe, steps: int = 2) -> Trained:
    model, tokenizer = adaptation.load_for_training(made)
    return Trainer(made, model, Counting(), tokenizer=tokenizer, quiet=True).run()


def short(place: Path, base: str, name: str = "adapter", **sections: dict[str, Any]) -> Recipe:
    sections["model"] = {"base": base, **sections.get("model", {})}
    # So few steps are to change something that can be seen.
    sections.setdefault("optimizer", {"learning_rate": 0.1, "warmup_steps": 0})
    sections["run"] = {"steps": 2, **sections.get("run", {})}
    return recipe(place / name, **sections)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def loaded(folder: Path | str) -> Any:
    return transformerfam.load(str(folder))[0]


# ---- where it can be loaded


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("what", ["lora", "prompt"])
def test_an_adapter_loads_to_the_model_that_was_trained(
    family: str, what: str, fam: Run, tmp_path: Path
) -> None:
    base = base_folder(tmp_path, family)
    made = short(tmp_path, base, train={"what": what})
    untrained = adaptation.load_for_training(made)[0]
    trained = trained_on(made).model
    assert not torch.allclose(logits(trained), logits(untrained), atol=1e-2)

    model = loaded(tmp_path / "adapter")
    assert model.fam_config == made.fam and is_trained(model)
    assert_same(model, trained)

    by_hand = converted(made.fam, family, dtype=torch.float32)
    assert_same(PeftModel.from_pretrained(by_hand, str(tmp_path / "adapter")), trained)

    code, _, err = fam("merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--quiet")
    assert (code, err) == (0, "")
    assert_same(loaded(tmp_path / "merged"), trained)


@pytest.mark.parametrize("family", SOME)
def test_a_model_that_was_trained_as_a_whole_loads_as_it_is(family: str, tmp_path: Path) -> None:
    made = short(tmp_path, base_folder(tmp_path, family), train={"what": "full"})
    made = made.replace(optimizer=recipe(optimizer={"learning_rate": 1e-2}).optimizer)
    trained = trained_on(made).model
    model = loaded(tmp_path / "adapter")
    assert model.fam_config == made.fam and is_trained(model)
    assert_same(model, trained)
    assert not (tmp_path / "adapter" / "fam_config.json").exists()


def test_tied_embeddings_are_trained_saved_and_gone_on_with(tmp_path: Path) -> None:
    base = base_folder(tmp_path, tie_word_embeddings=True)
    made = short(tmp_path, base, train={"what": "full"}, run={"steps": 4, "checkpoint_every": 2})
    whole = trained_on(made)
    assert_same(loaded(tmp_path / "adapter"), whole.model)
    parts = made.replace(run=recipe(tmp_path / "parts", run={"steps": 4}).run)
    model, tokenizer = adaptation.load_for_training(parts)
    first = Trainer(parts, model, Counting(), tokenizer=tokenizer, quiet=True)
    losses = first.run(stop=lambda: True).losses
    model, tokenizer = adaptation.load_for_training(parts)
    rest = Trainer(parts, model, Counting(), tokenizer=tokenizer, quiet=True).run(resume=True)
    assert losses + rest.losses == whole.losses
    assert torch.equal(logits(rest.model), logits(whole.model))


def test_an_adapter_without_feedback_has_no_prompt(tmp_path: Path) -> None:
    made = short(tmp_path, base_folder(tmp_path), fam={"fam_length": 0})
    trained = trained_on(made).model
    assert_same(loaded(tmp_path / "adapter"), trained)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)


# ---- the folder


def test_the_folder_is_an_ordinary_one_of_peft(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    made = short(tmp_path, base)
    trained_on(made)
    folder = tmp_path / "adapter"
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "fam_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert not [name for name in files if name.startswith(".")]
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    )
    assert json.loads((folder / "fam_config.json").read_text()) == made.fam.to_dict()
    tensors = load_file(folder / "adapter_model.safetensors")
    prompts = [name for name in tensors if "fam_prompt" in name]
    assert len(prompts) == 1 and tensors[prompts[0]].shape == (2, 32)
    matrices = 3 * 7 * 2
    assert len([name for name in tensors if "lora_" in name]) == matrices == len(tensors) - 1
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_only_the_prompt_is_in_the_adapter_of_a_prompt(tmp_path: Path) -> None:
    trained_on(short(tmp_path, base_folder(tmp_path), train={"what": "prompt"}))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ["fam_prompt" in name for name in tensors] == [True]


def test_files_that_fail_halfway_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("old")
    with pytest.raises(OSError), adaptation.whole_files(tmp_path) as beside:
        (beside / "README.md").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "old"


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """Of a tokenizer with several chat templates transformers writes a folder."""
    for text in ("old", "new"):
        with adaptation.whole_files(tmp_path) as beside:
            (beside / "templates").mkdir()
            (beside / "templates" / f"{text}.jinja").write_text(text)
    assert [path.name for path in (tmp_path / "templates").iterdir()] == ["new.jinja"]


# ---- beginning


def test_going_on_from_an_adapter_starts_with_what_it_says(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    first = trained_on(short(tmp_path, base, train={"dropout": 0.1})).model
    made = short(tmp_path, base, "second", model={"adapter": str(tmp_path / "adapter")})
    model, _ = adaptation.load_for_training(made)
    assert torch.equal(logits(model), logits(first))
    names = adaptation.trained_parameters(model)
    assert names.keys() == adaptation.trained_parameters(first).keys()
    trained = trained_on(made).model
    assert not torch.allclose(logits(trained), logits(first), atol=1e-3)
    assert_same(loaded(tmp_path / "second"), trained)


def test_an_adapter_of_fam_alone_is_not_let_to_tokens_by_training_on(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    trained_on(short(tmp_path, base, fam={**BASE["fam"], "adapted": "fam"}))
    made = short(tmp_path, base, "second", model={"adapter": str(tmp_path / "adapter")})
    with pytest.raises(
        UserError, match=r'trained with fam.adapted="fam", and the recipe has "all"'
    ):
        adaptation.load_for_training(made)


def test_going_on_from_windows_alone_a_prompt_is_trained_too(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    trained_on(short(tmp_path, base, fam={**BASE["fam"], "fam_length": 0}))
    adapter = str(tmp_path / "adapter")
    assert not is_trained(transformerfam.load(adapter, recipe().fam)[0])
    made = short(tmp_path, base, "second", model={"adapter": adapter})
    trained = trained_on(made).model
    assert any("fam_prompt" in name for name in adaptation.trained_parameters(trained))
    assert is_trained(loaded(tmp_path / "second"))
    assert_same(loaded(tmp_path / "second"), trained)


def test_going_on_with_the_prompt_alone_leaves_matrices_as_they_are(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    trained_on(short(tmp_path, base))
    more = {"model": {"adapter": str(tmp_path / "adapter")}, "train": {"what": "prompt"}}
    made = short(tmp_path, base, "second", **more)
    model, _ = adaptation.load_for_training(made)
    assert all("fam_prompt" in name for name in adaptation.trained_parameters(model))
    trained = trained_on(made).model
    assert_same(loaded(tmp_path / "second"), trained)


@pytest.mark.parametrize("layers", [1, 4])
def test_an_adapter_of_another_number_of_layers_is_refused(layers: int, tmp_path: Path) -> None:
    trained_on(short(tmp_path, base_folder(tmp_path)))
    other = converted(recipe().fam, dtype=torch.float32, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=r"\(.* is in one of both alone\)"):
        put_adapter(other, str(tmp_path / "adapter"))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_that_are_the_head_too_are_no_targets(target: str) -> None:
    made = recipe(train={"targets": [target, "q_proj"]})
    tied = converted(made.fam, dtype=torch.float32, tie_word_embeddings=True)
    with pytest.raises(UserError, match="leave embed_tokens and lm_head out"):
        adaptation.adapt(tied, made.train, 0)
    own = converted(made.fam, dtype=torch.float32, tie_word_embeddings=False)
    adaptation.adapt(own, made.train, 0)


@pytest.mark.parametrize("what", ["lora", "full", "prompt"])
def test_equal_recipes_begin_alike_and_another_seed_otherwise(what: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path)

    def began(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 3)  # what happened before does not matter
        made = short(tmp_path, base, train={"what": what}, run={"seed": seed})
        return adaptation.trained_parameters(adaptation.load_for_training(made)[0])

    first, again, other = began(0), began(0), began(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    unlike = {n for n in first if not torch.equal(first[n], other[n])}
    # LoRA's other half begins with 0.
    assert unlike == {n for n in first if "lora_A" in n or "fam_prompt" in n}


def test_lora_starts_as_the_model_that_it_changes() -> None:
    made = recipe()
    model = converted(made.fam, dtype=torch.float32)
    before = logits(model)
    assert torch.equal(logits(adaptation.adapt(model, made.train, 0)), before)


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [(["q_proj"], 1), (["q_proj", "down_proj"], 2), (["all-linear"], 7)],
    ids=str,
)
def test_targets_name_the_matrices(targets: list[str], matrices: int) -> None:
    made = recipe(train={"targets": targets})
    model = adaptation.adapt(converted(made.fam, dtype=torch.float32), made.train, 0)
    names = adaptation.trained_parameters(model)
    assert len([name for name in names if "lora_A" in name]) == 3 * matrices
    assert not [name for name in names if "lm_head" in name]


# ---- what is refused


def test_wrong_targets_are_refused_in_a_sentence() -> None:
    made = recipe(train={"targets": ["query", "attn"]})
    with pytest.raises(UserError) as refusal:
        adaptation.adapt(converted(made.fam, dtype=torch.float32), made.train, 0)
    assert str(refusal.value) == (
        "LoRA finds no matrices called query, attn in this model; see train.targets."
    )


def test_a_model_that_was_not_converted_is_refused() -> None:
    with pytest.raises(UserError, match=r"^Only a TransformerFAM can be trained; convert"):
        adaptation.adapt(tiny(), recipe().train, 0)


@pytest.mark.parametrize("adapter", ["missing", "other shape"])
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(
    adapter: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    if adapter == "other shape":
        made = short(tmp_path, base_folder(tmp_path, hidden_size=48))
        trained_on(made)
    model = converted(recipe().fam, dtype=torch.float32)
    with pytest.raises(UserError) as refusal:
        adaptation.adapt(model, recipe().train, 0, adapter=str(folder))
    message = str(refusal.value)
    assert message.startswith(f"The adapter {folder} cannot be put on this model (")
    assert "\n" not in message


# ---- half precision


HALVES = [("bfloat16", "fp32"), ("bfloat16", "bf16"), ("float32", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), HALVES)
@pytest.mark.parametrize("what", ["lora", "prompt", "full"])
def test_half_precision_trains_wide_weights_through_several_calls(
    dtype: str, precision: str, what: str
) -> None:
    made = recipe(
        model={"dtype": dtype},
        train={"what": what},
        data={"layout": "documents"},
        feedback={"bptt_blocks": 2},
        run={"precision": precision, "steps": 3, "activation_checkpointing": True},
    )
    torch.manual_seed(0)
    model = converted(made.fam, dtype=getattr(torch, dtype))
    model = adaptation.adapt(model, made.train, 0)
    parameters = adaptation.trained_parameters(model)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen <= {getattr(torch, dtype)}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    trained = Trainer(made, model, Counting(40, 60), quiet=True).run()
    assert all(loss and 0 < loss < 10 for loss in trained.losses)
    assert any(not torch.equal(before[n], p) for n, p in parameters.items())
    # And reads in several calls with one memory as in one.
    memory = Memory.for_model(
        trained.model.get_base_model() if what != "full" else trained.model, 2
    )
    with torch.no_grad():
        parts = [
            trained.model(input_ids=part, past_key_values=memory).logits.float()
            for part in IDS.split(5, dim=1)
        ]
    # Half precision rounds differently in pieces; a wrong path is off by as much as the logits are.
    whole = logits(trained.model)
    assert (torch.cat(parts, 1) - whole).norm() < 0.05 * whole.norm()


def test_a_half_precision_adapter_loads_on_its_base(tmp_path: Path) -> None:
    made = short(tmp_path, base_folder(tmp_path), model={"dtype": "bfloat16"})
    trained = trained_on(made).model
    model = transformerfam.load(str(tmp_path / "adapter"), dtype="bfloat16")[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), logits(trained), rtol=0.2, atol=0.2)


def test_half_precision_reaches_the_loss_in_float32() -> None:
    one = trainer(recipe(run={"precision": "bf16"}))
    batch = Batch.of([Piece.of(range(3, 20), [1.0] * 17), Piece.of(range(4, 21), [1.0] * 17)])
    seen: list[torch.dtype] = []
    one.model.register_forward_hook(lambda m, a, out: seen.append(out.logits.dtype))
    assert one.stepper.run(0, [batch])
    assert seen == [torch.float32]
