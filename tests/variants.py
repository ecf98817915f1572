"""Geometries that between them use every field of `FamConfig`."""

from __future__ import annotations

from typing import Any

from transformerfam import FamConfig

_SMALL: dict[str, Any] = {"block_size": 6, "memory_segments": 1, "fam_length": 3}

_CHANGES: dict[str, dict[str, Any]] = {
    "paper": {},
    "no memory segments": {"memory_segments": 0},
    "two memory segments": {"memory_segments": 2},
    "bswa": {"fam_length": 0},
    "bswa with sinks": {"fam_length": 0, "sink_tokens": 2},
    "sinks": {"sink_tokens": 2},
    "sinks, no segments": {"sink_tokens": 4, "memory_segments": 0},
    "as long as a block": {"fam_length": 6},
    "first residual": {"first_residual": "prompt"},
    "prefix": {"fam_start": "prefix"},
    "prefix, two previous fams": {"fam_start": "prefix", "previous_fams": 2, "sink_tokens": 1},
    "prefix, full": {"fam_start": "prefix", "attention": "full"},
    "static": {"fam_query": "static"},
    "static at block end": {"fam_query": "static", "fam_query_position": "block_end"},
    "static prefix": {"fam_query": "static", "fam_start": "prefix", "fam_position": "zero"},
    "query at block end": {"fam_query_position": "block_end"},
    "float": {"fam_position": "float"},
    "float, query at block end": {"fam_position": "float", "fam_query_position": "block_end"},
    "zero": {"fam_position": "zero"},
    "rms": {"feedback_norm": "rms"},
    "rms of 3": {"feedback_norm": "rms", "feedback_rms": 3.0, "first_residual": "prompt"},
    "cap": {"feedback_norm": 0.5, "first_residual": "prompt"},
    "cap per slot": {"feedback_norm": (0.2, 1.0, 5.0)},
    "three previous fams": {"previous_fams": 3, "first_residual": "prompt"},
    "previous fams at zero": {"previous_fams": 2, "fam_position": "zero", "sink_tokens": 1},
    "fam bias": {"fam_bias": -1.5, "previous_fams": 2, "sink_tokens": 1},
    "fam bias, flex": {"fam_bias": 0.5, "backend": "flex"},
    "full": {"attention": "full"},
    "full without feedback": {"attention": "full", "fam_length": 0},
    "swa": {"attention": "swa", "window": 9},
    "swa with sinks": {"attention": "swa", "window": 9, "sink_tokens": 2},
    "narrow swa": {"attention": "swa", "window": 1, "memory_segments": 0},
    "xl": {"attention": "xl", "memory_segments": 2},
    "xl with sinks": {"attention": "xl", "window": 5, "sink_tokens": 2},
    "longformer": {"attention": "longformer", "window": 4, "global_positions": (0, 2, 9)},
    "late global": {
        "attention": "longformer",
        "window": 3,
        "global_positions": (15,),
        "fam_length": 0,
    },
    "bigbird": {"attention": "bigbird", "random_blocks": 1, "memory_segments": 0},
    "bigbird without feedback": {"attention": "bigbird", "random_blocks": 2, "fam_length": 0},
    "sparse": {"attention": "sparse", "summary_tokens": 2, "memory_segments": 0},
    "stopped gradient": {"stop_gradient": True, "sink_tokens": 1},
    # A window that is shorter than a block sees sinks of its own block: these are no past.
    "xl with sinks, stopped": {
        "attention": "xl",
        "window": 3,
        "sink_tokens": 2,
        "stop_gradient": True,
    },
    "feedback segments": {"memory_source": "output", "memory_segments": 2, "fam_length": 0},
    "feedback segments, stopped": {
        "memory_source": "output",
        "fam_length": 0,
        "sink_tokens": 2,
        "stop_gradient": True,
    },
    "compressive": {"compressive_memory": "linear", "memory_segments": 0, "fam_length": 0},
    "compressive, delta": {"compressive_memory": "delta", "fam_length": 0, "sink_tokens": 1},
    "compressive, stopped": {
        "compressive_memory": "delta",
        "memory_segments": 0,
        "fam_length": 0,
        "stop_gradient": True,
    },
    "eager": {"backend": "eager", "sink_tokens": 1},
    "flex": {"backend": "flex", "sink_tokens": 1},
}

VARIANTS: dict[str, FamConfig] = {
    name: FamConfig.paper(**{**_SMALL, **c}) for name, c in _CHANGES.items()
}
