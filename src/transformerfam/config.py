"""What a TransformerFAM is: the geometry of its blocks, windows and feedback memory.

Knows no torch. A `FamConfig` is a value: two that are equal describe the same computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from transformerfam.config_checks import check, check_types

AttentionPattern = Literal["full", "swa", "bswa", "xl", "longformer", "bigbird", "sparse"]
FamPosition = Literal["last", "float", "zero"]
FamQueryPosition = Literal["same", "block_end"]
FamStart = Literal["prompt", "prefix"]
FamQuery = Literal["feedback", "static"]
FirstResidual = Literal["zero", "prompt"]
MemorySource = Literal["input", "output"]
CompressiveMemory = Literal["none", "linear", "delta"]
Recurrence = Literal["layer", "rmt", "autocompressor"]
Adapted = Literal["all", "fam"]
FamSeen = Literal["always", "asked"]
Backend = Literal["sdpa", "eager", "flex"]

# Modules that a decoder may get, as the geometry asks; see `FamConfig.added_modules`.
ADDED_MODULES = ("fam_prompt", "memory_gates")

# Fields that change speed, gradients or how a memory is looked at, but not how it is laid out.
_NOT_PART_OF_A_MEMORY = ("backend", "stop_gradient", "fam_bias", "fam_seen")

# Fields that belong to some patterns alone, and what they are under the others.
_OF_SOME_PATTERNS: dict[str, Any] = {
    "window": None,
    "global_positions": (),
    "random_blocks": 0,
    "summary_tokens": 0,
}

# Fields that need FAM, and what they are without.
OF_FEEDBACK: dict[str, Any] = {
    "feedback_norm": "none",
    "previous_fams": 1,
    "fam_bias": 0.0,
    "recurrence": "layer",
    "fam_seen": "always",
}


@dataclass(frozen=True)
class FamConfig:
    """Geometry of a TransformerFAM (arXiv 2404.09173).

    The defaults are the paper's but for two, `first_residual` and `sink_tokens`: a pretrained model
    that begins with those loses little, and one that begins as the paper does loses several nats.
    `FamConfig.paper()` has the paper's.

    Attributes:
        block_size: B, tokens in a block.
        memory_segments: M, past blocks whose keys and values each layer keeps.
        fam_length: N, feedback slots of each layer. 0 turns feedback off: TransformerBSWA.
        fam_position: rotary position of FAM (B.2.1). `last`: the last N positions of the block
            that it compresses; `float`: evenly spaced between the last position of that block and
            the first of the next; `zero`: always 0, the start of the stream.
        fam_query_position: `same`: a FAM query stands where the FAM key of the same row stands;
            `block_end`: where the FAM that it produces will stand.
        fam_start: what a stream begins with. `prompt` (B.1): one prompt that rises through the layers
            in block 0; `prefix`: a trainable F_{-1} of its own for every layer, which block 0 sees.
        fam_query: where FAM queries come from. `feedback`: F_{τ-1}; `static` (SUM FAM): always the
            layer's FAM input of block 0, and no residual copy, so that F is what attention found.
        first_residual: what is added to the attention of the very first update (B.1): the `prompt`
            row itself, or `zero`, as the paper has it.
        feedback_norm: what keeps the feedback loop bounded. `none` (the paper), `rms` (every FAM
            row is rescaled to a root mean square of `feedback_rms` after each update), or the largest
            root mean square that a row may have: one number, or one for each slot.
        feedback_rms: what `rms` rescales to. The larger it is, the less an update changes F: it is
            held longer, and written more slowly.
        previous_fams: how many past FAMs the block queries see (table 6).
        fam_bias: added to the scores with which tokens look at FAM. Training may begin with a very
            negative one, where the model is its own windows without feedback, and let it rise to 0.
        fam_seen: which tokens look at FAM. `always`: all (the paper); `asked`: those that are read
            where something is asked or said (`Memory.asked`, `generate`). All others are read as the
            windows alone read them, while FAM reads them all the same.
        attention: which past tokens a token sees, see `transformerfam.masks`.
        window: tokens seen by `swa`, `xl` and `longformer`; by default memory_segments * block_size.
        global_positions: positions that see all and are seen by all (`longformer` only). The
            memory grows to hold everything before the last of them.
        random_blocks: r, earlier blocks drawn at random for each block (`bigbird` only).
        summary_tokens: c, last tokens of every block that all later ones see (`sparse` only).
        sink_tokens: the first tokens of the stream that stay visible for ever, just before the
            window (attention sinks, StreamingLLM). Pretrained models read much better with them;
            the paper has none. Always 0 where everything is kept (`keeps_everything`), and under
            `longformer`, whose globals are kept for ever instead.
        memory_source: what the keys and values of past blocks are projected from: a layer's `input`,
            or its `output` (feedback memory segments, FM in table 9): bswa without FAM.
        compressive_memory: a matrix for each head that sums up all past blocks (Infini-attention,
            arXiv 2404.07143), written by the `linear` or the `delta` rule, or `none`: bswa without
            FAM.
        recurrence: which way memory runs. `layer`: from each layer to itself, one block later (the
            paper). `rmt` (arXiv 2207.06881): the top layer writes fam_length memory tokens that the
            next block reads at the bottom layer. `autocompressor` (arXiv 2305.14788): the same, and
            every later block reads them: the memory grows. See `transformerfam.recurrent`.
        adapted: whose way through the layers an adapter changes: `all` (the paper), or that of `fam`
            alone, so that tokens, as long as they see no FAM, are read exactly by the model's own
            weights. It matters only under an adapter of PEFT, and one of `fam` must not be merged.
        stop_gradient: no gradient through the keys and values of past blocks (`M1_SG`, figure 3a).
        backend: how attention is computed: `sdpa`, `eager` or `flex`. Changes no result.

    Raises:
        ValueError: for a combination that cannot work, with the reason.
    """

    block_size: int = 1024
    memory_segments: int = 3
    fam_length: int = 64
    fam_position: FamPosition = "last"
    fam_query_position: FamQueryPosition = "same"
    fam_start: FamStart = "prompt"
    fam_query: FamQuery = "feedback"
    first_residual: FirstResidual = "prompt"
    feedback_norm: str | float | tuple[float, ...] = "none"
    feedback_rms: float = 1.0
    previous_fams: int = 1
    fam_bias: float = 0.0
    fam_seen: FamSeen = "always"
    attention: AttentionPattern = "bswa"
    window: int | None = None
    global_positions: tuple[int, ...] = ()
    random_blocks: int = 0
    summary_tokens: int = 0
    sink_tokens: int = 4
    memory_source: MemorySource = "input"
    compressive_memory: CompressiveMemory = "none"
    recurrence: Recurrence = "layer"
    adapted: Adapted = "all"
    stop_gradient: bool = False
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        check_types(self)
        # Lists come from JSON; a frozen value holds tuples.
        object.__setattr__(self, "global_positions", tuple(sorted(set(self.global_positions))))
        if isinstance(self.feedback_norm, (list, tuple)):
            object.__setattr__(self, "feedback_norm", tuple(float(c) for c in self.feedback_norm))
        if self.keeps_everything or self.attention == "longformer" or self.through_stack:
            object.__setattr__(self, "sink_tokens", 0)
        if self.through_stack:  # there is no first update of a layer
            object.__setattr__(self, "first_residual", "prompt")
        check(self)

    # ---- geometry that follows from the fields

    @property
    def has_feedback(self) -> bool:
        """Whether there is a feedback memory at all."""
        return self.fam_length > 0

    @property
    def keeps_everything(self) -> bool:
        """Whether every past key may be seen again, so that the memory grows with the stream."""
        return self.attention in ("full", "bigbird", "sparse")

    @property
    def through_stack(self) -> bool:
        """Whether memory goes from the top layer of a block to the bottom layer of the next."""
        return self.recurrence != "layer"

    @property
    def window_length(self) -> int | None:
        """w, the window of `swa`, `xl` and `longformer` in tokens; None for the other patterns."""
        if self.keeps_everything or self.attention == "bswa":
            return None
        return self.memory_segments * self.block_size if self.window is None else self.window

    @property
    def past_length(self) -> int | None:
        """P, past tokens (a multiple of B) whose keys and values are kept; None: all of them."""
        B, w = self.block_size, self.window_length
        if self.keeps_everything:
            return None
        if self.attention in ("bswa", "xl"):
            return self.memory_segments * B
        assert w is not None
        for_window = -(-(w - 1) // B) * B
        for_globals = max(self.global_positions, default=0) // B * B
        return max(for_window, for_globals)

    @property
    def anchor_positions(self) -> tuple[int, ...]:
        """Positions of the stream whose keys and values are kept for ever: sinks or globals."""
        return self.global_positions or tuple(range(self.sink_tokens))

    @property
    def slots(self) -> int | None:
        """Keys that each layer keeps: past, anchors, FAMs and the current block; None: it grows."""
        if self.past_length is None or self.recurrence == "autocompressor":
            return None
        fams = self.previous_fams * self.fam_length
        return self.past_length + len(self.anchor_positions) + fams + self.block_size

    @property
    def extra_state(self) -> tuple[str, ...]:
        """Names of the tensors that each layer keeps beside keys, values and FAM."""
        if self.is_static:
            return ("fam_input",)
        if self.memory_source == "output":
            return ("output_keys", "output_values")
        return () if self.compressive_memory == "none" else ("compressed", "pending")

    @property
    def is_static(self) -> bool:
        """Whether FAM queries are the same for all blocks (SUM FAM)."""
        return self.has_feedback and self.fam_query == "static"

    @property
    def memory_name(self) -> str:
        """What reaches back beyond the windows, in a word; empty: nothing does."""
        if self.through_stack:
            return {"rmt": "RMT", "autocompressor": "AutoCompressor"}[self.recurrence]
        if self.compressive_memory != "none":
            return "Infini-attention"
        if self.memory_source == "output":
            return "FM"
        return "FAM" if self.has_feedback else ""

    @property
    def added_modules(self) -> tuple[str, ...]:
        """Names of the modules, all of them trained, that the decoder has beside its family's."""
        used = (self.has_feedback, self.compressive_memory != "none")
        return tuple(name for name, is_used in zip(ADDED_MODULES, used, strict=True) if is_used)

    def prompt_rows(self, layers: int) -> int:
        """Rows of the trained start of FAM: N for a prompt, N for each layer for a prefix."""
        return self.fam_length * (layers if self.fam_start == "prefix" else 1)

    def receptive_field(self, layers: int) -> int | None:
        """Tokens that a token may depend on without feedback, itself among them; None: unlimited.

        Each layer reaches as far back as it sees: depth times window (section 2).
        """
        if self.keeps_everything:
            return None
        if self.window_length is not None:
            return layers * (self.window_length - 1) + 1
        return (layers * self.memory_segments + 1) * self.block_size

    def blocks_within_reach(self, layers: int) -> int | None:
        """Past blocks that a token may depend on, anchors aside; None: all, or nobody promises it.

        A layer sees P / B past blocks, so L layers above each other see L·P / B.
        """
        if self.keeps_everything or self.memory_name or self.attention == "longformer":
            return None
        assert self.past_length is not None
        return layers * self.past_length // self.block_size

    @property
    def plain_length(self) -> int | None:
        """Tokens at the start of a stream that are read as the original model reads them.

        None: all of them, however many. 0: not even the first, or nobody promises it.
        """
        simple = self.attention in ("full", "bswa") and self.memory_source == "input"
        if not simple or self.through_stack or self.compressive_memory != "none":
            return 0
        if self.has_feedback:
            return 0 if self.fam_start == "prefix" else self.block_size
        return None if self.keeps_everything else (1 + self.memory_segments) * self.block_size

    def describe(self) -> str:
        """A geometry in a few words."""
        B, M = self.block_size, self.memory_segments
        parts = [self.attention.upper() if self.attention != "full" else "full attention"]
        if self.attention == "full":
            parts.append(f"blocks of {B:,}")
        elif self.window_length is None:
            parts.append(f"blocks of {B:,} and the {M} before" if M else f"blocks of {B:,} alone")
        else:
            parts.append(f"window of {self.window_length:,}")
        if self.random_blocks:
            parts.append(f"the first block and {self.random_blocks} drawn ones")
        if self.summary_tokens:
            parts.append(f"the last {self.summary_tokens} tokens of each block")
        if self.sink_tokens:
            parts.append(f"{self.sink_tokens} sinks")
        if self.through_stack:
            parts.append(f"{self.fam_length} memory tokens ({self.memory_name})")
        else:
            slots = f"{self.fam_length} feedback slots"
            slots += ", seen when asked" if self.fam_seen == "asked" else ""
            parts.append(slots if self.has_feedback else "no feedback")
        if self.memory_source == "output":
            parts.append("past blocks as layers' outputs")
        if self.compressive_memory != "none":
            parts.append(f"a compressive memory ({self.compressive_memory} rule)")
        return ", ".join(parts)

    # ---- making and comparing

    @classmethod
    def paper(cls, **changes: Any) -> FamConfig:
        """The paper's exact setting (tables 4 and section 3.1), with `changes`."""
        return cls(**{"first_residual": "zero", "sink_tokens": 0, **changes})

    def replace(self, **changes: Any) -> FamConfig:
        """A copy with some fields changed, checked anew."""
        return replace(self, **changes)

    def changed(self, **changes: Any) -> FamConfig:
        """As `replace`, but what would contradict the changes goes back to nothing.

        Another pattern loses what only some patterns have; no feedback, what needs feedback.
        """
        dropped: dict[str, Any] = {}
        if changes.get("attention", self.attention) != self.attention:
            dropped.update(_OF_SOME_PATTERNS, memory_source="input", compressive_memory="none")
        slots = changes.get("fam_length", self.fam_length)
        if slots == 0:
            dropped.update(OF_FEEDBACK)
        elif slots != self.fam_length and isinstance(self.feedback_norm, tuple):
            dropped.update(feedback_norm="none")
        if {**dropped, **changes}.get("feedback_norm", self.feedback_norm) != "rms":
            dropped.update(feedback_rms=1.0)
        return replace(self, **{**dropped, **changes})

    def without_feedback(self) -> FamConfig:
        """The same windows with no memory besides: TransformerBSWA."""
        return self.changed(fam_length=0, memory_source="input", compressive_memory="none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FamConfig:
        """The inverse of `to_dict`. A key that is not understood is refused, not ignored."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"This configuration has {', '.join(unknown)}, which this version of "
                "transformerfam does not know; use a newer version."
            )
        return cls(**values)

    def differences(self, other: FamConfig) -> list[str]:
        """Names of the fields in which two differ."""
        names = [f.name for f in fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def memory_differences(self, other: FamConfig) -> list[str]:
        """Names of the fields in which a memory made under `other` would not fit this one."""
        return [name for name in self.differences(other) if name not in _NOT_PART_OF_A_MEMORY]
