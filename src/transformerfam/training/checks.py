"""What settings of a recipe cannot be, alone and together, each with the reason.

One function for each section. Knows what settings mean; nothing of files, models or torch.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformerfam.training.refusals import (
    above_zero,
    ascending,
    at_least,
    place,
    probability,
    refuse_unless,
)
from transformerfam.training.settings import SourceSettings
from transformerfam.training.step_checks import check_recording, check_replay

if TYPE_CHECKING:
    from transformerfam.training.recipe import Recipe

# A meaning in SourceSettings begins with the kind of source that it is for, if it is for one.
_KINDS = {"files", "passkey", "facts"}


def check(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be done.

    Raises:
        UserError: one sentence that names the setting and says why.
    """
    _check_finite(recipe)
    _check_model(recipe)
    _check_train(recipe)
    _check_data(recipe)
    for index, source in enumerate(recipe.data.sources):
        _check_source(recipe, source, f"data.sources.{index}")
    _check_optimizer(recipe)
    _check_feedback(recipe)
    check_replay(recipe)
    _check_run(recipe)
    check_recording(recipe)
    _check_probes(recipe)


def check_complete(recipe: Recipe) -> None:
    """Refuse a recipe that says not all that a run by itself needs: data and a place to write to.

    Raises:
        UserError: one sentence that says what to give.
    """
    refuse_unless(
        bool(recipe.data.sources),
        "The recipe has no data; give data.sources.0.path=FILE, or a [[data.sources]] in its file.",
    )
    refuse_unless(
        bool(recipe.run.output), "The recipe has no run.output; name a folder with --output."
    )


def not_for(kind: str) -> list[str]:
    """The settings of a source that do nothing in one of this kind."""
    return [
        field.name
        for field in fields(SourceSettings)
        if (of := {*field.metadata["meaning"].partition(": ")[0].split(", ")}) <= _KINDS
        and kind not in of
    ]


# ---- sections


def _check_finite(recipe: Recipe) -> None:
    tables: dict[str, Any] = {
        "train": recipe.train,
        "data": recipe.data,
        "optimizer": recipe.optimizer,
        "feedback": recipe.feedback,
        "probes": recipe.probes,
        **{f"data.sources.{i}": s for i, s in enumerate(recipe.data.sources)},
    }
    for section, settings in tables.items():
        for field in fields(settings):
            value = getattr(settings, field.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            refuse_unless(finite, f"{section}.{field.name} must be a finite number, not {value}.")


def _check_model(recipe: Recipe) -> None:
    refuse_unless(bool(recipe.model.base), "model.base is empty; name a model.")


def _check_train(recipe: Recipe) -> None:
    train = recipe.train
    at_least(1, "train", train, ["rank"])
    above_zero("train", train, ["alpha"])
    refuse_unless(
        0 <= train.dropout < 1, f"train.dropout must be from 0 to below 1, not {train.dropout}."
    )
    targets = train.targets
    refuse_unless(
        bool(targets) and all(targets),
        'train.targets is empty; name matrices, or all of them with "all-linear".',
    )
    refuse_unless(
        targets == ("all-linear",) or "all-linear" not in targets,
        'train.targets names all matrices with "all-linear"; leave the others out.',
    )
    refuse_unless(
        train.what != "prompt" or bool(recipe.fam.added_modules),
        'train.what="prompt" trains the FAM prompt or the gates of a compressive memory alone, and '
        "this geometry has neither; set fam.fam_length or fam.compressive_memory.",
    )
    refuse_unless(
        recipe.fam.adapted == "all" or (train.what == "lora" and recipe.fam.has_feedback),
        'fam.adapted="fam" is for LoRA on the way of FAM, and here is none of both; set '
        "fam.adapted=all.",
    )
    refuse_unless(
        train.what != "full" or not recipe.model.adapter,
        'train.what="full" cannot go on from model.adapter; merge it first with fam merge.',
    )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    at_least(1, "data", data, ["batch_size"])
    at_least(2, "data", data, ["length"])
    at_least(0, "data", data, ["micro_batch_size", "repeat_length", "repeat_weight"])
    micro, rows = data.micro_batch_size, data.batch_size
    refuse_unless(
        not micro or rows % micro == 0,
        f"data.micro_batch_size={micro} does not divide data.batch_size={rows}.",
    )
    _check_growth(recipe)
    if data.repeat_length:
        refuse_unless(
            data.layout == "packed",
            f'data.repeat_length needs data.layout="packed", and it is "{data.layout}".',
        )
        refuse_unless(
            2 * data.repeat_length < data.length,
            f"data.repeat_length={data.repeat_length} must be less than half of "
            f"data.length={data.length}: the segment stands in the row twice.",
        )
    refuse_unless(
        not data.sources or any(source.share != 0 for source in data.sources),
        "Every share of data.sources is 0, so nothing would be read.",
    )


def _check_growth(recipe: Recipe) -> None:
    data = recipe.data
    at_least(0, "data", data, ["begin_length"])
    probability("data", data, "grow_at")
    if not data.begin_length:
        return
    refuse_unless(
        data.layout == "single",
        'data.begin_length asks whether a text\'s answers are right; take data.layout="single".',
    )
    refuse_unless(
        all(source.kind != "files" for source in data.sources if source.share),
        "data.begin_length is for texts made as needed alone, and some of data.sources are files; leave "
        "one or the other out.",
    )


def _check_source(recipe: Recipe, source: SourceSettings, key: str) -> None:
    at_least(0, key, source, ["share"])
    for name in not_for(source.kind):
        default = next(f.default for f in fields(source) if f.name == name)
        refuse_unless(
            getattr(source, name) == default,
            f'{key}.{name} does nothing in a source of kind "{source.kind}"; leave it out.',
        )
    if source.kind == "files":
        refuse_unless(
            bool(source.path), f"{key}.path is empty; name a file, a folder or a data set."
        )
        return
    at_least(1, key, source, ["lengths_in_steps_of", "keys", "asked", "digits"])
    refuse_unless(
        source.asked <= source.keys,
        f"{key}.asked={source.asked}, and there are {key}.keys={source.keys}; ask for fewer.",
    )
    at_least(0, key, source, ["filler_share", "asked_prose"])
    place(f"{key}.where", source.where)
    refuse_unless(
        bool(source.lengths),
        f"{key}.lengths must be a shortest and a longest length, or those that there may be; it is "
        "empty.",
    )
    ascending(f"{key}.lengths", source.lengths)
    step, shortest, longest = source.lengths_in_steps_of, source.lengths[0], source.lengths[-1]
    refuse_unless(
        longest // step * step >= shortest,
        f"{key}.lengths holds no multiple of lengths_in_steps_of={step}.",
    )
    refuse_unless(
        recipe.data.layout != "single" or longest <= recipe.data.length,
        f"{key}.lengths goes up to {longest}, and data.length={recipe.data.length} leaves longer "
        "examples out; raise data.length.",
    )


def _check_optimizer(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    above_zero("optimizer", optimizer, ["learning_rate"])
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        refuse_unless(0 <= value < 1, f"optimizer.{name} must be from 0 to below 1, not {value}.")
    at_least(0, "optimizer", optimizer, ["weight_decay", "warmup_steps", "max_grad_norm"])


def _check_feedback(recipe: Recipe) -> None:
    feedback, fam = recipe.feedback, recipe.fam
    at_least(0, "feedback", feedback, ["bptt_blocks", "state_passing_delay", "bias_steps"])
    _check_asked(recipe)
    at_least(0, "feedback", feedback, ["diversity_weight", "reconstruction_weight"])
    refuse_unless(
        not feedback.diversity_weight or fam.fam_length != 1,
        "feedback.diversity_weight pushes rows of FAM apart, and fam.fam_length=1 has only one.",
    )
    probability("feedback", feedback, "state_passing")
    probability("feedback", feedback, "position_offset")
    above_zero("feedback", feedback, ["position_offset_limit", "bias_power"])
    refuse_unless(
        feedback.bptt_blocks != 1 or not fam.has_feedback or recipe.replay.blocks > 0,
        "feedback.bptt_blocks=1 teaches FAM nothing, since what one block writes is read in the next; "
        "take 2 or more, or 0 for all.",
    )
    refuse_unless(
        feedback.position_offset == 0 or recipe.data.layout != "documents",
        'feedback.position_offset is for data.layout="packed" or "single"; in "documents" positions '
        "go on from step to step.",
    )
    if feedback.state_passing:
        refuse_unless(
            recipe.data.layout != "documents",
            'feedback.state_passing is for data.layout="packed" or "single"; in "documents" the '
            "whole memory is carried from step to step already.",
        )
        refuse_unless(
            fam.fam_query != "static" or not fam.has_feedback,
            'feedback.state_passing cannot go with fam.fam_query="static", whose queries need the '
            "prompt that rose through the stream's own first block.",
        )
    _check_drawn_segments(recipe)
    if fam.through_stack:
        name = f'fam.recurrence="{fam.recurrence}"'
        refuse_unless(
            not feedback.state_passing,
            f"feedback.state_passing passes the FAM of each layer, and under {name} there is none; "
            "leave it out.",
        )
        refuse_unless(
            not feedback.diversity_weight and not feedback.reconstruction_weight,
            "feedback.diversity_weight and feedback.reconstruction_weight look at the FAM of each "
            f"layer, and under {name} there is none; leave them out.",
        )
        refuse_unless(
            recipe.data.layout != "documents",
            f'data.layout="documents" begins texts in some rows and not in others, and under {name} '
            'rows stand alike; take "packed" or "single".',
        )
    # Without a feedback memory all of this does nothing: fam.fam_length=0 makes a baseline of a recipe.
    if feedback.bias_steps and fam.has_feedback:
        refuse_unless(
            feedback.bias_start < fam.fam_bias,
            f"feedback.bias_steps needs a feedback.bias_start below fam.fam_bias={fam.fam_bias}, to "
            f"which it rises; it is {feedback.bias_start}.",
        )


def _check_asked(recipe: Recipe) -> None:
    feedback, fam = recipe.feedback, recipe.fam
    at_least(0, "feedback", feedback, ["asked_blocks"])
    refuse_unless(
        not feedback.asked_blocks or fam.fam_query != "static" or not fam.has_feedback,
        'feedback.asked_blocks asks streams that begin with a FAM, and with fam.fam_query="static" none '
        "can; leave one or the other out.",
    )
    # Texts that are replayed are asked at the ends of segments.
    cut = feedback.bptt_blocks and not recipe.replay.blocks
    others = cut or feedback.diversity_weight or feedback.reconstruction_weight
    alone = fam.fam_seen == "asked" and recipe.data.layout == "single" and not others
    refuse_unless(
        not feedback.asked_blocks or alone or not fam.has_feedback,
        'feedback.asked_blocks asks of whole texts what FAM alone shows; take fam.fam_seen="asked", '
        'data.layout="single", feedback.bptt_blocks=0 and no auxiliary losses.',
    )
    refuse_unless(
        fam.fam_seen == "always" or recipe.data.layout != "packed",
        'In data.layout="packed" texts stand one behind the other, and all would be asked; take '
        '"single" for fam.fam_seen="asked".',
    )
    refuse_unless(
        fam.fam_seen == "asked"
        or not fam.has_feedback
        or not any(s.asked_prose for s in recipe.data.sources),
        'asked_prose of a source is for fam.fam_seen="asked"; leave it out.',
    )


def _check_drawn_segments(recipe: Recipe) -> None:
    drawn = recipe.feedback.drawn_segments
    if not drawn:
        return
    refuse_unless(
        min(drawn) >= 0,
        f"feedback.drawn_segments must be numbers of past blocks, from 0, not {list(drawn)}.",
    )
    refuse_unless(
        recipe.fam.attention == "bswa" and recipe.data.layout != "documents",
        'feedback.drawn_segments is for fam.attention="bswa" and data.layout="packed" or "single": '
        "other windows have no past blocks, and documents go on from step to step.",
    )


def _check_run(recipe: Recipe) -> None:
    run = recipe.run
    at_least(1, "run", run, ["steps", "keep_checkpoints", "log_every"])
    at_least(0, "run", run, ["minutes", "seed", "checkpoint_every"])
    above_zero("run", run, ["explode_at"])  # inf: never


def _check_probes(recipe: Recipe) -> None:
    probes = recipe.probes
    at_least(0, "probes", probes, ["every"])
    at_least(2, "probes", probes, ["heldout_tokens"])
    at_least(
        1, "probes", probes, ["heldout_rows", "passkey_samples", "passkey_keys", "passkey_digits"]
    )
    ascending("probes.passkey_lengths", probes.passkey_lengths)
    place("probes.passkey_where", probes.passkey_where)
