"""What a geometry cannot be, each with the reason in one sentence. Knows `FamConfig` and no torch."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    from transformerfam.config import FamConfig

# Fields that take one of a few names.
_CHOICES = (
    "fam_position",
    "fam_query_position",
    "fam_start",
    "fam_query",
    "fam_seen",
    "first_residual",
    "attention",
    "memory_source",
    "compressive_memory",
    "recurrence",
    "adapted",
    "backend",
)


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Field -> the names that it takes. Reading annotations is slow, and checks are not rare."""
    from transformerfam.config import FamConfig

    hints = get_type_hints(FamConfig)
    return {name: get_args(hints[name]) for name in _CHOICES}


def check_types(config: FamConfig) -> None:
    """Raise ValueError for a value of a kind that its field does not take."""
    norm, window = config.feedback_norm, config.window
    norms = norm if isinstance(norm, (list, tuple)) else (norm,)
    kinds = {
        "window": (window is None or _is_whole(window), "a whole number or None"),
        "stop_gradient": (isinstance(config.stop_gradient, bool), "True or False"),
        "global_positions": (
            isinstance(config.global_positions, (list, tuple, set, frozenset))
            and all(_is_whole(g) and g >= 0 for g in config.global_positions),
            "positions in the stream: whole numbers from 0",
        ),
        "feedback_norm": (
            isinstance(norm, str) or all(_is_number(n) for n in norms),
            "'none', 'rms', a number, or one number for each slot",
        ),
        "feedback_rms": (_is_number(config.feedback_rms), "a number above 0"),
        "fam_bias": (_is_number(config.fam_bias), "a finite number"),
    }
    for name, (fits, wanted) in kinds.items():
        if not fits:
            raise ValueError(f"{name} must be {wanted}, not {getattr(config, name)!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check(config: FamConfig) -> None:
    """Raise ValueError for a combination that cannot work."""
    _check_numbers(config)
    _check_choices(config)
    _check_pattern(config)
    _check_feedback(config)
    _check_variants(config)
    _check_recurrence(config)


def _check_numbers(config: FamConfig) -> None:
    least = {
        "block_size": 1,
        "memory_segments": 0,
        "fam_length": 0,
        "previous_fams": 1,
        "random_blocks": 0,
        "summary_tokens": 0,
        "sink_tokens": 0,
    }
    for name, smallest in least.items():
        value = getattr(config, name)
        if not _is_whole(value) or value < smallest:
            raise ValueError(
                f"{name} must be a whole number of at least {smallest}, not {value!r}."
            )


def _check_choices(config: FamConfig) -> None:
    for name, allowed in _choices().items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, not {getattr(config, name)!r}."
            )


def _check_pattern(config: FamConfig) -> None:
    w = config.window_length
    if w is None and config.window is not None:
        raise ValueError(
            f"attention={config.attention!r} has no window to set: its window is memory_segments "
            "whole blocks, or everything. Leave window out, or use swa, xl or longformer."
        )
    if w is not None and w < 1:
        raise ValueError(
            f"attention={config.attention!r} needs a window of at least 1 token; set window, or "
            "memory_segments to 1 or more."
        )
    held = (config.memory_segments + 1) * config.block_size
    if config.attention == "xl" and w is not None and w > held:
        raise ValueError(
            f"The xl window of {w} tokens is longer than {config.memory_segments} memory segments "
            f"and the present block, {held} tokens; raise memory_segments or lower window."
        )
    if (config.attention == "longformer") != bool(config.global_positions):
        raise ValueError(
            "global_positions belong to attention='longformer', which needs at least one."
        )
    if (config.attention == "bigbird") != bool(config.random_blocks):
        raise ValueError(
            "random_blocks belong to attention='bigbird', which needs at least one; its paper "
            "has three."
        )
    if (config.attention == "sparse") != bool(config.summary_tokens):
        raise ValueError("summary_tokens belong to attention='sparse', which needs at least one.")
    if max(config.sink_tokens, config.summary_tokens) > config.block_size:
        name = "sink_tokens" if config.sink_tokens > config.block_size else "summary_tokens"
        raise ValueError(
            f"{name}={getattr(config, name)} must fit into a block; with "
            f"block_size={config.block_size} set it to {config.block_size} or fewer."
        )


def _check_feedback(config: FamConfig) -> None:
    norm = config.feedback_norm
    if isinstance(norm, str):
        if norm not in ("none", "rms"):
            raise ValueError("feedback_norm must be 'none', 'rms', or the largest RMS of a row.")
    elif not (norm if isinstance(norm, tuple) else (norm,)) or any(
        not c > 0 for c in (norm if isinstance(norm, tuple) else (norm,))
    ):
        raise ValueError("feedback_norm as a number is the largest RMS of a row: above 0.")
    if isinstance(norm, tuple) and len(norm) != config.fam_length:
        raise ValueError(
            f"feedback_norm has {len(norm)} numbers for {config.fam_length} feedback slots; "
            "give one for each, or a single number."
        )
    if not 0 < config.feedback_rms < math.inf:
        raise ValueError(f"feedback_rms must be a number above 0, not {config.feedback_rms!r}.")
    if config.feedback_rms != 1 and norm != "rms":
        raise ValueError("feedback_rms is what feedback_norm='rms' rescales to; set both.")
    if not math.isfinite(config.fam_bias):
        raise ValueError(f"fam_bias must be a finite number, not {config.fam_bias!r}.")
    looks = config.fam_bias or config.fam_seen != "always"
    if not config.has_feedback and (config.previous_fams > 1 or norm != "none" or looks):
        raise ValueError(
            "previous_fams, feedback_norm, fam_bias and fam_seen need a feedback memory; set "
            "fam_length."
        )
    by_block = config.fam_position == "last" and not config.through_stack
    if by_block and config.fam_length > config.block_size:
        raise ValueError(
            "fam_position='last' gives FAM the last fam_length positions of a block, so "
            "fam_length can be at most block_size."
        )


def _check_variants(config: FamConfig) -> None:
    outputs, compressive = config.memory_source == "output", config.compressive_memory != "none"
    if outputs and compressive:
        raise ValueError(
            "memory_source='output' and compressive_memory are two memories of past blocks; "
            "choose one."
        )
    name = "memory_source='output'" if outputs else "compressive_memory"
    if (outputs or compressive) and config.has_feedback:
        raise ValueError(f"{name} stands in the place of FAM; set fam_length to 0.")
    if (outputs or compressive) and config.attention != "bswa":
        raise ValueError(f"{name} works on whole blocks: it needs attention='bswa'.")
    if outputs and config.adapted != "all":
        raise ValueError(f"{name} has no FAM that adapted='fam' could be of; leave adapted out.")
    if outputs and not config.memory_segments:
        raise ValueError(f"{name} needs past blocks to see; set memory_segments to 1 or more.")


def _check_recurrence(config: FamConfig) -> None:
    if not config.through_stack:
        return
    name = f"recurrence={config.recurrence!r}"
    if not config.has_feedback:
        raise ValueError(f"{name} needs memory tokens; set fam_length to 1 or more.")
    if config.memory_segments or config.attention != "bswa":
        raise ValueError(
            f"Under {name} blocks see each other through memory tokens alone; set "
            "memory_segments=0 and attention='bswa'."
        )
    if config.previous_fams > 1 or config.feedback_norm != "none":
        raise ValueError(
            f"previous_fams and feedback_norm do nothing under {name}; leave them out."
        )
    if config.fam_start != "prompt" or config.fam_query != "feedback":
        raise ValueError(f"fam_start and fam_query do nothing under {name}; leave them out.")
    if config.fam_seen != "always":
        raise ValueError(f"Under {name} memory is seen by all; leave fam_seen out.")
    if config.adapted != "all":
        raise ValueError(
            f"Under {name} memory goes among the tokens through the layers; leave adapted out."
        )
    if config.fam_position != "last" or config.fam_query_position != "same":
        raise ValueError(
            f"Memory tokens stand around their block under {name}; leave fam_position and "
            "fam_query_position out."
        )
