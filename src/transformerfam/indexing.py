"""Picking and placing along rows, slots and blocks, always out of place.

`rows` are indices into the batch, None for all of them: the common case then costs nothing.
"""

from __future__ import annotations

from torch import Tensor

from transformerfam.rotary import Tables


def members(rows: Tensor | None, count: int) -> list[int]:
    """`rows` as numbers."""
    return list(range(count)) if rows is None else rows.tolist()


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of x."""
    return x if rows is None else x.index_select(0, rows.to(x.device))


def put(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """`x` of some rows among zeros for the others."""
    if rows is None:
        return x
    return x.new_zeros(count, *x.shape[1:]).index_copy(0, rows.to(x.device), x)


def merge(old: Tensor, rows: Tensor | None, new: Tensor) -> Tensor:
    """`old` with `new` in the place of some rows."""
    return new if rows is None else old.index_copy(0, rows.to(old.device), new)


def take_tables(tables: Tables | None, rows: Tensor | None) -> Tables | None:
    """The tables of some rows; tables of one row serve all."""
    if tables is None or rows is None or tables.cos.shape[0] == 1:
        return tables
    return Tables(take(tables.cos, rows), take(tables.sin, rows), tables.interleaved)


def unsqueeze(tables: Tables | None, dim: int) -> Tables | None:
    """Tables with one more dimension to broadcast over."""
    if tables is None:
        return None
    return Tables(tables.cos.unsqueeze(dim), tables.sin.unsqueeze(dim), tables.interleaved)


def columns_of(x: Tensor, columns: Tensor) -> Tensor:
    """x (R, H, T, D) at `columns` (R or 1, C) of its third dimension."""
    if columns.shape[0] == 1:
        return x.index_select(2, columns[0])
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def place(x: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """x (R, H, C, D) with new (R, H, T, D) at `slots` (R, T) of its third dimension."""
    index = slots.expand(len(new), -1)[:, None, :, None].expand_as(new)
    return x.scatter(2, index, new)


def sliding(x: Tensor, size: int, step: int, count: int) -> Tensor:
    """(R, count, H, size, D): windows of x (R, H, C, D), `step` apart, as views."""
    if not size:
        return x.new_zeros(x.shape[0], count, x.shape[1], 0, x.shape[3])
    windows = x[:, :, : (count - 1) * step + size].unfold(2, size, step)  # (R, H, count, D, size)
    return windows.permute(0, 2, 1, 4, 3)
