"""Rows of tokens through the language model in one pass, in which what rows begin with in common is computed once.

The linear layers see N tokens side by side: of every row those that its neighbour above does not share, and no padding.
Attention sees whole rows [S, L], padded on the right: a row's queries, keys and values are gathered from the N, its
outputs are taken back. In causal attention a token depends on what stands before it alone, so results and gradients are
those of rows computed one by one. G samples of a prompt of P tokens cost P + Σ len(sample) tokens, not G·P + Σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packed import upload

ATTENTION = "bicot_rows"  # what transformers calls it


@dataclass(frozen=True)
class Layout:
    """Where the tokens of rows are. There are M = Σ S·L places in the padded rows of all blocks.

    Args:
        shapes: (S, L) of each block.
        positions: [N] of the distinct tokens, in their rows.
        token_at: [M] the token at each place; of padding any.
        place_of: [N] the first place of each token.
        copies, copied: places at which a token stands again, and that token.
    """

    shapes: tuple[tuple[int, int], ...]
    positions: Tensor
    token_at: Tensor
    place_of: Tensor
    copies: Tensor
    copied: Tensor


def lay_out(
    blocks: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> tuple[list[int], list[list[list[int]]], Layout]:
    """Blocks of rows -> ids of the N tokens, which of them each row is made of, and the layout."""
    ids: list[int] = []
    tables: list[list[list[int]]] = []
    at: dict[str, list[int]] = {name: [] for name in ("positions", "token_at", "place_of", "copies", "copied")}
    for rows in blocks:
        longest, table = max(map(len, rows)), []
        above: Sequence[int] = ()
        tokens: list[int] = []
        for row in rows:
            pairs = zip(row, above, strict=False)
            shared = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(row), len(above)))
            place = len(at["token_at"])
            tokens = [*tokens[:shared], *range(len(ids), len(ids) + len(row) - shared)]
            ids += row[shared:]
            at["positions"] += range(shared, len(row))
            at["place_of"] += range(place + shared, place + len(row))
            at["copies"] += range(place, place + shared)
            at["copied"] += tokens[:shared]
            at["token_at"] += tokens + [0] * (longest - len(row))
            table.append(tokens)
            above = row
        tables.append(table)
    shapes = tuple((len(rows), max(map(len, rows))) for rows in blocks)
    return ids, tables, Layout(shapes, **{name: upload(values, device) for name, values in at.items()})


class _Spread(torch.autograd.Function):
    """[N, D] tokens -> [M, D] places."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.token_at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        tokens = grad.index_select(0, layout.place_of)
        return tokens.index_add_(0, layout.copied, grad.index_select(0, layout.copies)), None


class _Collect(torch.autograd.Function):
    """[M, D] places -> [N, D] tokens."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return places.index_select(0, layout.place_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = grad.new_zeros(len(ctx.layout.token_at), grad.shape[1])
        return places.index_copy_(0, ctx.layout.place_of, grad), None


def rows_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, heads, N, head_dim] in, [1, N, heads, head_dim] out. Without rows it is SDPA."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sizes = [S * L for S, L in rows.shapes]

    def blocks(x: Tensor) -> list[Tensor]:
        heads, N, width = x.shape[1:]
        spread = _Spread.apply(x[0].transpose(0, 1).reshape(N, heads * width), rows).split(sizes)
        return [p.view(*shape, heads, width).transpose(1, 2) for p, shape in zip(spread, rows.shapes, strict=True)]

    every = zip(blocks(query), blocks(key), blocks(value), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in every]
    joined = torch.cat([out.flatten(0, 1).flatten(1) for out in outputs])
    return _Collect.apply(joined, rows).view(1, -1, *outputs[0].shape[2:]), None


AttentionInterface.register(ATTENTION, rows_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
