"""The end of a decode step in one launch: write the drawn tokens, advance the sequences, embed the tokens.

Sequence r of R belongs to sample r % B, for which token, logp_cond and logp_guided [B] were drawn. For every sample s

    outputs[·][state[output, s]] = token_s, logp_cond_s, logp_guided_s;    running_s = False if token_s = end

and then for every sequence r

    state[i, r] += state[-1, r] for i from `grows` to K - 2;               x_r = table[token_{r % B}]

Shapes: state [K, R] int64, three outputs of [O], running [B] bool, table [V, D], x [R, D]. Floor: 2·R·D elements moved.
PyTorch needs eight launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose, launch, tl, triton


@triton.jit
def _record_draw_kernel(  # type: ignore[no-untyped-def]
    p_token, p_cond, p_guided, p_state, stride, p_tokens, p_conds, p_guideds, p_running, end, p_table, p_x, B,
    K: tl.constexpr, GROWS: tl.constexpr, OUTPUT: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program takes one sequence."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0).to(tl.int64)
    sample = sequence % B
    token = tl.load(p_token + sample)
    o_d = tl.arange(0, DB)
    tl.store(p_x + sequence * D + o_d, tl.load(p_table + token * D + o_d, o_d < D), o_d < D)
    p_own = p_state + sequence
    if sequence < B:
        output = tl.load(p_own + OUTPUT * stride)
        tl.store(p_tokens + output, token)
        tl.store(p_conds + output, tl.load(p_cond + sequence))
        tl.store(p_guideds + output, tl.load(p_guided + sequence))
        if p_running is not None:
            tl.store(p_running + sequence, False, token == end)
    step = tl.load(p_own + (K - 1) * stride)
    for i in tl.static_range(GROWS, K - 1):
        tl.store(p_own + i * stride, tl.load(p_own + i * stride) + step)


def record_draw(
    draw: Sequence[Tensor],
    state: Tensor,
    outputs: Sequence[Tensor],
    table: Tensor,
    x: Tensor,
    *,
    grows: int,
    output: int,
    running: Tensor | None = None,
    end: int = -1,
    impl: Impl = "auto",
) -> None:
    """Write the draws of a step to `outputs`, advance `state`, and write the embedded tokens to `x`; all in place.

    Args:
        draw: token [B] int64, logp_cond and logp_guided [B].
        state: [K, R] int64, the integers that describe each sequence, R a multiple of B; stride(0) is free.
        outputs: tokens [O] int64, two log-probabilities [O] float32.
        table: [V, D], dtype of x, the embedding of each token.
        x: [R, D] contiguous, the input of the next step.
        grows: state[grows:-1] grow by state[-1].
        output: state[output] is the index of a sample's draw in `outputs`.
        running: [B] bool, set to False for a sample that draws `end`; or None.
        end: the token that ends a sample.
        impl: "triton" (CUDA), "torch", or "auto": Triton on a GPU, and else PyTorch.

    Raises:
        ValueError: shapes or strides that do not fit together, or an `impl` that cannot run.
    """
    token, *logprobs = draw
    B, (R, D) = len(token), x.shape
    if state.shape[1] != R or R % B or table.shape[1] != D or table.dtype != x.dtype:
        raise ValueError(
            f"need state [K, R], x [R, D], table [V, D] of one dtype, R a multiple of {B} draws; "
            f"got {[*state.shape]}, {[*x.shape]}, {[*table.shape]}"
        )
    if state.stride(1) != 1 or not all(t.is_contiguous() for t in (*draw, *outputs, table, x)):
        raise ValueError("all tensors must be contiguous; only the first dimension of state may be strided")
    if choose(impl, x.device, x.dtype, cpp=False) != "triton":
        at = state[output, :B]
        for kept, drawn in zip(outputs, draw, strict=True):
            kept.index_copy_(0, at, drawn.to(kept.dtype))
        state[grows:-1] += state[-1]
        if running is not None:
            running &= token != end
        x.view(-1, B, D)[:] = F.embedding(token, table)
        return
    launch(
        _record_draw_kernel, (R,), token, *logprobs, state, state.stride(0), *outputs, running, end, table, x,
        B, len(state), grows, output, D, triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
