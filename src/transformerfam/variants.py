"""Every variant that can be set, as data: what it is called, who proposed it, which settings give it.

Settings are changes of `FamConfig.paper()` and of the recipe `paper`. Adding a variant is a line here;
CONTRIBUTING says how. Knows no torch, and nothing of how a variant is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformerfam.config import FamConfig

FAM_PAPER = "arXiv 2404.09173"


@dataclass(frozen=True)
class Variant:
    """One way to read, or to train.

    Attributes:
        name: short, that of its paper.
        paper: where it comes from, and which part of it.
        about: one line: what is another than in TransformerFAM with windows.
        fam: fields of `FamConfig` that give it.
        feedback: settings of the section [feedback] of a recipe that give it.
    """

    name: str
    paper: str
    about: str
    fam: Mapping[str, Any] = field(default_factory=dict)
    feedback: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: FamConfig) -> FamConfig:
        """`base` as this variant. Raises ValueError if `base` leaves no room for it."""
        return base.changed(**self.fam)

    @property
    def settings(self) -> str:
        """As fields of a recipe, `fam.memory_segments=0`; empty for TransformerFAM itself."""
        given = [f"fam.{name}={_shown(value)}" for name, value in self.fam.items()]
        given += [f"feedback.{name}={_shown(value)}" for name, value in self.feedback.items()]
        return " ".join(given)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _windows(segments: int) -> Variant:
    own = f"the own block and the {segments} before" if segments else "the own block alone"
    return Variant(
        f"M{segments}",
        f"{FAM_PAPER}, figure 3a",
        f"{own}, no feedback",
        {"memory_segments": segments, "fam_length": 0},
    )


_NO_FAM: dict[str, Any] = {"fam_length": 0}
# The recipe `paper` passes F from step to step, which some have none of and some cannot begin with.
_NO_PASSING: dict[str, Any] = {"state_passing": 0.0}

VARIANTS: tuple[Variant, ...] = (
    # ---- windows and patterns, without feedback
    Variant(
        "full attention",
        "arXiv 1706.03762",
        "every token before, no feedback",
        {"attention": "full", **_NO_FAM},
    ),
    Variant(
        "SWA",
        f"{FAM_PAPER}, figure 1a",
        "the last w tokens, no feedback",
        {"attention": "swa", **_NO_FAM},
    ),
    Variant(
        "BSWA",
        f"{FAM_PAPER}, algorithm 1",
        "the own block and M before, no feedback",
        {"attention": "bswa", **_NO_FAM},
    ),
    *(_windows(segments) for segments in (0, 1, 2, 3, 4, 6, 7, 8, 12)),
    Variant(
        "M1_SG",
        f"{FAM_PAPER}, figure 3a",
        "as M1, no gradient through the past block",
        {"memory_segments": 1, "stop_gradient": True, **_NO_FAM},
    ),
    Variant(
        "TransformerXL",
        "arXiv 1901.02860",
        "BSWA, and of it the last w tokens; no feedback",
        {"attention": "xl", **_NO_FAM},
    ),
    Variant(
        "Longformer",
        "arXiv 2004.05150",
        "SWA, and global tokens that are seen by all; no feedback",
        {"attention": "longformer", "global_positions": (0,), **_NO_FAM},
    ),
    Variant(
        "BigBird",
        "arXiv 2007.14062",
        "BSWA, the first block, and blocks drawn at random; no feedback",
        {"attention": "bigbird", "random_blocks": 3, **_NO_FAM},
    ),
    Variant(
        "Sparse Transformer",
        "arXiv 1904.10509, fixed",
        "the own block, and the last tokens of every block before; no feedback",
        {"attention": "sparse", "memory_segments": 0, "summary_tokens": 8, **_NO_FAM},
    ),
    Variant(
        "StreamingLLM",
        "arXiv 2309.17453",
        "BSWA, and the first tokens stay visible (sinks); no feedback",
        {"attention": "bswa", "sink_tokens": 4, **_NO_FAM},
    ),
    # ---- feedback
    Variant(
        "TransformerFAM", f"{FAM_PAPER}, algorithm 2", "BSWA, and feedback slots in each layer"
    ),
    Variant(
        "FAM, no segments",
        f"{FAM_PAPER}, 3.2",
        "feedback slots alone connect the blocks",
        {"memory_segments": 0},
    ),
    Variant(
        "previous FAMs",
        f"{FAM_PAPER}, table 6",
        "a block sees the last three F instead of one",
        {"previous_fams": 3},
    ),
    Variant(
        "prefix",
        f"{FAM_PAPER}, B.1",
        "a trained start for each layer instead of a prompt that rises",
        {"fam_start": "prefix"},
    ),
    Variant(
        "float",
        f"{FAM_PAPER}, table 7",
        "feedback slots stand between two blocks",
        {"fam_position": "float"},
    ),
    Variant(
        "zero",
        f"{FAM_PAPER}, table 7",
        "feedback slots stand at the start of the stream",
        {"fam_position": "zero"},
    ),
    Variant(
        "SUM FAM",
        f"{FAM_PAPER}, figure 9",
        "static summary: queries of the feedback slots stay the same, no residual copy",
        {"fam_query": "static"},
        _NO_PASSING,
    ),
    Variant(
        "kept residual",
        "ours",
        "the first update adds the prompt; harms a pretrained model less",
        {"first_residual": "prompt"},
    ),
    Variant(
        "queries at block end",
        "ours",
        "queries of the feedback slots stand where what they make will stand",
        {"fam_query_position": "block_end"},
    ),
    Variant(
        "bounded feedback",
        "ours",
        "every slot is rescaled to a root mean square of 1 after each update",
        {"feedback_norm": "rms"},
    ),
    Variant(
        "heavy feedback",
        "ours",
        "rescaled to 3: an update changes a third as much; held longer, written more slowly",
        {"feedback_norm": "rms", "feedback_rms": 3.0},
    ),
    # ---- other memories
    *(
        Variant(
            f"FM{m}",
            f"{FAM_PAPER}, table 9",
            f"past blocks as their layers' outputs, {m} of them; no FAM",
            {"memory_source": "output", "memory_segments": m, "fam_length": 0},
        )
        for m in (1, 2, 4)
    ),
    *(
        Variant(
            f"Infini-attention, {rule}",
            f"arXiv 2404.07143, equation {equation}",
            f"a matrix in each head sums up all past blocks, written by the {rule} rule",
            {"compressive_memory": rule, "memory_segments": 0, "fam_length": 0},
        )
        for rule, equation in (("linear", 4), ("delta", 5))
    ),
    Variant(
        "RMT",
        "arXiv 2207.06881",
        "memory tokens that the top layer writes enter the next block at the bottom",
        {"recurrence": "rmt", "memory_segments": 0},
        _NO_PASSING,
    ),
    Variant(
        "AutoCompressor",
        "arXiv 2305.14788",
        "the same, and the summaries of all earlier blocks stay: it grows",
        {"recurrence": "autocompressor", "memory_segments": 0},
        _NO_PASSING,
    ),
    # ---- training
    Variant(
        "without RSP",
        f"{FAM_PAPER}, B.2",
        "no step starts from the F of the step before",
        feedback=_NO_PASSING,
    ),
    Variant(
        "without RPO",
        f"{FAM_PAPER}, B.2.2",
        "no step moves its positions",
        feedback={"position_offset": 0.0},
    ),
    Variant(
        "diversity loss",
        f"{FAM_PAPER}, C.4",
        "a loss pushes the slots of a layer apart",
        feedback={"diversity_weight": 1.0},
    ),
    Variant(
        "reconstruction loss",
        f"{FAM_PAPER}, C.5; arXiv 1911.05507",
        "a loss wants from F what its block would have given",
        feedback={"reconstruction_weight": 1.0},
    ),
)
