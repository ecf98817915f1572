"""A look inside the memory: what a stream writes into FAM, what is read from it, how FAM moves.

Reads a stream block by block and returns numbers as tensors. Knows models; nothing of text, pages or
figures. The attention that it tells of is the attention that was computed: see `call.Attended`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformerfam.call import Attended, Read, Written
from transformerfam.config import FamConfig
from transformerfam.conversion import twin
from transformerfam.errors import UserError
from transformerfam.memory import Memory
from transformerfam.plan import CallPlan
from transformerfam.stream import read

# What a token's attention goes to, in the order of the keys.
REGIONS = ("past", "anchors", "fams", "own")
# The keys that are named for each token.
STRONGEST = 6
# A map has at most this many cells for the tokens of one block, and all maps at most so many.
_BLOCK_CELLS = 128
_MAP_CELLS = 4 << 20


@dataclass(frozen=True)
class LayerInspection:
    """One layer over a stream of T tokens, of which the first n · B make whole blocks.

    N slots, H heads. Attention to a slot counts all of the k past states of it that tokens see.

    Attributes:
        layer: its index.
        shares: (T, 4) the share of each token's attention that goes to past segments, anchors, FAM
            and its own block, mean over heads. They sum to 1, but for what a learned sink takes.
        read_by_slot: (T, N) attention of each token to each slot, mean over heads.
        read_by_head: (T, H) attention of each token to all slots, by head.
        written_by_slot: (n · B, N) attention of each slot's query to each token of the block that
            it compresses, mean over heads. What is missing to 1 over a block goes to FAM itself.
        written_by_head: (n · B, H) the same, mean over slots.
        strongest: (T, `STRONGEST`) the keys that each token looks at most, mean over heads: the
            position of a token, or -1 - i for slot i of the k · N that the token sees.
        strongest_weights: (T, `STRONGEST`) how much.
        kept: (n, N) share of each slot's attention that stays on FAM instead of the block.
        rms: (n, N) root mean square of F_τ.
        change: (n, N) of F_τ - F_{τ-1}; NaN for the first block.
        cosine: (n, N) of F_τ with F_{τ-1}; NaN for the first block.
        maps: block -> (H, L + N, keys) attention in cells, see `MapGrid`.
    """

    layer: int
    shares: Tensor
    read_by_slot: Tensor
    read_by_head: Tensor
    written_by_slot: Tensor
    written_by_head: Tensor
    strongest: Tensor
    strongest_weights: Tensor
    kept: Tensor
    rms: Tensor
    change: Tensor
    cosine: Tensor
    maps: dict[int, Tensor]


@dataclass(frozen=True)
class MapGrid:
    """Which attention maps are kept, and how fine.

    A map has the block's queries and below them the N FAM queries; its keys are those of the block's
    queries: past, anchors, FAMs, own block. FAM queries have the newest FAM and the block.

    Attributes:
        blocks: the blocks with maps.
        cell: tokens of a cell's side; anchors and slots are never joined. Weights are summed over the
            keys of a cell and averaged over its queries, so rows sum to 1.
    """

    blocks: tuple[int, ...]
    cell: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_stream` found.

    Attributes:
        config: geometry.
        tokens: the T ids that were read.
        losses: (T,) -log p of each token in nats; NaN for the first.
        losses_without: (T,) the same with the feedback memory off; None if that was not asked for.
        grid: which maps there are.
        map_keys: block with a map -> region -> number of its cells among the keys.
        layers: what the chosen layers did, bottom first.
        model_layers: number of layers of the model.
    """

    config: FamConfig
    tokens: tuple[int, ...]
    losses: Tensor
    losses_without: Tensor | None
    grid: MapGrid
    map_keys: dict[int, dict[str, int]]
    layers: tuple[LayerInspection, ...]
    model_layers: int

    @property
    def blocks(self) -> int:
        """n, whole blocks: those that were written into memory."""
        return len(self.tokens) // self.config.block_size


def inspect_stream(
    model: Any,
    tokens: Iterable[int],
    *,
    layers: Sequence[int] | None = None,
    baseline: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Read a stream with a TransformerFAM and tell what its memory did.

    Everything is kept, so this is for texts of some thousand tokens. No gradients.

    Args:
        model: a TransformerFAM with a feedback memory.
        tokens: ids of one stream, of one block or more.
        layers: the layers to tell of; by default six, from the first to the last.
        baseline: whether to read the text without feedback as well, with the same weights.
        progress: told what is being done.

    Raises:
        UserError: without a feedback memory in each layer, for less than a block, or for a layer that
            is not there.
    """
    config: FamConfig = model.fam_config
    ids, B = tuple(tokens), config.block_size
    memory = Memory.for_model(model)
    chosen = _checked(config, ids, layers, len(memory))
    heads = model.config.get_text_config().num_attention_heads
    grid = map_grid(config, len(ids) // B, len(chosen) * heads)
    recorder = _Recorder({layer: _LayerRecord(layer) for layer in chosen}, grid)
    losses = []
    with memory.asked():  # or there would be nothing to see of what tokens look for in FAM
        for chunk in read(model, ids, memory, chunk_tokens=B, observer=recorder):
            losses.append(chunk.losses)
            progress(f"reading {chunk.position:,} of {len(ids):,} tokens ...")
    without = None
    if baseline:
        progress("reading without feedback ...")
        plain = twin(model, config.without_feedback())
        without = _by_token([chunk.losses for chunk in read(plain, ids)])
    found = tuple(record.result() for record in recorder.layers.values())
    return Inspection(
        config, ids, _by_token(losses), without, grid, recorder.map_keys, found, len(memory)
    )


def spread(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of the numbers below `count`, evenly spaced, the last among them."""
    if count <= most:
        return tuple(range(count))
    if most == 1:
        return (count - 1,)
    return tuple(round(i * (count - 1) / (most - 1)) for i in range(most))


def map_grid(config: FamConfig, blocks: int, maps: int) -> MapGrid:
    """As many blocks with `maps` maps each as fit, evenly spaced; coarser cells before no map."""
    B, P = config.block_size, config.past_length
    past = blocks * B if P is None else P
    few = len(config.anchor_positions) + config.previous_fams * config.fam_length
    cell = 1
    while True:
        side = -(-B // cell)
        cells = maps * (side + config.fam_length) * (-(-past // cell) + few + side)
        if (side <= _BLOCK_CELLS and cells <= _MAP_CELLS) or side == 1:
            return MapGrid(spread(blocks, max(1, _MAP_CELLS // cells)), cell)
        cell *= 2


# ---- parts


def _checked(
    config: FamConfig, ids: tuple[int, ...], layers: Sequence[int] | None, count: int
) -> tuple[int, ...]:
    """The layers to tell of, if there is something to tell."""
    if config.through_stack:
        raise UserError(
            f"Under recurrence={config.recurrence!r} memory runs through the whole stack, and no "
            "layer has one of its own to look into; take --recurrence layer."
        )
    if not config.has_feedback and config.memory_name:
        setting = (
            "--memory-source input"
            if config.memory_source == "output"
            else "--compressive-memory none"
        )
        raise UserError(
            f"The memory of this geometry ({config.memory_name}) has no slots to look into; take "
            f"{setting} and give it a feedback memory with --fam-length."
        )
    if not config.has_feedback:
        raise UserError(
            "This geometry has no feedback memory to look into; give it one with --fam-length, or "
            "load a model or adapter that has one."
        )
    if len(ids) < config.block_size:
        raise UserError(
            f"The text has {len(ids):,} tokens, less than one block of {config.block_size:,}, so "
            "nothing is written into memory; give a longer text or a smaller --block-size."
        )
    if layers is None:
        return spread(count, 6)
    if not layers or any(not 0 <= layer < count for layer in layers):
        raise UserError(f"The layers of this model are 0 to {count - 1}; choose among them.")
    return tuple(sorted(set(layers)))


def _by_token(losses: list[Tensor]) -> Tensor:
    """(T,) with NaN for the first token, which nothing predicts."""
    return torch.cat([torch.full((1,), torch.nan), *losses])


@dataclass
class _LayerRecord:
    """What a layer did so far, block by block."""

    layer: int
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    fam: Tensor | None = None  # (N, d), F of the last whole block

    def add(self, **values: Tensor) -> None:
        """More rows of some results."""
        for name, value in values.items():
            self.tokens.setdefault(name, []).append(value.float().cpu())

    def add_fam(self, fam: Tensor) -> None:
        """F (N, d) after one more block."""
        before, self.fam = self.fam, fam.double()
        nothing = torch.full(fam.shape[:1], torch.nan)
        change = nothing if before is None else _rms(self.fam - before)
        cosine = nothing if before is None else torch.cosine_similarity(self.fam, before, dim=-1)
        self.add(rms=_rms(self.fam)[None], change=change[None], cosine=cosine[None])

    def result(self) -> LayerInspection:
        """All of it."""
        joined = {name: torch.cat(values) for name, values in self.tokens.items()}
        joined["strongest"] = joined["strongest"].long()
        return LayerInspection(self.layer, **joined, maps=self.maps)


class _Recorder:
    """An `Observer` of a stream that is read one block a call.

    The FAM queries of a block ask before its tokens do.
    """

    def __init__(self, layers: dict[int, _LayerRecord], grid: MapGrid) -> None:
        self.layers = layers
        self.grid = grid
        self.map_keys: dict[int, dict[str, int]] = {}
        self._fam_weights: dict[int, Tensor] = {}

    def __call__(self, seen: Attended | Read | Written) -> None:
        record = self.layers.get(seen.layer)
        if record is None or isinstance(seen, Read):
            return
        if isinstance(seen, Written):
            record.add_fam(seen.fam[0])
            return
        assert seen.plan.rows == 1 and seen.plan.blocks == 1, "one row, one block a call"
        weights = seen.weights()[0].float()  # (H, L, K)
        if seen.block is None:
            self._tokens(record, seen.plan, weights)
        else:
            self._fam(record, seen.plan, weights)

    def _fam(self, record: _LayerRecord, plan: CallPlan, weights: Tensor) -> None:
        N = plan.config.fam_length
        self._fam_weights[record.layer] = weights
        block = weights[:, :, N:]  # (H, N, B)
        record.add(
            written_by_slot=block.mean(0).T,
            written_by_head=block.mean(1).T,
            kept=weights[:, :, :N].sum(-1).mean(0)[None],
        )

    def _tokens(self, record: _LayerRecord, plan: CallPlan, weights: Tensor) -> None:
        regions = plan.key_regions
        mean = weights.mean(0)  # (L, K)
        fams = weights[:, :, regions["fams"]].unflatten(2, (plan.config.previous_fams, -1)).sum(2)
        count = min(STRONGEST, mean.shape[1])
        most, index = mean.topk(count, dim=-1)  # (L, count)
        padding = (0, STRONGEST - count)
        record.add(
            shares=torch.stack([mean[:, regions[name]].sum(-1) for name in REGIONS], dim=1),
            read_by_slot=fams.mean(0),
            read_by_head=fams.sum(-1).T,
            strongest=torch.nn.functional.pad(key_names(plan).to(index.device)[index], padding),
            strongest_weights=torch.nn.functional.pad(most, padding),
        )
        τ = plan.first_blocks[0]
        if τ in self.grid.blocks:
            fam = self._fam_weights[record.layer]
            record.maps[τ] = _map(plan, weights, fam, self.grid.cell).cpu()
            cells = {
                name: -(-(r.stop - r.start) // (self.grid.cell if name in ("past", "own") else 1))
                for name, r in regions.items()
            }
            self.map_keys[τ] = cells


def key_names(plan: CallPlan) -> Tensor:
    """(K,) of the keys that the queries of a call of one block see: a token's position, or -1 - i.

    i counts the slots of all FAMs that are seen, the oldest first.
    """
    start = plan.first_blocks[0] * plan.config.block_size
    return torch.cat(
        [
            start - plan.past_used + torch.arange(plan.past_used),
            torch.tensor(plan.config.anchor_positions, dtype=torch.long),
            -1 - torch.arange(plan.config.previous_fams * plan.config.fam_length),
            start + torch.arange(plan.own_used),
        ]
    )


def _map(plan: CallPlan, tokens: Tensor, fam: Tensor, cell: int) -> Tensor:
    """(H, cells, cells): tokens (H, B, K) and, below, FAM queries (H, N, N + B), in cells."""
    regions, N = plan.key_regions, plan.config.fam_length
    below = tokens.new_zeros(tokens.shape[0], N, tokens.shape[2])
    below[:, :, regions["fams"].stop - N : regions["fams"].stop] = fam[:, :, :N]
    below[:, :, regions["own"]] = fam[:, :, N:]
    joined = []
    for name in REGIONS:
        keys = regions[name]
        wide = cell if name in ("past", "own") else 1
        rows = [_cells(tokens[:, :, keys], 1, cell).div(_sizes(tokens, cell)), below[:, :, keys]]
        joined.append(_cells(torch.cat(rows, dim=1), 2, wide))
    return torch.cat(joined, dim=2)


def _cells(x: Tensor, dim: int, cell: int) -> Tensor:
    """Sums over `cell` neighbours along a dimension; the last may have fewer."""
    if cell == 1 or not x.shape[dim]:
        return x
    count = -(-x.shape[dim] // cell)
    index = torch.arange(x.shape[dim], device=x.device) // cell
    shape = list(x.shape)
    shape[dim] = count
    return x.new_zeros(shape).index_add(dim, index, x)


def _sizes(tokens: Tensor, cell: int) -> Tensor:
    """(cells, 1) queries in each cell."""
    return _cells(tokens.new_ones(tokens.shape[1], 1), 0, cell)


def _rms(x: Tensor) -> Tensor:
    """Root mean square along the last dimension."""
    return x.pow(2).mean(-1).sqrt()
