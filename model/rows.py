"""Rows of tokens in one pass: a prefix that neighbouring rows share is computed once.

The linear layers see N tokens side by side: of every row those that its neighbour above does not share, and no padding.
Attention sees whole rows, padded on the right to [S, L] or end to end, as its implementation wants them: queries, keys
and values are gathered from the N tokens, outputs are taken back. In causal attention a token depends on what stands
before it alone, so results and gradients are those of rows computed one by one. G samples of a prompt of P tokens cost
P + Σ len(sample) tokens, not G·P + Σ.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.rope_rows import rope_gather, rope_spread
from .attention import attend, available
from .packed import upload
from .recompute import Keep, keep_all

Stream = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]  # prompts and completions


@dataclass(frozen=True)
class Block:
    """Where the tokens of S rows are. They have M places, row by row: S·L with padding, Σ lengths without.

    Args:
        shape: (S, L), L the longest.
        lengths: of the rows.
        offsets: [S + 1] int32, where each row begins without padding.
        tokens: which of the pass's N tokens these n are.
        token_at: [M] of the n, the one at each place; of padding any.
        starts: [n + 1] where the places of each token begin in `places`.
        places: the places of each token, the first one first.
        first: [n] the first place of each token.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    offsets: Tensor
    tokens: slice
    token_at: Tensor
    starts: Tensor
    places: Tensor
    first: Tensor


@dataclass(frozen=True)
class Layout:
    """The blocks of a pass, the positions [N] of its tokens in their rows, and what computes their attention."""

    blocks: tuple[Block, ...]
    positions: Tensor
    attention: str


def rows_of(streams: Sequence[Stream]) -> list[list[list[int]]]:
    """The rows of each stream: a completion's last token predicts nothing, and is left out."""
    return [[[*p, *c[:-1]] for p, c in zip(*stream, strict=True)] for stream in streams]


def token_counts(streams: Sequence[Stream]) -> tuple[list[int], list[int]]:
    """How many tokens each sample adds to a pass over all streams: as its first sample, and after the sample above."""
    samples = list(zip(*rows_of(streams), strict=True))
    alone = [sum(map(len, rows)) for rows in samples]
    shared = [0, *(sum(map(_shared, *pair)) for pair in pairwise(samples))]
    return alone, [tokens - part for tokens, part in zip(alone, shared, strict=True)]


def _shared(row: Sequence[int], above: Sequence[int]) -> int:
    """Tokens that both rows begin with."""
    pairs = zip(row, above, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(row), len(above)))


def lay_out(
    blocks: Sequence[Sequence[Sequence[int]]], device: torch.device, attention: str = "sdpa"
) -> tuple[list[int], list[list[list[int]]], Layout]:
    """Blocks of rows -> ids of the N tokens, which of them each row is made of, and the layout.

    For `sdpa` each block is padded by itself; for others all rows are one block.
    """
    ids: list[int] = []
    positions: list[int] = []
    tables: list[list[list[int]]] = []
    ends: list[int] = []
    for rows in blocks:
        table = []
        above: Sequence[int] = ()
        tokens: list[int] = []
        for row in rows:
            shared = _shared(row, above)
            tokens = [*tokens[:shared], *range(len(ids), len(ids) + len(row) - shared)]
            ids += row[shared:]
            positions += range(shared, len(row))
            table.append(tokens)
            above = row
        tables.append(table)
        ends.append(len(ids))
    padded = attention == "sdpa"
    parts: list[Tensor] = []
    shapes = []
    begin = 0
    for table, end in zip(tables, ends, strict=True) if padded else [(list(chain(*tables)), len(ids))]:
        lengths = tuple(map(len, table))
        longest = max(lengths)
        pad = longest if padded else 0
        token_at = [token for tokens in table for token in (*tokens, *[-1] * (pad - len(tokens)))]
        at = torch.tensor(token_at, dtype=torch.int64)
        at = torch.where(at < 0, at, at - begin)
        starts, places = _places(at, end - begin)
        parts += [at.clamp(min=0), starts, places, places[starts[:-1]], torch.tensor([0, *lengths]).cumsum(0)]
        shapes.append(((len(table), longest), lengths, slice(begin, end)))
        begin = end
    parts.append(torch.tensor(positions, dtype=torch.int64))
    *tensors, at_positions = upload(torch.cat(parts), device).split([len(part) for part in parts])
    found = []
    for (shape, lengths, own), i in zip(shapes, range(0, len(tensors), 5), strict=True):
        *rest, offsets = tensors[i : i + 5]
        found.append(Block(shape, lengths, offsets.int(), own, *rest))
    return ids, tables, Layout(tuple(found), at_positions, attention)


def _places(at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """at [M], which of `count` rows is at each place (-1: none) -> starts [count + 1] and places, as of a block."""
    counts = torch.bincount(at[at >= 0], minlength=count)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts, at.argsort(stable=True)[len(at) - int(starts[-1]) :]


def take(x: Tensor, at: Sequence[int]) -> Tensor:
    """x [N, D] -> [M, D], its rows at these places. Gradients of a row add up in float32 in the order of its places.

    The backward pass of `index_select` adds them up in the dtype of x, on a GPU in any order.
    """
    index = torch.tensor(at, dtype=torch.int64)
    parts = [index, *_places(index, len(x))]
    return _Take.apply(x, *upload(torch.cat(parts), x.device).split([len(part) for part in parts]))


class _Take(torch.autograd.Function):
    """`take`, with the places of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, starts: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(starts, places)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        starts, places = ctx.saved_tensors
        N, D = len(starts) - 1, grad.shape[1]
        width = math.gcd(D, 64)
        heads = grad.contiguous().view(len(grad), D // width, width)  # queries, not rotated; no keys or values
        none, cos, sin = heads[:, :0], grad.new_ones(N, width // 2), grad.new_zeros(N, width // 2)
        return rope_gather(heads, none, none, cos, sin, starts, places, grad.new_empty(N, D)), None, None, None


class _Spread(torch.autograd.Function):
    """qkv [N, (Hq + 2·Hkv)·E] of the tokens -> of each block rotated queries, keys, and values [M, heads, E]."""

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
    """Of each block [M, D] at its places -> [N, D] of the tokens, each from its first place."""

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
        Of each block [M, Hq·E], for `collect`.
    """
    spread = _Spread.apply(qkv, cos, sin, kv_heads, layout)
    outputs = []
    for i, block in enumerate(layout.blocks):
        q, k, v = own = spread[3 * i : 3 * i + 3]
        with keep(own, partial(_spread, qkv.detach(), cos, sin, kv_heads, block)):
            outputs.append(attend(layout.attention, q, k, v, block, scale).flatten(1))
    return outputs


def collect(layout: Layout, *rows: Tensor) -> Tensor:
    """What `rows_attention` leaves at the places of each block -> [N, Hq·E] of the tokens."""
    return _Collect.apply(layout, *rows)


def fastest(
    blocks: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> str:
    """What computes the attention of these rows fastest, forward and backward, of what can run there.

    `shape`: heads, key/value heads and the elements of one.
    """
    names = available(device, dtype)
    if len(names) == 1:
        return names[0]
    seconds = {name: _seconds(name, blocks, shape, device, dtype) for name in names}
    best = min(names, key=seconds.__getitem__)
    each = ", ".join(f"{name} {1e3 * seconds[name]:.2f}" for name in names)
    print(f"attn_implementation auto: {best}; a layer's attention in ms: {each}", file=sys.stderr)
    return best


def _seconds(
    name: str,
    blocks: Sequence[Sequence[Sequence[int]]],
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Of attention, and of the way into its rows and back."""
    ids, _, layout = lay_out(blocks, device, name)
    heads, kv_heads, width = shape
    qkv = torch.ones(len(ids), (heads + 2 * kv_heads) * width, device=device, dtype=dtype, requires_grad=True)
    cos = torch.ones(len(ids), width // 2, device=device, dtype=dtype)
    times = []
    with torch.enable_grad():
        for _ in range(6):  # kernels are compiled in the first
            start = time.perf_counter()
            out = collect(layout, *rows_attention(qkv, cos, cos, kv_heads, None, layout))
            torch.autograd.grad(out, qkv, out.detach())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times)
