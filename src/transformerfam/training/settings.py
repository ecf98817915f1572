"""Everything that a training run can be told, one dataclass for each part of it.

Each field carries its meaning, from which docs/recipes.md is made. Knows no torch and no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _setting(default: Any, meaning: str) -> Any:
    """A field of a settings dataclass with its meaning for people."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class ModelSettings:
    """Which model learns."""

    base: str = _setting(
        "smollm2", "a folder, a name on the hub, a .gguf file, or `smollm2`, the embedded model"
    )
    adapter: str = _setting(
        "",
        "folder of an adapter of this model to go on from, `shipped` for that of the default model; "
        "empty: none",
    )
    prompt: Literal["start", "vocabulary"] = _setting(
        "start",
        "what the FAM prompt of a model that has none starts from: the token that texts start with, "
        "or tokens of the vocabulary drawn by the seed",
    )
    dtype: Literal["float32", "bfloat16"] = _setting(
        "float32", "type of the weights that are not trained; trained weights are float32"
    )


@dataclass(frozen=True)
class TrainSettings:
    """What is trained (section 3.1: LoRA on attention and feed-forward, and the FAM prompt)."""

    what: Literal["lora", "full", "prompt"] = _setting(
        "lora",
        "`lora`: low-rank changes of matrices, and the prompt; `full`: every weight; `prompt`: the "
        "FAM prompt alone",
    )
    rank: int = _setting(64, "rank of LoRA; the paper's is 64")
    alpha: float = _setting(64.0, "LoRA's change is multiplied by alpha / rank")
    dropout: float = _setting(0.0, "dropout before LoRA's matrices")
    targets: tuple[str, ...] = _setting(
        ("all-linear",), "names of the matrices that LoRA changes; `all-linear`: all in the layers"
    )


@dataclass(frozen=True)
class SourceSettings:
    """One place that texts come from. A recipe may have several."""

    kind: Literal["files", "passkey", "facts"] = _setting(
        "files",
        "`files`: rows of files or of a data set; made up as needed: `passkey`, a number hidden in "
        "prose, and `facts`, sentences on people, places and things, to which all settings of passkey "
        "but digits apply",
    )
    share: float = _setting(1.0, "how often this source is drawn from, against the others' shares")
    path: str = _setting(
        "",
        "files: a .jsonl, .parquet or text file, a folder, a pattern with *, or a name on the hub. "
        "Rows are {prompt, completion}, {messages} or {text}; a text file is one row",
    )
    split: str = _setting("train", "files: the split of a data set of the hub")
    shuffle: bool = _setting(True, "files: another order in each epoch, or always the given one")
    bad_rows: Literal["skip", "refuse"] = _setting(
        "skip", "files: what to do about rows that cannot be used; they are counted and named"
    )
    lengths: tuple[int, ...] = _setting(
        (2048, 18432),
        "passkey, facts: shortest and longest text, in tokens; three and more: texts have one of these",
    )
    lengths_in_steps_of: int = _setting(
        1,
        "passkey, facts: lengths are multiples of this; block_size keeps the blocks of a batch alike",
    )
    lengths_alike: bool = _setting(
        True,
        "passkey, facts: all rows of a step are as long as each other, also those of other sources with "
        "the same lengths; or each as long as it comes, so that a memory cannot go by places",
    )
    where: str | float = _setting(
        "start", "passkey, facts: where the key stands: `start`, `anywhere`, or a depth from 0 to 1"
    )
    keys: int = _setting(1, "passkey, facts: how many keys the text holds")
    asked: int = _setting(1, "passkey, facts: how many of them are asked for, one after the other")
    chat: bool = _setting(
        False,
        "passkey, facts: ask in the model's chat template and expect sentences, as `fam read --ask`",
    )
    digits: int = _setting(5, "passkey: digits of a key")
    filler: str = _setting(
        "",
        "passkey, facts: file or folder of prose to fill up with; empty: five short sentences again",
    )
    filler_share: float = _setting(
        0.0,
        "passkey, facts: weight of all tokens that are not of an answer, together, as a share of the "
        "weight of the answers; about 0.3 keeps a model from forgetting how to read",
    )
    asked_prose: int = _setting(
        0,
        'passkey, facts: with `fam_seen = "asked"` this many tokens before the question see FAM too, '
        "and they and the question are all that filler_share is about",
    )

    def described(self, longest: int) -> str:
        """What is made up, in words, if texts come to `longest` tokens at most."""
        kind = {"passkey": "PassKey texts", "facts": "texts with facts"}[self.kind]
        return f"{kind} of {self.lengths[0]:,} to {min(longest, self.lengths[-1]):,} tokens"


@dataclass(frozen=True)
class DataSettings:
    """What is read in a step."""

    layout: Literal["packed", "single", "documents"] = _setting(
        "packed",
        "`packed`: examples one after the other, cut to `length` (section 3.1); `single`: an example "
        "a row; `documents`: rows walk through documents in order, memory carried from step to step",
    )
    length: int = _setting(
        8448,
        "tokens of a row in a step: `packed` exactly, `documents` at most; in `single` longer "
        "examples are left out",
    )
    batch_size: int = _setting(128, "rows of a step, over all processes")
    micro_batch_size: int = _setting(
        0, "rows that one process computes at a time; 0: all of its rows"
    )
    filler: str = _setting("", "the filler of sources of made-up texts that name none")
    begin_length: int = _setting(
        0,
        "texts made as needed are as short as this at first, and half as long again whenever their "
        "answers are said right; 0: as long as their source says",
    )
    grow_at: float = _setting(
        0.9,
        "begin_length: the share of texts, of the newest 64, that must have all their answers right",
    )
    repeat_length: int = _setting(
        0, "packed: tokens of the repeat task (B.2), the paper's are 256; 0: none"
    )
    repeat_weight: float = _setting(0.1, "packed: weight of the repeated tokens")
    sources: tuple[SourceSettings, ...] = _setting((), "where the texts come from")


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights follow gradients."""

    name: Literal["adamw", "adafactor"] = _setting("adamw", "the paper's is adafactor")
    learning_rate: float = _setting(1e-3, "highest rate")
    beta1: float = _setting(0.9, "memory of the mean of gradients")
    beta2: float = _setting(0.99, "memory of the mean of their squares")
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    warmup_steps: int = _setting(20, "steps in which the rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = _setting(
        "constant",
        "the rate after warm-up: as the paper, or falling to 0 at the last step or, if that comes "
        "first, when run.minutes are over",
    )
    max_grad_norm: float = _setting(1.0, "longer gradients are cut to this norm; 0: never")


@dataclass(frozen=True)
class FeedbackSettings:
    """What is special about training a feedback memory (B.2)."""

    bptt_blocks: int = _setting(
        0,
        "gradients reach back this many blocks at most (truncated backpropagation); 0: through all "
        "blocks of a row in a step",
    )
    asked_blocks: int = _setting(
        0,
        'with `fam_seen = "asked"`: ask the question of a text that is made up behind this many of its '
        "blocks too, with FAM alone in view; they are drawn from those by which everything has been "
        "told. With `replay.blocks` and `bptt_blocks`: behind this many segments, the first among them",
    )
    state_passing: float = _setting(
        0.0, "probability that a step starts from the FAM of the step before (random state passing)"
    )
    state_passing_delay: int = _setting(0, "steps before state passing begins")
    drawn_segments: tuple[int, ...] = _setting(
        (),
        "numbers of past blocks; a step draws one, in place of fam.memory_segments, and texts grow by "
        "the answers of steps with the fewest; none: always those of [fam]",
    )
    position_offset: float = _setting(
        0.0, "probability that positions are moved by a random offset in a step"
    )
    position_offset_limit: float = _setting(62831.853, "largest offset; the paper's is 2π·10000")
    bias_start: float = _setting(
        -32.0,
        "added to the scores of FAM keys in the first step; very negative: the model begins as the "
        "same windows without feedback",
    )
    bias_steps: int = _setting(
        50,
        "steps in which that rises to the `fam_bias` of [fam], 0 mostly; 0: it is there at once",
    )
    bias_power: float = _setting(
        3.0,
        "how it rises: what is left of the way is (1 - step / bias_steps) to this power; 1: in a "
        "straight line",
    )
    diversity_weight: float = _setting(
        0.0,
        "weight of a loss that pushes the FAM rows of a layer apart (C.4): their mean squared cosine; "
        "0: none",
    )
    reconstruction_weight: float = _setting(
        0.0,
        "weight of a loss that wants a block's queries to read from its FAM what they read from the "
        "block (C.5): the mean squared difference; 0: none",
    )


@dataclass(frozen=True)
class ReplaySettings:
    """Long texts of blocks that were read once, for an adapter of FAM alone (training.md)."""

    blocks: int = _setting(
        0,
        "blocks of prose that are read before the first step, from the filler of the sources; 0: texts "
        "are read as they are",
    )
    before: tuple[int, ...] = _setting(
        (0,), "numbers of blocks of prose before the text's own block; one is drawn each time"
    )
    behind: tuple[int, ...] = _setting((4,), "the same behind it")
    times: int = _setting(1, "how often a step replays each text, each time with other prose")
    rows_at_once: int = _setting(
        0,
        "rows that read their own block, or are asked, at a time under the widest windows, and more "
        "under shorter ones; FAM is led in all together; 0: all",
    )
    max_growth: float = _setting(
        0.0,
        "on its way back over blocks a row's gradient of FAM is cut to this many times the largest that "
        "a question gives; 0: it is not",
    )


@dataclass(frozen=True)
class RunSettings:
    """How long, how, and where to."""

    output: str = _setting("", "folder for the adapter, checkpoints and the journal")
    steps: int = _setting(1000, "steps of the optimizer")
    minutes: float = _setting(
        0.0,
        "end, as after the last step, once training has taken this many minutes in all; 0: no limit",
    )
    seed: int = _setting(0, "of everything random: data, new weights, state passing")
    precision: Literal["fp32", "bf16"] = _setting("fp32", "of the computation (autocast)")
    activation_checkpointing: bool = _setting(
        True, "compute layers again for their gradients instead of keeping them in memory"
    )
    cuda_graphs: bool = _setting(
        False,
        "record a step on the GPU and play it back: several times as fast where blocks are small. Rows "
        "are filled up to the longest that there may be, and all layers' activations stay in memory",
    )
    checkpoint_every: int = _setting(100, "steps from one checkpoint to the next; 0: none")
    keep_checkpoints: int = _setting(2, "how many of the newest are kept")
    log_every: int = _setting(1, "steps from one line of metrics.jsonl to the next")
    tensorboard: bool = _setting(True, "write files for TensorBoard, if it is installed")
    explode_at: float = _setting(
        1e6, "stop when the norm of the gradient exceeds this, or is not a number"
    )


@dataclass(frozen=True)
class ProbeSettings:
    """What is measured during training, and once at the end."""

    every: int = _setting(0, "steps from one measurement to the next; 0: at the end only")
    heldout: str = _setting(
        "", "files that are not trained on, whose loss is measured; empty: none"
    )
    heldout_tokens: int = _setting(16384, "tokens of each of them, from its start")
    heldout_rows: int = _setting(8, "at most this many of them")
    passkey_lengths: tuple[int, ...] = _setting((), "PassKey is asked at these lengths, in tokens")
    passkey_samples: int = _setting(10, "keys at each length")
    passkey_where: str | float = _setting("start", "as `where` of a passkey source")
    passkey_keys: int = _setting(1, "as `keys` of a passkey source")
    passkey_digits: int = _setting(5, "as `digits` of a passkey source")
    passkey_filler: str = _setting("", "as `filler` of a passkey source")
