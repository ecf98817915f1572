"""Recipes: TOML to settings and back, changes from the command line, what is refused and why."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformerfam.config import FamConfig
from transformerfam.errors import UserError
from transformerfam.training import checks, recipe, values
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import DataSettings, RunSettings, SourceSettings

FILES = {"data": {"sources": [{"path": "x.jsonl"}]}}
DOCS = Path(__file__).parents[1] / "docs"


def made(*overrides: str) -> Recipe:
    return Recipe.from_dict(recipe.changed(FILES, overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        made(*overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# ---- reading and writing


def test_what_a_recipe_does_not_say_has_its_default() -> None:
    found = Recipe.from_dict({})
    assert found == Recipe()
    assert found.fam == FamConfig()
    assert made("fam.block_size=512").fam == FamConfig().replace(block_size=512)


def test_a_file_is_read_with_its_sources(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[run]\noutput = "out"\nexplode_at = inf\n[optimizer]\nlearning_rate = 1\n'
        '[[data.sources]]\npath = "a.jsonl"\nshare = 3\n'
        '[[data.sources]]\nkind = "passkey"\nlengths = [64, 128]\nwhere = 0\n'
        "[fam]\nfeedback_norm = 2\n"
    )
    found = Recipe.load(file, ["data.sources.0.share=0.5", "run.steps=7"])
    assert found.run == RunSettings(output="out", steps=7, explode_at=float("inf"))
    assert found.data.sources == (
        SourceSettings(path="a.jsonl", share=0.5),
        SourceSettings(kind="passkey", lengths=(64, 128), where=0.0),
    )
    assert isinstance(found.optimizer.learning_rate, float)
    assert isinstance(found.data.sources[1].where, float)
    assert isinstance(found.fam.feedback_norm, float)


def test_a_recipe_written_and_read_is_the_same(tmp_path: Path) -> None:
    first = Recipe(
        fam=FamConfig.paper(attention="swa", window=700, feedback_norm=(1.0,) * 64),
        data=DataSettings(
            sources=(SourceSettings(path='a "b"\\.jsonl'), SourceSettings("passkey", where=0.25))
        ),
        run=RunSettings(output="out", explode_at=float("inf")),
    )
    file = tmp_path / "r.toml"
    file.write_text(first.to_toml(), encoding="utf-8")
    assert Recipe.load(file) == first
    assert Recipe.from_dict(first.to_dict()) == first
    assert "passkey_lengths" in first.to_toml()
    assert first.to_toml().count("digits") == 2  # of the passkey source and of the probe


@settings(max_examples=25, deadline=None)
@given(
    output=st.text(),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    targets=st.lists(st.text(min_size=1).filter(lambda t: t != "all-linear"), min_size=1),
    lengths=st.lists(st.integers(1, 10**15)).map(sorted),
    shuffle=st.booleans(),
)
def test_any_value_survives_toml(
    output: str, rate: float, targets: list[str], lengths: list[int], shuffle: bool
) -> None:
    base = made()
    first = base.replace(
        run=replace(base.run, output=output),
        optimizer=replace(base.optimizer, learning_rate=rate),
        train=replace(base.train, targets=tuple(targets)),
        probes=replace(base.probes, passkey_lengths=tuple(lengths)),
        data=replace(base.data, sources=(SourceSettings(path="x", shuffle=shuffle),)),
    )
    assert Recipe.from_dict(values.parse_toml(first.to_toml())) == first


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_can_be_read(name: str) -> None:
    changes = ["data.sources.0.path=x.jsonl"] if name == "paper" else []
    found = Recipe.load(recipe.find(name), changes)
    checks.check_complete(found.replace(run=replace(found.run, output="out")))
    assert f"| `{name}` |" in (DOCS / "recipes.md").read_text(encoding="utf-8")


def test_a_file_counts_more_than_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("passkey").mkdir()  # such as the output of an earlier run
    assert recipe.find("passkey").suffix == ".toml"
    Path("paper").write_text("")
    assert recipe.find("paper") == Path("paper")
    with pytest.raises(UserError, match=r"no recipe file my\.toml, .* those are paper, passkey"):
        recipe.find("my.toml")


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    for content, reason in [(b"[run\n", "no TOML file"), (b"\xff", "no TOML file")]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            Recipe.load(file)
    file.write_bytes(b"\xef\xbb\xbf[run]\nsteps = 3\n")  # with a byte order mark
    assert Recipe.load(file).run.steps == 3
    with pytest.raises(UserError, match="cannot be read: no such file"):
        Recipe.load(tmp_path / "none.toml")
    file.write_text("[rnu]\n")
    with pytest.raises(UserError, match=r"no section \[rnu\]; perhaps run is meant"):
        Recipe.load(file)
    file.write_text("run = 3\n")
    with pytest.raises(UserError, match="run must be a table of settings, not 3"):
        Recipe.load(file)


def test_recipes_bring_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['fam']\n"
        "from transformerfam.training import recipe\n"
        "recipe.Recipe.load(recipe.find('passkey')).to_toml()\n"
        "assert not {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- changes from the command line


CHANGES: dict[str, tuple[str, Any]] = {
    "run.output=out": ("run.output", "out"),
    'run.output="two words"': ("run.output", "two words"),
    "run.output=2024": ("run.output", "2024"),
    "run.output=true": ("run.output", "true"),
    "run.output=a=b": ("run.output", "a=b"),
    "run.output=": ("run.output", ""),
    "run.steps=1_000": ("run.steps", 1000),
    "run.tensorboard=false": ("run.tensorboard", False),
    "optimizer.learning_rate=1e-4": ("optimizer.learning_rate", 1e-4),
    "optimizer.learning_rate=1": ("optimizer.learning_rate", 1.0),
    "fam.memory_segments=1": ("fam.memory_segments", 1),
    "fam.feedback_norm=rms": ("fam.feedback_norm", "rms"),
    "fam.feedback_norm=2": ("fam.feedback_norm", 2.0),
    "probes.passkey_where=0.5": ("probes.passkey_where", 0.5),
    "probes.passkey_where=anywhere": ("probes.passkey_where", "anywhere"),
    "probes.passkey_lengths=1024,2048": ("probes.passkey_lengths", (1024, 2048)),
    "probes.passkey_lengths=1024": ("probes.passkey_lengths", (1024,)),
    "probes.passkey_lengths=[]": ("probes.passkey_lengths", ()),
    "train.targets=q_proj, v_proj": ("train.targets", ("q_proj", "v_proj")),
    'train.targets=["q_proj"]': ("train.targets", ("q_proj",)),
    "train.what=full": ("train.what", "full"),
    "data.sources=[{path='y'}]": ("data.sources", (SourceSettings(path="y"),)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_read_by_the_type_of_their_setting(change: str) -> None:
    key, expected = CHANGES[change]
    section, _, name = key.partition(".")
    found = getattr(getattr(made(change), section), name)
    assert found == expected
    assert type(found) is type(expected)


def test_per_slot_norms_are_numbers_with_commas() -> None:
    found = made("fam.fam_length=2", "fam.feedback_norm=1,2.5")
    assert found.fam.feedback_norm == (1.0, 2.5)


def test_sources_are_changed_and_added_by_number() -> None:
    found = made("data.sources.0.path=2", "data.sources.1.kind=passkey", "data.sources.1.keys=2")
    assert found.data.sources == (
        SourceSettings(path="2"),
        SourceSettings(kind="passkey", keys=2),
    )
    added = Recipe.from_dict(recipe.changed({}, ["data.sources.0.path=x"]))
    assert added == made("data.sources.0.path=x")
    assert FILES == {"data": {"sources": [{"path": "x.jsonl"}]}}  # as it was


def test_of_two_changes_of_a_setting_the_last_counts() -> None:
    assert made("run.steps=3", "run.steps=4").run.steps == 4


# ---- what is refused


NAMES: dict[str, str] = {
    "run.stepz=3": "There is no setting run.stepz; perhaps steps is meant",
    "rnu.steps=3": r"no section \[rnu\]; perhaps run is meant",
    "qqqq.steps=3": "there are model, fam, train",
    "optimizer.rank=3": r"\[optimizer\] has no setting rank; it belongs into \[train\]",
    "data.path=x": r"belongs into \[\[data.sources\]\]",
    "data.sources.path=x": r"is a list; write data\.sources\.0\.KEY=VALUE",
    "data.sources.3.path=x": "no data.sources.3; this recipe has 1 sources, from 0",
    "data.sources.0.pth=x": "no setting data.sources.0.pth; perhaps path is meant",
    "fam.fam_lenth=3": "no setting fam.fam_lenth; perhaps fam_length",
    "run.steps": "no setting; write section.key=VALUE",
    "steps=3": "no setting; write section.key=VALUE",
    "run.=3": "no setting; write section.key=VALUE",
    "train.rank.x=3": "train.rank must be a whole number, not a table",
    "data.sources=3": "data.sources must be a list of tables|must be a table",
}


@pytest.mark.parametrize("change", NAMES)
def test_unknown_names_are_refused_with_the_nearest(change: str) -> None:
    with pytest.raises(UserError, match=NAMES[change]):
        made(change)


TYPES: dict[str, str] = {
    "run.steps=1e3": "run.steps must be a whole number, not 1000.0.",
    "run.steps=true": "run.steps must be a whole number, not true.",
    "run.steps=many": 'run.steps must be a whole number, not "many".',
    "run.steps=1\nseed=2": 'run.steps must be a whole number, not "1\\nseed=2".',
    "run.tensorboard=1": "run.tensorboard must be true or false, not 1.",
    "optimizer.learning_rate=fast": 'optimizer.learning_rate must be a number, not "fast".',
    "optimizer.learning_rate=nan": "optimizer.learning_rate must be a number, not nan.",
    "train.what=lorra": 'train.what must be one of lora, full, prompt, not "lorra".',
    "probes.passkey_lengths=a,b": 'probes.passkey_lengths must be a whole number, not "a".',
    "probes.passkey_where=[1]": "probes.passkey_where must be a text or a number, not [1].",
}


@pytest.mark.parametrize("change", TYPES)
def test_wrong_types_are_refused_by_the_name_of_the_key(change: str) -> None:
    assert refusal(change) == TYPES[change]


TOGETHER: list[tuple[str, str]] = [
    ("model.base=", "model.base is empty"),
    ("train.rank=0", "train.rank must be at least 1, not 0"),
    ("train.alpha=0", "train.alpha must be above 0"),
    ("train.dropout=1", "train.dropout must be from 0 to below 1"),
    ("train.targets=[]", "train.targets is empty"),
    ("train.targets=all-linear,x", "leave the others out"),
    ("train.what=prompt fam.fam_length=0", "trains the FAM prompt or the gates"),
    ("train.what=full model.adapter=x", "merge it first"),
    ("data.batch_size=0", "data.batch_size must be at least 1"),
    ("data.length=1", "data.length must be at least 2"),
    ("data.batch_size=6 data.micro_batch_size=4", "does not divide data.batch_size=6"),
    ("data.layout=single data.repeat_length=9", 'needs data.layout="packed", and it is "single"'),
    ("data.length=20 data.repeat_length=10", "less than half of data.length=20"),
    ("data.repeat_weight=-1", "data.repeat_weight must be at least 0"),
    ("data.sources.0.share=0", "Every share of data.sources is 0"),
    ("data.sources.0.share=-1", "data.sources.0.share must be at least 0"),
    ("data.sources.0.path=", "data.sources.0.path is empty"),
    ("data.sources.0.digits=7", 'does nothing in a source of kind "files"'),
    ("data.sources.0.kind=passkey", 'path does nothing in a source of kind "passkey"'),
    ("data.sources.1.kind=passkey data.sources.1.lengths=9,8", "in ascending order"),
    ("data.sources.1.kind=passkey data.sources.1.lengths=[]", "a shortest and a longest"),
    ("data.sources.1.kind=passkey data.sources.1.lengths=9,7,8", "ascending"),
    (
        "data.sources.1.kind=passkey data.sources.1.lengths=65,127 "
        "data.sources.1.lengths_in_steps_of=64",
        "holds no multiple of lengths_in_steps_of=64",
    ),
    (
        "data.sources.1.kind=passkey data.layout=single data.length=100",
        "goes up to 18432, and data.length=100 leaves longer examples out",
    ),
    ("data.sources.1.kind=passkey data.sources.1.where=2", "start, anywhere, or a depth"),
    ("data.sources.1.kind=passkey data.sources.1.where=end", "start, anywhere, or a depth"),
    ("data.sources.1.kind=passkey data.sources.1.keys=0", "keys must be at least 1"),
    (
        "data.sources.1.kind=passkey data.sources.1.asked=2",
        "asked=2, and there are data.sources.1.keys=1; ask for fewer",
    ),
    ("optimizer.learning_rate=0", "optimizer.learning_rate must be above 0"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate must be a finite number"),
    ("optimizer.beta2=1", "optimizer.beta2 must be from 0 to below 1"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps must be at least 0"),
    ("feedback.bptt_blocks=-1", "feedback.bptt_blocks must be at least 0"),
    ("feedback.bptt_blocks=1", "teaches FAM nothing"),
    (
        "data.sources.1.kind=passkey data.sources.1.asked_prose=8",
        'asked_prose of a source is for fam.fam_seen="asked"',
    ),
    ("fam.fam_seen=asked", 'take "single" for fam.fam_seen="asked"'),
    ("feedback.asked_blocks=-1", "feedback.asked_blocks must be at least 0"),
    ("feedback.asked_blocks=2", 'take fam.fam_seen="asked", data.layout="single"'),
    ("feedback.state_passing=2", "is a probability, from 0 to 1, and cannot be 2"),
    ("feedback.state_passing=0.8 data.layout=documents", "carried from step to step already"),
    (
        "fam.recurrence=rmt fam.memory_segments=0 feedback.state_passing=0.8",
        'under fam.recurrence="rmt" there is none',
    ),
    (
        "fam.recurrence=rmt fam.memory_segments=0 data.layout=documents",
        'rows stand alike; take "packed" or "single"',
    ),
    ("feedback.drawn_segments=0,-1", "numbers of past blocks, from 0, not [0, -1]"),
    ("feedback.drawn_segments=1,3 data.layout=documents", "documents go on from step to step"),
    ("feedback.drawn_segments=1,3 fam.attention=swa", "other windows have no past blocks"),
    ("feedback.position_offset=-0.1", "is a probability"),
    ("feedback.position_offset_limit=0", "must be above 0"),
    ("feedback.bias_power=0", "feedback.bias_power must be above 0"),
    ("feedback.bias_start=0", "needs a feedback.bias_start below fam.fam_bias=0.0"),
    ("run.steps=0", "run.steps must be at least 1"),
    ("run.minutes=-1", "run.minutes must be at least 0"),
    (
        "feedback.asked_blocks=2 fam.fam_seen=asked data.layout=single fam.fam_query=static",
        "asks streams that begin with a FAM",
    ),
    ("run.keep_checkpoints=0", "run.keep_checkpoints must be at least 1"),
    ("run.explode_at=0", "run.explode_at must be above 0"),
    ("probes.passkey_lengths=2,1", "in ascending order, not [2, 1]"),
    ("probes.passkey_lengths=0,1", "in ascending order, not [0, 1]"),
    ("probes.passkey_samples=0", "probes.passkey_samples must be at least 1"),
    ("fam.block_size=8", "[fam] cannot be used: fam_position='last' gives FAM"),
]


@pytest.mark.parametrize("changes, reason", TOGETHER)
def test_what_cannot_work_is_refused_with_the_reason(changes: str, reason: str) -> None:
    assert reason in refusal(*changes.split(" "))


GOOD = [
    "feedback.bias_steps=5 feedback.bias_start=-5",
    "feedback.bias_steps=5 fam.fam_bias=1",
    "data.batch_size=6 data.micro_batch_size=3",
    "data.length=100 data.repeat_length=49",
    "run.explode_at=inf",
    "feedback.bias_steps=0 feedback.bias_start=0",
    # A baseline of any recipe: what concerns FAM does nothing.
    "fam.fam_length=0 feedback.state_passing=0.8 feedback.bias_start=-5",
    "fam.fam_length=0 data.sources.1.kind=passkey data.sources.1.asked_prose=8",
    "data.sources.1.kind=passkey data.sources.1.lengths=64,64",
    "data.sources.1.kind=passkey data.sources.1.share=0",
]


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_recipe_has_a_baseline(name: str) -> None:
    data = ["data.sources.0.path=x.jsonl"] if name == "paper" else []
    baseline = Recipe.load(recipe.find(name), [*data, "fam.fam_length=0"])
    assert not baseline.fam.has_feedback
    with pytest.raises(UserError, match="fam_seen"):
        Recipe.load(recipe.find(name), [*data, "fam.fam_length=0", "fam.fam_seen=asked"])


@pytest.mark.parametrize("changes", GOOD)
def test_what_can_work_is_not_refused(changes: str) -> None:
    made(*changes.split(" "))


def test_data_and_a_folder_are_asked_for_only_when_a_run_starts() -> None:
    with pytest.raises(UserError, match=r"has no data; give data\.sources\.0\.path"):
        checks.check_complete(Recipe())
    with pytest.raises(UserError, match=r"no run\.output; name a folder with --output"):
        checks.check_complete(made())
    checks.check_complete(made("run.output=out"))


# ---- documentation


def test_every_setting_has_a_meaning_and_a_default() -> None:
    from transformerfam.commands import _settings

    found = _settings.all_settings()
    assert [name for name in found if name != "data.sources"] == list(recipe.SECTIONS)
    assert [s.name for s in found["data.sources"]] == [f.name for f in fields(SourceSettings)]
    for section, cls in recipe.SECTIONS.items():
        names = {f.name for f in fields(cls)} - ({"sources"} if section == "data" else set())
        assert {s.name for s in found[section]} == names
    assert all(s.meaning and s.kind and s.default for part in found.values() for s in part)


def test_the_page_on_recipes_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` would change nothing."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert importlib.import_module("generate").recipes_page(page) == page
