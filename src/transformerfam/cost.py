"""What reading costs, in operations and in bytes of state, counted from the geometry alone.

For a stream of L tokens, with B, M, N as in the paper and Lᶠ = ⌊L / B⌋ finished blocks:

    layers      2 · P_layers · (L + N · Lᶠ)       a factor 1 + N/B over no feedback
    head        2 · V · d · L                     FAM rows never reach it
    attention   4 · H · D · layers · (pairs of a query and a key that it sees)

P_layers counts the weights of all layers' projections and feed-forwards. A token's query sees the keys
of its window, the sinks behind it and N · k FAM keys once there are that many; each of the N queries of
a FAM update sees N + B keys. Pairs are counted as the masks have them: a kernel that computes whole
tiles does a little more. Norms, rotations and softmax are left out.

With `memory_source="output"` a token goes through the layers' weights twice, once more to know what
the next block sees; its keys and values of outputs, a third entry as far as the projections, are left
out. So is a compressive memory, which costs what D/2 (to read) to 3/2 · D keys more cost a query.

Where memory runs through the stack (`recurrence`), memory tokens are rows of the layers like any
others: those in front of every block and the N behind every finished one. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transformerfam.config import FamConfig

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its cost depends on.

    Attributes:
        layers: decoder layers.
        layer_weights: P_layers, weights of all layers that multiply a token.
        head_weights: V · d of the output layer.
        attention_width: H · D, query heads times their dimension.
        key_value_width: Hk · D, key-value heads times their dimension.
        hidden_size: d.
        head_size: D.
    """

    layers: int
    layer_weights: int
    head_weights: int
    attention_width: int
    key_value_width: int
    hidden_size: int
    head_size: int


# SmolLM2-135M: 30 layers, 9 heads of 64 that share 3 key-value heads, feed-forwards of 1536.
SMOLLM2 = ModelShape(
    layers=30,
    layer_weights=30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536),
    head_weights=49152 * 576,
    attention_width=576,
    key_value_width=192,
    hidden_size=576,
    head_size=64,
)

# Numbers in each tensor that a variant keeps in a layer, by its name in `FamConfig.extra_state`.
_EXTRA: dict[str, Callable[[FamConfig, ModelShape], int]] = {
    "fam_input": lambda config, shape: config.fam_length * shape.hidden_size,
    "output_keys": lambda config, shape: config.block_size * shape.key_value_width,
    "output_values": lambda config, shape: config.block_size * shape.key_value_width,
    "compressed": lambda config, shape: shape.key_value_width * (shape.head_size + 1),
    "pending": lambda config, shape: shape.key_value_width * (shape.head_size + 1),
}


def keys_per_query(config: FamConfig, positions: Counts) -> Counts:
    """Keys that the token at each position sees when it is read: window, sinks or globals, and FAMs.

    Where tokens see FAM only if they are asked, one that is read sees none.
    """
    t = positions.astype(np.int64)
    keys = _window_keys(config, t)
    if config.through_stack:
        return keys + _in_front(config, t // config.block_size)
    if config.attention == "longformer":
        globals_ = np.array(config.global_positions)
        before_window = (globals_[None] <= (t - keys)[:, None]).sum(1)
        keys = np.where(np.isin(t, globals_), t + 1, keys + before_window)
    # A sink is seen as a sink once the window has left it behind.
    keys = keys + np.minimum(config.sink_tokens, t + 1 - keys) * (config.sink_tokens > 0)
    if config.fam_seen == "asked":
        return keys
    fams = np.minimum(config.previous_fams, t // config.block_size)
    return keys + config.fam_length * fams


def _window_keys(config: FamConfig, t: Counts) -> Counts:
    """Keys of the sliding part of the pattern alone."""
    B, M, w = config.block_size, config.memory_segments, config.window_length
    if config.attention == "full":
        return t + 1
    behind = np.maximum(0, t // B - M)  # blocks that have left the window
    bswa = t + 1 - behind * B
    if config.attention == "bigbird":
        return bswa + B * np.minimum(behind, config.random_blocks + 1)
    if config.attention == "sparse":
        return bswa + config.summary_tokens * behind
    if w is None:
        return bswa
    swa = np.minimum(t + 1, w)
    return np.minimum(bswa, swa) if config.attention == "xl" else swa


def state_bytes(config: FamConfig, shape: ModelShape, length: int, number_bytes: int = 4) -> int:
    """Bytes that one stream carries after `length` tokens; what `Memory.nbytes` is then.

    In each layer keys and values of W = P + A + k·N + B slots, keys of A anchors as they came, F, and
    what a variant keeps beside these. Where all is kept, P are the finished blocks.
    """
    if config.through_stack:
        return _stack_state(config, shape, length) * number_bytes
    B, anchors = config.block_size, len(config.anchor_positions)
    slots = config.slots
    if slots is None:
        slots = length // B * B + config.previous_fams * config.fam_length + B
    numbers = (2 * slots + anchors) * shape.key_value_width + config.fam_length * shape.hidden_size
    numbers += sum(_EXTRA[name](config, shape) for name in config.extra_state)
    return shape.layers * numbers * number_bytes


def _stack_state(config: FamConfig, shape: ModelShape, length: int) -> int:
    """Numbers of state where memory runs through the stack: memory rows, keys of the open block."""
    block, read = divmod(length, config.block_size)
    written = config.fam_length * (min(block, 1) if config.recurrence == "rmt" else block)
    front = config.fam_length if config.recurrence == "rmt" else written
    keys = 2 * (front + read) * shape.key_value_width * (read > 0)
    return written * shape.hidden_size + shape.layers * keys


def flops(config: FamConfig, shape: ModelShape, length: int) -> int:
    """Floating-point operations to read the first `length` tokens of a stream; see above."""
    return sum(_matrices_and_attention(config, shape, length))


def tuning_flops(config: FamConfig, shape: ModelShape, length: int) -> int:
    """Floating-point operations to train LoRA on such a text, with activation checkpointing.

    Everything is computed forward twice. Backward a matrix that stays as it is costs as much as forward,
    attention, both sides of which are computed, twice as much.
    """
    matrices, attention = _matrices_and_attention(config, shape, length)
    return 3 * matrices + 4 * attention


def _matrices_and_attention(config: FamConfig, shape: ModelShape, length: int) -> tuple[int, int]:
    pairs = int(keys_per_query(config, np.arange(length)).sum())
    rows, more = _memory_rows(config, length)
    pairs += more
    entries = 2 if config.memory_source == "output" else 1
    layers = 2 * shape.layer_weights * (entries * length + rows)
    head = 2 * shape.head_weights * length
    return layers + head, 4 * shape.attention_width * shape.layers * pairs


def _in_front(config: FamConfig, block: Counts) -> Counts:
    """Memory tokens in front of each block, where memory runs through the stack."""
    N = config.fam_length
    return np.full_like(block, N) if config.recurrence == "rmt" else N * block


def _memory_rows(config: FamConfig, length: int) -> tuple[int, int]:
    """Rows of memory that go through each layer, and pairs of one and a key that it sees."""
    B, N = config.block_size, config.fam_length
    finished = length // B
    if not config.has_feedback:
        return 0, 0
    if not config.through_stack:
        return N * finished, finished * N * (N + B)
    S = _in_front(config, np.arange(-(-length // B), dtype=np.int64))
    each_other = config.recurrence == "rmt"
    in_front = S * S if each_other else S * (S + 1) // 2
    behind = N * (S[:finished] + B) + (N * N if each_other else N * (N + 1) // 2)
    return int(S.sum()) + N * finished, int(in_front.sum() + behind.sum())
