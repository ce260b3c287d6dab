"""What a decode step does with the tokens it drew, in one launch: keep them, count them, and embed them for the next.

Sequence r of R belongs to sample r % B. With the draws token, logp_cond and logp_guided [B], for every sequence

    x_r = table[token_{r % B}]
    numbers[i, r] += numbers[-1, r]                            for i from `grows` to the last but one

and for every sample s, before its numbers grow,

    columns[·][numbers[place, s]] = the three draws;           running_s = False where token_s = end

Shapes: numbers [K, R] int64, columns three of [O], running [B] bool, table [V, D], x [R, D]. Floor: 2·R·D elements
moved. PyTorch makes eight launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose, launch, tl, triton


@triton.jit
def _record_draw_kernel(  # type: ignore[no-untyped-def]
    p_token, p_cond, p_guided, p_numbers, stride, p_tokens, p_conds, p_guideds, p_running, end, p_table, p_x, B,
    K: tl.constexpr, GROWS: tl.constexpr, PLACE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program takes one sequence."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    sample = row % B
    token = tl.load(p_token + sample)
    o_d = tl.arange(0, DB)
    tl.store(p_x + row * D + o_d, tl.load(p_table + token * D + o_d, o_d < D), o_d < D)
    p_number = p_numbers + row
    if row < B:
        place = tl.load(p_number + PLACE * stride)
        tl.store(p_tokens + place, token)
        tl.store(p_conds + place, tl.load(p_cond + row))
        tl.store(p_guideds + place, tl.load(p_guided + row))
        if p_running is not None:
            tl.store(p_running + row, False, token == end)
    step = tl.load(p_number + (K - 1) * stride)
    for i in tl.static_range(GROWS, K - 1):
        tl.store(p_number + i * stride, tl.load(p_number + i * stride) + step)


def record_draw(
    draw: Sequence[Tensor],
    numbers: Tensor,
    columns: Sequence[Tensor],
    table: Tensor,
    x: Tensor,
    *,
    grows: int,
    place: int,
    running: Tensor | None = None,
    end: int = -1,
    impl: Impl = "auto",
) -> None:
    """Keep, count and embed what a step drew: `numbers`, `columns`, `running` and `x` are written in place.

    Args:
        draw: token [B] int64, logp_cond and logp_guided [B].
        numbers: [K, R] int64, R a multiple of B; its rows may be strided. The last row is what others grow by.
        columns: tokens [O] int64 and two of [O] float32.
        table: [V, D], dtype of x, what each token is to the model.
        x: [R, D] contiguous.
        grows: the first row of numbers that grows.
        place: the row of numbers that says where a sample's draw goes in `columns`.
        running: [B] bool, or None.
        end: the token that ends a sample.
        impl: "triton" (CUDA), "torch", or "auto": Triton on a GPU, and else PyTorch.

    Raises:
        ValueError: shapes or strides that do not fit together, or an `impl` that cannot run.
    """
    token, *logprobs = draw
    B, (R, D) = len(token), x.shape
    if numbers.shape[1] != R or R % B or table.shape[1] != D or table.dtype != x.dtype:
        raise ValueError(f"{B} draws, numbers {[*numbers.shape]}, a table {[*table.shape]} and x {[*x.shape]} differ")
    if numbers.stride(1) != 1 or not all(t.is_contiguous() for t in (*draw, *columns, table, x)):
        raise ValueError("all but the rows of numbers must be contiguous")
    if choose(impl, x.device, x.dtype, cpp=False) != "triton":
        at = numbers[place, :B]
        for column, drawn in zip(columns, draw, strict=True):
            column.index_copy_(0, at, drawn.to(column.dtype))
        numbers[grows:-1] += numbers[-1]
        if running is not None:
            running &= token != end
        x.view(-1, B, D)[:] = F.embedding(token, table)
        return
    launch(
        _record_draw_kernel, (R,), token, *logprobs, numbers, numbers.stride(0), *columns, running, end, table, x,
        B, len(numbers), grows, place, D, triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
