"""The loop: what it changes, what it writes, and that a run which goes on is one run."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, converted
from safetensors.torch import load_file
from torch import Tensor

from transformerfam.data.examples import Example
from transformerfam.data.rows import Source
from transformerfam.errors import UserError
from transformerfam.training import adaptation, checkpoint
from transformerfam.training.checkpoint import changed_setting
from transformerfam.training.journal import Journal
from transformerfam.training.recipe import Recipe, find
from transformerfam.training.trainer import Trained, Trainer, TrainingStopped, make_accelerator

B = 4
STEPS = 5
BASE: dict[str, dict[str, Any]] = {
    "fam": {"block_size": B, "memory_segments": 1, "fam_length": 2, "sink_tokens": 1},
    "train": {"rank": 2, "alpha": 4.0},
    "data": {"length": 4 * B, "batch_size": 2},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "feedback": {"bias_steps": 0},
    "run": {"steps": STEPS, "tensorboard": False, "activation_checkpointing": False},
}


class Counting:
    """Texts that count up from a random token: easy to learn, and each of another length."""

    def __init__(self, shortest: int = 10, longest: int = 30, unweighted: int = 0) -> None:
        self.shortest = shortest
        self.longest = longest
        self.unweighted = unweighted  # tokens of each text that do not count

    def draw(self, number: int) -> Example:
        rng = random.Random(f"text/{number}")
        length, first = rng.randint(self.shortest, self.longest), rng.randrange(VOCABULARY)
        ids = [3 + (first + i) % (VOCABULARY - 3) for i in range(length)]
        return Example(tuple(ids), tuple(float(i >= self.unweighted) for i in range(length)))


class Same(Counting):
    """The same text again and again, of the length of a row."""

    def draw(self, number: int) -> Example:
        return super().draw(0)


class Failing(Counting):
    """Breaks down when it has been asked so many times."""

    def __init__(self, times: int, longest: int = 30) -> None:
        super().__init__(longest=longest)
        self.times = times

    def draw(self, number: int) -> Example:
        self.times -= 1
        if self.times < 0:
            raise ConnectionError("the disk is gone")
        return super().draw(number)


def recipe(folder: Path | None = None, **sections: dict[str, Any]) -> Recipe:
    table = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
    if folder is not None:
        table["run"]["output"] = str(folder)
    return Recipe.from_dict(table)


def trainer(made: Recipe, source: Source | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = converted(made.fam, dtype=torch.float32, num_hidden_layers=2)
    model = adaptation.adapt(model, made.train, made.run.seed)
    return Trainer(made, model, source or Counting(), quiet=True, **options)


def test_a_model_of_another_geometry_than_the_recipes_is_refused() -> None:
    made = recipe()
    model = converted(made.fam.replace(memory_segments=0), dtype=torch.float32)
    model = adaptation.adapt(model, made.train, made.run.seed)
    with pytest.raises(
        UserError, match=r"has memory_segments 0 and the recipe fam\.memory_segments 1"
    ):
        Trainer(made, model, Counting(), quiet=True)
    drawn = recipe(feedback={"drawn_segments": [0, 1]})
    Trainer(drawn, model, Counting(), quiet=True)  # each step sets them


def run(
    made: Recipe,
    source: Source | None = None,
    *,
    resume: bool = False,
    steps: int = -1,
    **options: Any,
) -> Trained:
    """Train; ask it to stop after so many steps."""
    left = iter(range(steps - 1, -2, -1))
    return trainer(made, source, **options).run(
        resume=resume, stop=lambda: steps > 0 and next(left) == 0
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- what is trained


TRAINED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "lora": ("lora", lambda name: "lora_" in name or "fam_prompt.modules_to_save" in name),
    "full": ("full", lambda name: True),
    "prompt": ("prompt", lambda name: "fam_prompt.modules_to_save" in name),
}


@pytest.mark.parametrize("what", TRAINED)
def test_a_run_lowers_the_loss_and_changes_what_it_says_and_nothing_else(
    what: str, tmp_path: Path
) -> None:
    made = recipe(
        tmp_path,
        train={"what": what},
        run={"steps": 12, "activation_checkpointing": True},
        optimizer={"learning_rate": 0.1 if what == "prompt" else 1e-2},
    )
    one = trainer(made, Same())
    before = weights(one.model)
    trained = one.run()
    assert trained.steps == 12 and len(trained.losses) == 12
    first, last = trained.losses[0], trained.losses[-1]
    # The prompt alone has little to say in so small a model.
    assert first and last and last < first - (0.01 if what == "prompt" else 0.5)
    after = weights(trained.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {n for n, p in trained.model.named_parameters() if TRAINED[what][1](n)}
    # Half of LoRA's matrices have no gradient while the others are 0, but all move by the end.
    assert changed == wanted
    assert not trained.model.training


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(recipe()).folder is None
    assert run(recipe(), steps=2).interrupted
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_give_the_losses_of_the_whole_batch() -> None:
    for layout in ("packed", "single", "documents"):
        data = {"layout": layout, "batch_size": 4, "length": 32}
        whole, parts = (
            run(recipe(data={**data, "micro_batch_size": m}, run={"steps": 2})).losses
            for m in (0, 2)
        )
        assert parts == pytest.approx(whole, rel=1e-5), layout


def test_micro_batches_each_carry_their_memory_through_documents() -> None:
    data = {"layout": "documents", "batch_size": 4, "length": B}
    whole, parts = (
        run(recipe(data={**data, "micro_batch_size": m}), Counting(longest=90)).losses
        for m in (0, 2)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


# ---- going on


RANDOM = {"state_passing": 0.7, "position_offset": 0.8, "bias_start": -20.0, "bias_steps": 4}
ZERO = {"fam_position": "zero"}
DROPOUT = {"dropout": 0.2}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "packed, everything random, dropout": {"feedback": RANDOM, "fam": ZERO, "train": DROPOUT},
    "packed, full, Adafactor": {
        "feedback": RANDOM,
        "train": {"what": "full"},
        "optimizer": {"name": "adafactor"},
    },
    "packed, Adafactor, micro batches": {
        "data": {"micro_batch_size": 1},
        "feedback": RANDOM,
        "train": DROPOUT,
        "optimizer": {"name": "adafactor", "schedule": "cosine"},
    },
    "documents, truncated, micro batches": {
        "data": {"layout": "documents", "length": 10, "batch_size": 4, "micro_batch_size": 2},
        "feedback": {"bptt_blocks": 2},
        "fam": ZERO,
        "train": DROPOUT,
    },
    "single": {
        "data": {"layout": "single", "length": 24},
        "feedback": {"state_passing": 1.0},
        "train": DROPOUT,
        "run": {"activation_checkpointing": True},
        "optimizer": {"weight_decay": 0.1, "schedule": "linear"},
    },
    "prompt alone": {"train": {"what": "prompt"}, "fam": {"first_residual": "prompt"}},
}


# The others take seconds each for the same contract: `make slow`.
QUICK = ("packed, everything random, dropout", "documents, truncated, micro batches")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(kind: str, tmp_path: Path) -> None:
    source = Counting(longest=40 if "documents" in kind else 30)
    whole = run(recipe(tmp_path / "whole", **KINDS[kind]), source)
    for stop in (1, 2, STEPS - 1):
        folder = tmp_path / str(stop)
        made = recipe(folder, **KINDS[kind])
        part = run(made, source, steps=stop)
        assert part.interrupted and part.steps == stop
        assert not (folder / "README.md").exists()
        rest = run(made, source, resume=True)
        assert part.losses + rest.losses == whole.losses
        assert metrics(folder) == metrics(tmp_path / "whole")
        assert_identical(weights(rest.model), weights(whole.model))


@pytest.mark.slow
def test_a_run_goes_on_after_several_stops(tmp_path: Path) -> None:
    kind = KINDS["documents, truncated, micro batches"]
    whole, losses = run(recipe(tmp_path / "whole", **kind)), []
    for step in range(STEPS):
        made = recipe(tmp_path / "parts", **kind)
        losses += run(made, steps=1, resume=step > 0).losses
    assert losses == whole.losses


def test_steps_in_which_nothing_counts_come_before_the_first_that_does(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"data": {"layout": "documents", "length": B}}
    source = Counting(20, 40, unweighted=2 * B + 1)
    whole = run(recipe(tmp_path / "whole", **kind), source)
    assert whole.losses[:2] == [None, None] and None not in whole.losses[2:4]
    for stop in (1, 2, 3):
        made = recipe(tmp_path / str(stop), **kind)
        part = run(made, source, steps=stop)
        rest = run(made, source, resume=True)
        assert part.losses + rest.losses == whole.losses
        assert_identical(weights(rest.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["packed, everything random, dropout", "single"])
def test_a_run_that_broke_down_goes_on_from_its_last_checkpoint(kind: str, tmp_path: Path) -> None:
    table: dict[str, Any] = {**KINDS[kind]}
    table["run"] = {"checkpoint_every": 2, "steps": 8}
    table["probes"] = {"every": 1}
    whole = run(recipe(tmp_path / "whole", **table), Counting(longest=12), probes=[Steps()])
    made = recipe(tmp_path / "broken", **table)
    with pytest.raises(ConnectionError):
        run(made, Failing(times=11, longest=12), probes=[Steps()])
    done = int(checkpoints(tmp_path / "broken")[-1].partition("-")[2])
    # Lines were written after the checkpoint, and one of them only in part.
    assert 0 < done < metrics(tmp_path / "broken")[-1]["step"] < 8
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    rest = run(made, Counting(longest=12), resume=True, probes=[Steps()])
    assert rest.losses == whole.losses[done:]
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert_identical(weights(rest.model), weights(whole.model))


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    whole = run(recipe(tmp_path / "whole", run={"steps": 6}))
    assert run(recipe(tmp_path / "longer", run={"steps": 3})).losses == whole.losses[:3]
    longer = run(recipe(tmp_path / "longer", run={"steps": 6}), resume=True)
    assert longer.losses == whole.losses[3:]
    assert metrics(tmp_path / "longer") == metrics(tmp_path / "whole")


def test_a_run_ends_with_its_time_and_may_be_given_more(tmp_path: Path) -> None:
    whole = run(recipe(tmp_path / "whole", run={"steps": 3}))
    short = recipe(tmp_path / "timed", run={"steps": 3, "minutes": 1e-9, "log_every": 5})
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # as if each look at the clock took half of the time
        patch.setattr("time.monotonic", itertools.count(0, 3e-8).__next__)
        timed = run(short)
    assert (timed.steps, timed.interrupted) == (1, False)
    assert timed.losses == whole.losses[:1]
    assert [line["step"] for line in metrics(tmp_path / "timed")] == [1], "the last is written down"
    assert (tmp_path / "timed" / "adapter_model.safetensors").exists()
    again = run(short, resume=True)  # its time was up before
    assert (again.steps, again.losses) == (1, [])
    longer = run(recipe(tmp_path / "timed", run={"steps": 3, "minutes": 9}), resume=True)
    assert longer.losses == whole.losses[1:]


def test_a_finished_run_that_goes_on_only_measures_and_saves(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    whole = run(made, probes=[Steps()])
    before, lines = weights(whole.model), metrics(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()  # killed before it was written
    for less in (made, recipe(tmp_path, run={"steps": 2})):
        again = run(less, resume=True, probes=[Steps()])
        assert (again.losses, again.steps) == ([], STEPS)
        assert again.results["steps"]
        assert metrics(tmp_path) == lines
        assert_identical(weights(again.model), before)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_repeat_task_needs_the_tokenizer_for_its_marker() -> None:
    from tiny_tokenizer import tiny_tokenizer

    made = recipe(data={"repeat_length": 3, "length": 32})
    assert len(run(made, tokenizer=tiny_tokenizer()).losses) == STEPS


# ---- checkpoints as files


def test_a_checkpoint_that_was_not_finished_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path / "broken", run={"checkpoint_every": 2})
    write, written = checkpoint._write, list[Path]()

    def killed(path: Path, tensors: Any) -> None:
        written.append(path)
        if "00000004" in str(path) and path.name.startswith("optimizer"):
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    monkeypatch.undo()
    assert checkpoints(tmp_path / "broken") == ["step-00000002"], "what was begun is gone"
    left = tmp_path / "broken" / "checkpoints" / ".step-00000004.writing"
    left.mkdir()  # by a process that was killed
    rest = run(made, resume=True)
    assert rest.losses == run(recipe(tmp_path / "whole")).losses[2:]
    assert checkpoints(tmp_path / "broken") == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    run(recipe(tmp_path, run={"checkpoint_every": 1, "keep_checkpoints": keep}))
    names = [f"step-{n:08d}" for n in range(1, STEPS + 1)]
    assert checkpoints(tmp_path) == names[-keep:]


def test_a_checkpoint_holds_what_is_trained_and_no_pickle(tmp_path: Path) -> None:
    run(recipe(tmp_path))
    folder = tmp_path / "checkpoints" / f"step-{STEPS:08d}"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "trained.safetensors", "optimizer.safetensors", "fams.safetensors", "state.json",
    }  # fmt: skip
    names = load_file(folder / "trained.safetensors").keys()
    assert names and all("lora_" in n or "fam_prompt" in n for n in names)


# ---- what is refused


CHANGED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "rank": ({"train": {"rank": 4}}, "train.rank"),
    "geometry": ({"fam": {"block_size": 5}}, "fam.block_size"),
    "data": ({"data": {"length": 20}}, "data.length"),
    "feedback": ({"feedback": {"bptt_blocks": 2}}, "feedback.bptt_blocks"),
    "model": ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    "seed": ({"run": {"seed": 5}}, "run.seed"),
    "optimizer": ({"optimizer": {"name": "adafactor"}}, "optimizer.name"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    run(recipe(folder), steps=2)
    return folder


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_does_not_go_on_as_another(change: str, begun: Path) -> None:
    sections, name = CHANGED[change]
    with pytest.raises(UserError) as refusal:
        run(recipe(begun, **sections), resume=True)
    assert str(refusal.value) == (
        f"The run in {begun} was begun with another {name}; a run can only go on as it was begun. "
        "Choose another folder with --output."
    )


def test_a_setting_that_is_taken_away_is_noticed(tmp_path: Path) -> None:
    fam = {**BASE["fam"], "attention": "xl", "window": 6}
    run(recipe(tmp_path, fam=fam), steps=2)
    del fam["window"]
    with pytest.raises(UserError, match=r"begun with another fam\.window"):
        run(recipe(tmp_path, fam=fam), resume=True)


def test_what_a_checkpoint_does_not_say_of_a_source_was_not_set() -> None:
    """Settings that came later are what they are by default."""
    made = Recipe.load(find("smollm2-passkey"), []).to_dict()
    before = copy.deepcopy(made)
    for source in before["data"]["sources"]:
        assert source.pop("chat") is False
    assert changed_setting(made, before) is None
    made["data"]["sources"][0]["chat"] = True
    assert changed_setting(made, before) == "data.sources"


def test_adafactor_does_not_go_on_with_moments_that_it_has_not_kept() -> None:
    without, with_moments = (
        Recipe.load(
            find("smollm2-passkey"), ["optimizer.name=adafactor", f"optimizer.beta1={beta}"]
        ).to_dict()
        for beta in (0.0, 0.9)
    )
    assert changed_setting(with_moments, without) == "optimizer.beta1"
    assert changed_setting(with_moments, with_moments) is None


def test_carried_memories_keep_the_precision(tmp_path: Path) -> None:
    run(recipe(tmp_path, data={"layout": "documents"}), steps=2)
    with pytest.raises(UserError, match=r"begun with another run\.precision"):
        run(recipe(tmp_path, data={"layout": "documents"}, run={"precision": "bf16"}), resume=True)


@pytest.mark.parametrize("file", ["state.json", "trained.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(file: str, tmp_path: Path) -> None:
    made = recipe(tmp_path, run={"checkpoint_every": 1})
    run(made, steps=2)
    damaged = tmp_path / "checkpoints" / "step-00000002" / file
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match=r"step-00000002 is damaged.*; remove it to go on from"):
        run(made, resume=True)
    shutil.rmtree(damaged.parent)
    assert run(made, resume=True).steps == STEPS


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(tmp_path, data={"layout": "single", "length": 20})
    one = trainer(made, Counting(10, 30))
    one.quiet = False
    one.run()
    assert "too short, or too long for data.length" in capsys.readouterr().err
    assert "| examples left out | " in (tmp_path / "README.md").read_text()


def test_a_run_that_could_go_on_is_not_overwritten(begun: Path) -> None:
    with pytest.raises(UserError, match=r"add --resume, or choose another folder with --output\.$"):
        run(recipe(begun))


def test_there_must_be_something_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^There is no checkpoint in .*; leave --resume out\.$"):
        run(recipe(tmp_path), resume=True)


def test_without_feedback_a_recipe_is_its_own_baseline(tmp_path: Path) -> None:
    windows = {**BASE["fam"], "fam_length": 0}
    feedback = {"state_passing": 0.8, "bias_start": -8.0, "bias_steps": 3}
    run(recipe(tmp_path / "with", fam=windows, feedback=feedback))
    run(recipe(tmp_path / "without", fam=windows))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert "fam_bias" not in metrics(tmp_path / "with")[0]


# ---- a loss that is of no use


def blow_up(one: Trainer, at: int, factor: float) -> None:
    """From step `at` on the model's logits are `factor` times as large."""
    calls = iter(range(10**6))

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * factor if next(calls) >= at else output

    one.base.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("factor", [math.nan, 1e9])
def test_a_run_that_explodes_stops_and_names_its_last_good_checkpoint(
    factor: float, tmp_path: Path
) -> None:
    made = recipe(tmp_path, run={"checkpoint_every": 2, "explode_at": 1e4})
    one = trainer(made)
    blow_up(one, 3, factor)
    last = tmp_path / "checkpoints" / "step-00000002"
    with pytest.raises(TrainingStopped) as stopped:
        one.run()
    message = str(stopped.value)
    assert message.startswith("Training stopped at step 4: the loss is ")
    assert f"Lower optimizer.learning_rate and go on from {last} with --resume, or" in message
    kept = load_file(last / "trained.safetensors")
    assert all(bool(t.isfinite().all()) for t in kept.values())
    # The optimizer did not take the step.
    assert all(bool(p.isfinite().all()) for p in one.model.parameters())
    rest = run(recipe(tmp_path, optimizer={"learning_rate": 1e-3}), resume=True)
    assert all(math.isfinite(loss or math.nan) for loss in rest.losses)


def test_a_gradient_that_is_not_finite_is_never_followed() -> None:
    one = trainer(recipe(run={"explode_at": math.inf}))
    one._check(0, 1.0, 1e30)
    for norm in (math.inf, math.nan):
        with pytest.raises(TrainingStopped, match="begin again with fam"):
            one._check(0, 1.0, norm)


# ---- measuring


class Steps:
    """A probe that writes down how it was called."""

    name = "steps"

    def __init__(self) -> None:
        self.training: list[bool] = []

    def __call__(self, model: Any) -> dict[str, float]:
        self.training.append(model.training)
        prompt = model.get_base_model().get_decoder().fam_prompt.modules_to_save.default
        return {"prompt": float(prompt.weight.detach().sum())}


def test_probes_measure_when_they_should_and_training_goes_on_in_training_mode(
    tmp_path: Path,
) -> None:
    probe = Steps()
    made = recipe(tmp_path, probes={"every": 2}, train=DROPOUT)
    one = trainer(made, probes=[probe])
    modes: list[bool] = []
    one.base.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    trained = one.run()
    assert probe.training == [False] * 3
    assert modes == [True] * STEPS
    lines = [line for line in metrics(tmp_path) if "probe" in line]
    assert [line["step"] for line in lines] == [2, 4, STEPS]
    assert lines[-1]["probe"] == trained.results
    assert len({line["probe"]["steps"]["prompt"] for line in lines}) == 3
    assert "### steps" in (tmp_path / "README.md").read_text()
    # Measuring changes nothing.
    assert trained.losses == run(recipe(train=DROPOUT)).losses


def test_what_was_learned_is_written_whatever_becomes_of_measuring(tmp_path: Path) -> None:
    class Failing(Steps):
        def __call__(self, model: Any) -> dict[str, float]:
            raise MemoryError("no memory left")

    made = recipe(tmp_path / "broken")
    with pytest.raises(MemoryError):
        run(made, probes=[Failing()])
    assert (tmp_path / "broken" / "adapter_model.safetensors").exists()
    rest = run(made, resume=True, probes=[Steps()])
    assert not rest.losses and rest.results
    assert_identical(weights(rest.model), weights(run(recipe(tmp_path / "whole")).model))


def test_a_full_disk_costs_the_checkpoint_and_not_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        run(recipe(tmp_path, run={"checkpoint_every": STEPS}))
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert checkpoints(tmp_path) == []


def test_a_card_may_name_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    run(recipe(tmp_path / "caf\udce9"))
    assert "\\udce9" in (tmp_path / "caf\udce9" / "README.md").read_text()


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path, steps=4, quiet=True, tensorboard=False)
    with pytest.raises(UserError, match="Another run writes to"):
        run(recipe(tmp_path))
    first.close()
    run(recipe(tmp_path))


def test_precision_may_differ_from_run_to_run_in_one_process() -> None:
    wide, half = (run(recipe(run={"precision": p})).losses for p in ("fp32", "bf16"))
    assert half != wide
    assert half == pytest.approx(wide, rel=0.02)
    assert run(recipe()).losses == wide


def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_accelerator(recipe())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"^2 processes were started, but .* ACCELERATE_USE_CPU=true"
    ):
        make_accelerator(recipe())
