"""What does not go with steps that are replayed (`replay.blocks`) or recorded (`run.cuda_graphs`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformerfam.errors import UserError
from transformerfam.training.refusals import at_least, refuse_unless

if TYPE_CHECKING:
    from transformerfam.training.recipe import Recipe


def check_replay(recipe: Recipe) -> None:
    """What is kept of tokens must not change, and there must be something to put around."""
    replay, fam, feedback = recipe.replay, recipe.fam, recipe.feedback
    at_least(0, "replay", replay, ["blocks", "rows_at_once", "max_growth"])
    at_least(1, "replay", replay, ["times"])
    for name in ("before", "behind"):
        drawn = getattr(replay, name)
        refuse_unless(
            bool(drawn) and min(drawn) >= 0,
            f"replay.{name} must be numbers of blocks, from 0, not {list(drawn)}.",
        )
    if not replay.blocks or not fam.has_feedback:
        return
    refuse_unless(
        fam.fam_seen == "asked" and fam.adapted == "fam" and fam.past_length is not None,
        'replay.blocks keeps what tokens leave, which must not change with FAM: take fam.adapted="fam", '
        'fam.fam_seen="asked" and windows that end.',
    )
    made_up = all(s.kind != "files" for s in recipe.data.sources if s.share)
    refuse_unless(
        recipe.data.layout == "single" and made_up,
        'replay.blocks puts prose around texts that are made up; take data.layout="single" and no '
        "source of files.",
    )
    refuse_unless(
        max(fam.anchor_positions, default=0) < fam.block_size,
        "replay.blocks takes global tokens and sinks from the first block of a text; here are some that "
        "stand further back.",
    )
    refuse_unless(
        not feedback.bptt_blocks or feedback.bptt_blocks >= fam.previous_fams,
        f"With replay.blocks the newest {fam.previous_fams} FAMs, which are seen, must lie in one "
        f"segment: feedback.bptt_blocks must be at least as many, not {feedback.bptt_blocks}.",
    )
    refuse_unless(
        not feedback.bptt_blocks or feedback.asked_blocks > 0,
        "Of replayed texts in segments of feedback.bptt_blocks, what writes is taught only where the "
        "first segment is asked; set feedback.asked_blocks, to 2 or more.",
    )
    refuse_unless(
        not feedback.bptt_blocks or min(replay.before) < feedback.bptt_blocks,
        "The prompt learns only in segments with the first block of a text, and with "
        f"feedback.bptt_blocks={feedback.bptt_blocks} none that is asked has it; give replay.before a "
        "smaller number.",
    )
    wrong = {
        "filler_share without asked_prose": _prose_counts(recipe),
        "feedback.state_passing": feedback.state_passing,
        "feedback.position_offset": feedback.position_offset,
        "feedback.diversity_weight": feedback.diversity_weight,
        "feedback.reconstruction_weight": feedback.reconstruction_weight,
        'fam.fam_query="static"': fam.fam_query == "static",
    }
    found = [name for name, is_set in wrong.items() if is_set]
    refuse_unless(
        not found, f"replay.blocks does not go with {', '.join(found)}; leave one or the other out."
    )


def _prose_counts(recipe: Recipe) -> bool:
    """Whether prose is learned from that is only read, not asked."""
    return any(s.filler_share and not s.asked_prose for s in recipe.data.sources if s.share)


def check_recording(recipe: Recipe) -> None:
    """What every row of a recorded step has in common is recorded with it."""
    if not recipe.run.cuda_graphs:
        return
    if recipe.replay.blocks and recipe.fam.has_feedback:
        _refuse_in_recordings(_where_replayed(recipe))
        return
    feedback = recipe.feedback
    wrong = {
        "run.activation_checkpointing=true": recipe.run.activation_checkpointing,
        'data.layout="documents"': recipe.data.layout == "documents",
        "feedback.position_offset": feedback.position_offset,
        "feedback.bias_steps": feedback.bias_steps and recipe.fam.has_feedback,
        "feedback.diversity_weight": feedback.diversity_weight,
        "feedback.reconstruction_weight": feedback.reconstruction_weight,
        "train.dropout": recipe.train.dropout,
        "feedback.asked_blocks": feedback.asked_blocks,
        f'fam.recurrence="{recipe.fam.recurrence}"': recipe.fam.through_stack,
    }
    if recipe.fam.fam_seen == "asked":
        wrong["feedback.bptt_blocks"] = feedback.bptt_blocks
        wrong["filler_share without asked_prose"] = _prose_counts(recipe)
        # Each length is a recording.
        wrong["lengths of a range"] = any(
            (len(s.lengths) == 2 and s.lengths_in_steps_of % recipe.fam.block_size)
            or not s.lengths_alike
            for s in recipe.data.sources
            if s.kind != "files"
        )
    _refuse_in_recordings(wrong)
    if feedback.bptt_blocks:
        _check_segments_alike(recipe)


def _where_replayed(recipe: Recipe) -> dict[str, object]:
    """A block is played alike wherever it stands in a text."""
    return {
        "run.activation_checkpointing=true": recipe.run.activation_checkpointing,
        "feedback.bias_steps": recipe.feedback.bias_steps and recipe.fam.has_feedback,
        "train.dropout": recipe.train.dropout,
        'fam.fam_position="zero"': recipe.fam.fam_position == "zero",
        "fam.global_positions": recipe.fam.global_positions,
    }


def _refuse_in_recordings(wrong: Mapping[str, object]) -> None:
    found = [name for name, is_set in wrong.items() if is_set]
    refuse_unless(
        not found,
        f"run.cuda_graphs plays the same step again and again, which does not go with "
        f"{', '.join(found)}; leave one or the other out.",
    )


def _check_segments_alike(recipe: Recipe) -> None:
    """All segments of a text but its first are played alike: however far it is, it looks the same."""
    fam, feedback = recipe.fam, recipe.feedback
    past = fam.past_length
    if past is None or fam.global_positions or fam.fam_position == "zero":
        raise UserError(
            "run.cuda_graphs does not go with feedback.bptt_blocks where windows grow or positions "
            "count from the start of a text; leave one or the other out."
        )
    behind = max(*feedback.drawn_segments, -(-past // fam.block_size), fam.previous_fams, 0)
    refuse_unless(
        feedback.bptt_blocks >= behind,
        f"With run.cuda_graphs a segment must fill the windows: feedback.bptt_blocks must be at least "
        f"{behind}, not {feedback.bptt_blocks}.",
    )
