"""Lays out sequences for one forward pass, which computes a prefix shared with the previous sequence only once.

The linear layers get N packed tokens without padding: from each sequence, the tokens that it does not share with the
previous one. Attention gets whole sequences, either padded on the right to [S, L] or end to end, as its implementation
needs them. So queries, keys and values are copied from the N tokens to the places of whole sequences, and outputs are
copied back. In causal attention a token depends on earlier tokens only, so results and gradients are the same as for
sequences that are computed one by one. G samples of a prompt of P tokens cost P + Σ len(sample) tokens instead of
G·P + Σ len(sample).
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

from ..kernels.host import upload
from ..kernels.packed_rope import rope_gather, rope_spread
from .attention import IMPLEMENTATIONS, Places, available
from .packed import int64
from .recompute import Keep, keep_all

Stream = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]  # prompts and completions


@dataclass(frozen=True)
class Block(Places):
    """Sequences as attention sees them. A token that several sequences share has a place in each of them.

    Args:
        tokens: which of the N tokens of the pass are the block's n tokens.
        token_at: [M] which of the n tokens is at each place; at padding it is any of them.
        starts: [n + 1] where the places of each token begin in `places`.
        places: the places of the first token in ascending order, then those of the second token, and so on.
        first: [n] the first place of each token.
    """

    tokens: slice
    token_at: Tensor
    starts: Tensor
    places: Tensor
    first: Tensor


@dataclass(frozen=True)
class Layout:
    """The blocks of a pass, the positions [N] of its tokens in their sequences, and the implementation of attention."""

    blocks: tuple[Block, ...]
    positions: Tensor
    attention: str


def sequences_of(streams: Sequence[Stream]) -> list[list[list[int]]]:
    """The sequences of each stream, without the last token of each completion, after which nothing is predicted."""
    return [[[*p, *c[:-1]] for p, c in zip(*stream, strict=True)] for stream in streams]


def token_counts(streams: Sequence[Stream]) -> tuple[list[int], list[int]]:
    """How many tokens each sample adds to a pass over all streams, as its first sample, and after the previous one."""
    samples = list(zip(*sequences_of(streams), strict=True))
    alone = [sum(map(len, sequences)) for sequences in samples]
    shared = [0, *(sum(map(_shared, *pair)) for pair in pairwise(samples))]
    return alone, [tokens - common for tokens, common in zip(alone, shared, strict=True)]


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """The length of the prefix that two sequences have in common."""
    pairs = zip(one, two, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(one), len(two)))


def lay_out(
    blocks: Sequence[Sequence[Sequence[int]]], device: torch.device, attention: str = "sdpa"
) -> tuple[list[int], list[list[list[int]]], Layout]:
    """Lay out blocks of sequences for one pass.

    Returns:
        The ids of the N tokens; for each sequence of each block, the indices of its tokens among the N; the layout. For
        `sdpa` each block is padded to its own longest sequence; for the others all sequences are one block.
    """
    ids: list[int] = []
    positions: list[int] = []
    indices: list[list[list[int]]] = []
    ends: list[int] = []
    for sequences in blocks:
        before: Sequence[int] = ()
        own: list[int] = []
        indices.append([])
        for sequence in sequences:
            shared = _shared(sequence, before)
            own = [*own[:shared], *range(len(ids), len(ids) + len(sequence) - shared)]
            ids += sequence[shared:]
            positions += range(shared, len(sequence))
            indices[-1].append(own)
            before = sequence
        ends.append(len(ids))
    padded = attention == "sdpa"
    found = _blocks(indices, ends, padded) if padded else _blocks([list(chain(*indices))], [len(ids)], padded)
    on_host = [tensor for *_, tensors in found for tensor in tensors] + [int64(positions)]
    *tensors, on_device = upload(torch.cat(on_host), device).split([len(tensor) for tensor in on_host])  # in one copy
    laid = []
    for (shape, lengths, own_tokens, _), i in zip(found, range(0, len(tensors), 5), strict=True):
        offsets, *rest = tensors[i : i + 5]
        laid.append(Block(shape, lengths, offsets.int(), own_tokens, *rest))
    return ids, indices, Layout(tuple(laid), on_device, attention)


def _blocks(
    indices: Sequence[Sequence[Sequence[int]]], ends: Sequence[int], padded: bool
) -> list[tuple[tuple[int, int], tuple[int, ...], slice, list[Tensor]]]:
    """For each block its shape, lengths, tokens, and its five tensors, in the order of `Block`, on the CPU."""
    found = []
    begin = 0
    for own, end in zip(indices, ends, strict=True):
        lengths = tuple(map(len, own))
        longest = max(lengths)
        sizes, tokens = int64(lengths), int64(list(chain(*own))) - begin
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        place = torch.arange(len(tokens))  # of each of the tokens
        if padded:
            place += torch.repeat_interleave(torch.arange(len(own)) * longest - offsets[:-1], sizes)
        at = place.new_zeros(len(own) * longest if padded else len(tokens))
        at.index_copy_(0, place, tokens)
        starts, order = _places(tokens, end - begin)
        places = place[order]
        tensors = [offsets, at, starts, places, places[starts[:-1]]]
        found.append(((len(own), longest), lengths, slice(begin, end), tensors))
        begin = end
    return found


def _places(at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """at [M], which of `count` tokens is at each place -> `starts` and `places` as in `Block`."""
    counts = torch.bincount(at, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), at.argsort(stable=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index]: [N, D] -> [M, D], for an int64 index on the CPU.

    If a row of x is taken several times, its gradients add up in float32 and in a fixed order. The backward pass of
    `index_select` adds them in the dtype of x, and on a GPU in any order.
    """
    tensors = [index, *_places(index, len(x))]
    return _Take.apply(x, *upload(torch.cat(tensors), x.device).split([len(tensor) for tensor in tensors]))


class _Take(torch.autograd.Function):
    """`take`, with `starts` and `places` as in `Block`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, starts: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(starts, places)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        starts, places = ctx.saved_tensors
        N, D = len(starts) - 1, grad.shape[1]
        width = math.gcd(D, 64)
        # rope_gather adds the rows up as if they were queries, rotated by 0; there are no keys or values
        heads = grad.contiguous().view(len(grad), D // width, width)
        none, cos, sin = heads[:, :0], grad.new_ones(N, width // 2), grad.new_zeros(N, width // 2)
        return rope_gather(heads, none, none, cos, sin, starts, places, grad.new_empty(N, D)), None, None, None


class _Spread(torch.autograd.Function):
    """qkv [N, (Hq + 2·Hkv)·E] -> for each block the rotated queries, rotated keys, and values, each [M, heads, E]."""

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
    """Copy the outputs of each block, [M, D] at its places, to the tokens [N, D], each from its first place."""

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


def sequence_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    scale: float | None,
    layout: Layout,
    keep: Keep = keep_all,
) -> list[Tensor]:
    """Apply the rotary embedding and causal attention to every sequence.

    Args:
        qkv: [N, (Hq + 2·Hkv)·E], the projections of the tokens.
        cos, sin: [N, E/2], at the positions of the tokens.
        kv_heads: Hkv.
        scale: factor of the scores; None = E^-1/2.
        layout: of the sequences.
        keep: `keep_all`, or `recomputed` if the backward pass is to compute queries, keys and values again.

    Returns:
        For each block the outputs [M, Hq·E] at its places. `collect` copies them back to the tokens.
    """
    spread = _Spread.apply(qkv, cos, sin, kv_heads, layout)
    outputs = []
    for i, block in enumerate(layout.blocks):
        q, k, v = own = spread[3 * i : 3 * i + 3]
        with keep(own, partial(_spread, qkv.detach(), cos, sin, kv_heads, block)):
            outputs.append(IMPLEMENTATIONS[layout.attention](q, k, v, block, scale).flatten(1))
    return outputs


def collect(layout: Layout, *places: Tensor) -> Tensor:
    """The result of `sequence_attention` at the places of each block -> [N, Hq·E] at the tokens."""
    return _Collect.apply(layout, *places)


def fastest(
    blocks: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> str:
    """Time all implementations that can run, forward and backward, on these sequences -> the fastest one.

    `shape`: number of query heads, number of key/value heads, elements of a head.
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
    """Seconds of one layer's attention, including the copies to the places and back."""
    ids, _, layout = lay_out(blocks, device, name)
    heads, kv_heads, width = shape
    qkv = torch.ones(len(ids), (heads + 2 * kv_heads) * width, device=device, dtype=dtype, requires_grad=True)
    cos = torch.ones(len(ids), width // 2, device=device, dtype=dtype)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times = []
    with torch.enable_grad():
        for _ in range(6):  # the first one compiles kernels
            wait()  # for the rewards too, which may be at work
            start = time.perf_counter()
            out = collect(layout, *sequence_attention(qkv, cos, cos, kv_heads, None, layout))
            torch.autograd.grad(out, qkv, out.detach())
            wait()
            times.append(time.perf_counter() - start)
    return min(times)
