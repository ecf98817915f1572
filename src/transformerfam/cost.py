"""What reading costs, in floating-point operations, counted from the geometry alone.

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
    """

    layers: int
    layer_weights: int
    head_weights: int
    attention_width: int


def keys_per_query(config: FamConfig, positions: Counts) -> Counts:
    """Keys that the token at each position sees: window, sinks or globals, and FAMs."""
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
    fams = np.minimum(config.previous_fams, t // config.block_size)
    return keys + config.fam_length * fams


def _window_keys(config: FamConfig, t: Counts) -> Counts:
    """Keys of the sliding part of the pattern alone."""
    B, M, w = config.block_size, config.memory_segments, config.window_length
    if config.attention == "full":
        return t + 1
    bswa = t + 1 - np.maximum(0, t // B - M) * B
    if w is None:
        return bswa
    swa = np.minimum(t + 1, w)
    return np.minimum(bswa, swa) if config.attention == "xl" else swa


def flops(config: FamConfig, shape: ModelShape, length: int) -> int:
    """Floating-point operations to read the first `length` tokens of a stream; see above."""
    pairs = int(keys_per_query(config, np.arange(length)).sum())
    rows, more = _memory_rows(config, length)
    pairs += more
    entries = 2 if config.memory_source == "output" else 1
    layers = 2 * shape.layer_weights * (entries * length + rows)
    head = 2 * shape.head_weights * length
    return layers + head + 4 * shape.attention_width * shape.layers * pairs


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
