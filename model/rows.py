"""Rows of tokens in one pass: a prefix that neighbouring rows share is computed once.

The linear layers see N tokens side by side: of every row those that its neighbour above does not share, and no padding.
Attention sees whole rows [S, L], padded on the right: a row's queries, keys and values are gathered from the N, its
outputs are taken back. In causal attention a token depends on what stands before it alone, so results and gradients are
those of rows computed one by one. G samples of a prompt of P tokens cost P + Σ len(sample) tokens, not G·P + Σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rope_rows import rope_gather, rope_spread
from .packed import upload
from .recompute import Keep, keep_all


@dataclass(frozen=True)
class Block:
    """Where the tokens of S rows are. They have S·L places, row by row.

    Args:
        shape: (S, L).
        tokens: which of the pass's N tokens these n are.
        token_at: [S·L] of the n, the one at each place; of padding any.
        starts: [n + 1] where the places of each token begin in `places`.
        places: the places of each token, the first one first.
        first: [n] the first place of each token.
    """

    shape: tuple[int, int]
    tokens: slice
    token_at: Tensor
    starts: Tensor
    places: Tensor
    first: Tensor


@dataclass(frozen=True)
class Layout:
    """The blocks of a pass, and the positions [N] of its tokens in their rows."""

    blocks: tuple[Block, ...]
    positions: Tensor


def lay_out(
    blocks: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> tuple[list[int], list[list[list[int]]], Layout]:
    """Blocks of rows -> ids of the N tokens, which of them each row is made of, and the layout."""
    ids: list[int] = []
    positions: list[int] = []
    tables: list[list[list[int]]] = []
    parts: list[Tensor] = []
    shapes = []
    for rows in blocks:
        longest, table = max(map(len, rows)), []
        begin, token_at = len(ids), list[int]()
        above: Sequence[int] = ()
        tokens: list[int] = []
        for row in rows:
            pairs = zip(row, above, strict=False)
            shared = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(row), len(above)))
            tokens = [*tokens[:shared], *range(len(ids), len(ids) + len(row) - shared)]
            ids += row[shared:]
            positions += range(shared, len(row))
            token_at += tokens + [-1] * (longest - len(row))
            table.append(tokens)
            above = row
        tables.append(table)
        at = torch.tensor(token_at, dtype=torch.int64)
        at = torch.where(at < 0, at, at - begin)
        counts = torch.bincount(at[at >= 0], minlength=len(ids) - begin)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = at.argsort(stable=True)[len(at) - int(starts[-1]) :]
        parts += [at.clamp(min=0), starts, places, places[starts[:-1]]]
        shapes.append(((len(rows), longest), slice(begin, len(ids))))
    parts.append(torch.tensor(positions, dtype=torch.int64))
    *tensors, at_positions = upload(torch.cat(parts), device).split([len(part) for part in parts])
    each = zip(shapes, *(tensors[i::4] for i in range(4)), strict=True)
    return ids, tables, Layout(tuple(Block(*shape, *rest) for shape, *rest in each), at_positions)


class _Spread(torch.autograd.Function):
    """qkv [N, (Hq + 2·Hkv)·E] of the tokens -> of each block rotated queries, keys, and values [S·L, heads, E]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, layout: Layout) -> tuple[Tensor, ...]:
        ctx.layout, ctx.shape = layout, qkv.shape
        ctx.save_for_backward(cos, sin)
        return tuple(x for block in layout.blocks for x in _spread(qkv, cos, sin, kv_heads, block))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        d_qkv = grads[0].new_empty(ctx.shape)
        for i, block in enumerate(ctx.layout.blocks):
            queries, keys, values = (grad.contiguous() for grad in grads[3 * i : 3 * i + 3])
            own = block.tokens
            rope_gather(queries, keys, values, cos[own], sin[own], block.starts, block.places, d_qkv[own])
        return d_qkv, None, None, None, None


def _spread(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, block: Block) -> list[Tensor]:
    own = block.tokens
    return rope_spread(qkv[own], cos[own], sin[own], block.token_at, kv_heads)


class _Collect(torch.autograd.Function):
    """Of each block [S·L, D] at its places -> [N, D] of the tokens, each from its first place."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *places: Tensor) -> Tensor:
        ctx.layout = layout
        out = places[0].new_empty(len(layout.positions), places[0].shape[1])
        for block, x in zip(layout.blocks, places, strict=True):
            torch.index_select(x, 0, block.first, out=out[block.tokens])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for block in ctx.layout.blocks:
            places = grad.new_zeros(len(block.token_at), grad.shape[1])
            grads.append(places.index_copy_(0, block.first, grad[block.tokens]))
        return None, *grads


def rows_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    scale: float | None,
    layout: Layout,
    keep: Keep = keep_all,
) -> list[Tensor]:
    """Rotary embedding and causal attention of every row.

    Args:
        qkv: [N, (Hq + 2·Hkv)·E], the projections of the tokens.
        cos, sin: [N, E/2], at their positions.
        kv_heads: Hkv.
        scale: of the scores; None = E^-1/2.
        layout: of their rows.
        keep: what is done with queries, keys and values at all places until the backward pass.

    Returns:
        Of each block [S·L, Hq·E], for `collect`.
    """
    spread = _Spread.apply(qkv, cos, sin, kv_heads, layout)
    outputs = []
    for i, block in enumerate(layout.blocks):
        own = spread[3 * i : 3 * i + 3]
        q, k, v = (x.view(*block.shape, *x.shape[1:]).transpose(1, 2) for x in own)
        grouped = q.shape[1] != kv_heads
        with keep(own, partial(_spread, qkv.detach(), cos, sin, kv_heads, block)):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs


def collect(layout: Layout, *rows: Tensor) -> Tensor:
    """What `rows_attention` leaves at the places of each block -> [N, Hq·E] of the tokens."""
    return _Collect.apply(layout, *rows)
