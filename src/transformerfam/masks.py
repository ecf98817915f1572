"""Which query sees which key (sections 2 and 3 of docs/method.md), as predicates of a few lines.

A predicate takes the absolute positions of a query and of a key, whole numbers or tensors of them,
and says whether the query sees the key. The same predicates make the dense masks, the block masks
of FlexAttention and the figures. They know nothing of tensors' shapes, heads or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformerfam.config import FamConfig

Predicate = Callable[[Any, Any], Any]


def causal(query: Any, key: Any) -> Any:
    """Full attention: every token up to the query."""
    return key <= query


def sliding_window(window: int) -> Predicate:
    """SWA: the last `window` tokens, the query among them."""
    return lambda query, key: (key <= query) & (query - window < key)


def block_sliding_window(block_size: int, memory_segments: int) -> Predicate:
    """BSWA: the query's own block up to the query, and `memory_segments` whole blocks before it."""
    return lambda query, key: (
        (key <= query) & (key // block_size >= query // block_size - memory_segments)
    )


def big_bird(block_size: int, memory_segments: int, random_blocks: int) -> Predicate:
    """BigBird (arXiv 2007.14062, its blocks, causal): window, first block, r random earlier blocks.

    For a query of block τ and a key of block b, up to the query:

        b ≥ τ - M,  or  b = 0,  or  b among R(τ)

    R(τ) are r different blocks of 1 .. τ - M - 1 (all of them while they are no more than r), drawn
    once and for all: a function of τ alone, the same in every layer, head and call. The first block
    is the global one; that its tokens see all is nothing new for a causal model.
    """
    bswa = block_sliding_window(block_size, memory_segments)

    def sees(query: Any, key: Any) -> Any:
        block, of_key = query // block_size, key // block_size
        candidates = block - memory_segments - 1
        drawn = (candidates <= random_blocks) & (of_key <= candidates)
        for chosen in _drawn_blocks(block, candidates, random_blocks):
            drawn = drawn | ((of_key == chosen) & (candidates > random_blocks))
        return bswa(query, key) | ((key <= query) & ((of_key == 0) | drawn))

    return sees


def _drawn_blocks(block: Any, candidates: Any, count: int) -> list[Any]:
    """`count` different numbers of 1 .. candidates for each block, by Floyd's algorithm."""
    chosen: list[Any] = []
    for i in range(count):
        last = candidates - count + i + 1
        last = last + (1 - last) * (last < 1)  # fewer candidates than draws: of no account
        draw = 1 + _hash(block * count + i) % last
        taken = block < 0
        for before in chosen:
            taken = taken | (draw == before)
        chosen.append(draw + (last - draw) * taken)
    return chosen


def _hash(x: Any) -> Any:
    """Whole numbers scattered over 0 .. 2³¹ - 2, alike for Python, NumPy and torch."""
    prime = 2**31 - 1
    x = x % prime
    for key in (1_202_590_843, 715_225_739, 1_884_310_127):
        x = (x + key) % prime
        square = x * x % prime  # below 2⁶²: no type overflows
        x = square * square % prime * x % prime  # the fifth power is a permutation
    return x


def sparse_fixed(block_size: int, memory_segments: int, summary_tokens: int) -> Predicate:
    """Sparse Transformer (arXiv 1904.10509), its `fixed` pattern, both parts in every head.

    With stride l = B, for s up to t:

        ⌊s / B⌋ ≥ ⌊t / B⌋ - M,  or  s mod B ≥ B - c

    M = 0 is the paper's: the own block, and the last c places of every block before.
    """
    bswa = block_sliding_window(block_size, memory_segments)
    return lambda query, key: (
        bswa(query, key) | ((key <= query) & (key % block_size >= block_size - summary_tokens))
    )


def is_global(positions: Iterable[int], position: Any) -> Any:
    """Whether a position is one of Longformer's global ones."""
    found = position < 0
    for g in positions:
        found = found | (position == g)
    return found


def token_sees_token(config: FamConfig) -> Predicate:
    """The pattern of `config.attention` between tokens of the stream."""
    B, M, w = config.block_size, config.memory_segments, config.window_length
    if config.attention == "full":
        return causal
    if config.attention == "bswa":
        return block_sliding_window(B, M)
    if config.attention == "bigbird":
        return big_bird(B, M, config.random_blocks)
    if config.attention == "sparse":
        return sparse_fixed(B, M, config.summary_tokens)
    assert w is not None
    swa = sliding_window(w)
    if config.attention == "swa":
        return swa
    if config.attention == "xl":
        bswa = block_sliding_window(B, M)
        return lambda query, key: bswa(query, key) & swa(query, key)
    positions = config.global_positions
    return lambda query, key: (
        (key <= query) & (swa(query, key) | is_global(positions, query) | is_global(positions, key))
    )


def token_sees_anchor(config: FamConfig) -> Predicate:
    """Anchors, the tokens kept for ever, stand in for tokens that are not among the kept past.

    A sink is seen where the window has left its token behind. A global token, which the window
    never leaves behind, is seen here once its block is no longer kept.
    """
    if config.global_positions:
        B, P = config.block_size, config.past_length or 0
        return lambda query, anchor: anchor < query // B * B - P
    window = token_sees_token(config)
    return lambda query, anchor: (anchor <= query) & (window(query, anchor) ^ True)


def token_sees_fam(config: FamConfig) -> Predicate:
    """A token of block τ sees F_{τ-1} .. F_{τ-k}; `fam_block` is the block that the FAM compressed.

    There is no F_{-1}: in block 0 no token sees a FAM, which keeps every layer causal.
    """
    B, k = config.block_size, config.previous_fams
    return lambda query, fam_block: (
        (fam_block >= 0) & (fam_block < query // B) & (fam_block >= query // B - k)
    )


def fam_sees_token(config: FamConfig) -> Predicate:
    """The FAM queries of block τ see all of block τ and nothing else of the text."""
    B = config.block_size
    return lambda fam_block, key: key // B == fam_block


def segment(config: FamConfig, memory_tokens: int) -> Predicate:
    """Within one block between memory tokens, by places in [ memory | block | memory to write ].

    Causal; in RMT the memory tokens of either end also see those behind them of the same end.
    """
    if config.recurrence != "rmt":
        return causal
    S, end = memory_tokens, memory_tokens + config.block_size
    return lambda query, key: (
        (key <= query) | ((query < S) & (key < S)) | ((query >= end) & (key >= end))
    )
