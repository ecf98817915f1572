"""What reading costs, in operations and in bytes of state, counted from the geometry alone.

For a stream of L tokens, with B, M, N as in the paper and Lᶠ = ⌊L / B⌋ finished blocks:

    layers      2 · P_layers · (L + N · Lᶠ)       a factor 1 + N/B over no feedback
    head        2 · V · d · L                     FAM rows never reach it
    attention   4 · H · D · layers · (pairs of a query and a key that it sees)

P_layers counts the weights of all layers' projections and feed-forwards. A token's query sees the keys
of its window, the sinks behind it and N · k FAM keys once there are that many; each of the N queries of
a FAM update sees N + B keys. Pairs are counted as the masks have them: a kernel that computes whole
tiles does a little more. Norms, rotations and softmax are left out. Knows no torch.
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
    """

    layers: int
    layer_weights: int
    head_weights: int
    attention_width: int
    key_value_width: int
    hidden_size: int


# SmolLM2-135M: 30 layers, 9 heads of 64 that share 3 key-value heads, feed-forwards of 1536.
SMOLLM2 = ModelShape(
    layers=30,
    layer_weights=30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536),
    head_weights=49152 * 576,
    attention_width=576,
    key_value_width=192,
    hidden_size=576,
)

# Numbers in each tensor that a variant keeps in a layer, by its name in `FamConfig.extra_state`.
_EXTRA: dict[str, Callable[[FamConfig, ModelShape], int]] = {
    "fam_input": lambda config, shape: config.fam_length * shape.hidden_size,
}


def keys_per_query(config: FamConfig, positions: Counts) -> Counts:
    """Keys that the token at each position sees: window, sinks or globals, and FAMs."""
    t = positions.astype(np.int64)
    keys = _window_keys(config, t)
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
    B, anchors = config.block_size, len(config.anchor_positions)
    slots = config.slots
    if slots is None:
        slots = length // B * B + config.previous_fams * config.fam_length + B
    numbers = (2 * slots + anchors) * shape.key_value_width + config.fam_length * shape.hidden_size
    numbers += sum(_EXTRA[name](config, shape) for name in config.extra_state)
    return shape.layers * numbers * number_bytes


def flops(config: FamConfig, shape: ModelShape, length: int) -> int:
    """Floating-point operations to read the first `length` tokens of a stream; see above."""
    updates = length // config.block_size if config.has_feedback else 0
    pairs = int(keys_per_query(config, np.arange(length)).sum())
    pairs += updates * config.fam_length * (config.fam_length + config.block_size)
    layers = 2 * shape.layer_weights * (length + config.fam_length * updates)
    head = 2 * shape.head_weights * length
    return layers + head + 4 * shape.attention_width * shape.layers * pairs
