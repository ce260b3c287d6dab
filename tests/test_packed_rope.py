"""rope_spread against transformers' rotary embedding, rope_gather as its adjoint, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    BFLOAT16_ROUNDING,
    IMPLEMENTATIONS,
    INTERPRETED,
    KERNELS,
    NATIVE,
    assert_no_worse,
    device,
    poisoned_outputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bicot.kernels.packed_rope import _gather_op, _spread_op, rope_gather, rope_spread

# One rounding, as in the reference.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: BFLOAT16_ROUNDING if INTERPRETED else 2**-12}
DTYPES = list(RELATIVE)
# Hq, Hkv, E: one head; grouped queries; a half that no power of two divides; the 1B model's heads
HEADS = [(1, 1, 2), (6, 2, 12), (5, 5, 80), (16, 16, 128), (2, 1, 256)]
TOKEN_AT = [0, 1, 2, 0, 1, 3, 4, 4, 0, 1, 2, 5]  # six tokens at twelve places


def inputs(heads: tuple[int, int, int], dtype: torch.dtype, to: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin and token_at."""
    Hq, Hkv, E = heads
    draw = torch.Generator().manual_seed(sum(heads))
    qkv = torch.randn(6, (Hq + 2 * Hkv) * E, generator=draw)
    angles = torch.rand(6, E // 2, generator=draw) * 7
    return *(t.to(to, dtype) for t in (qkv, angles.cos(), angles.sin())), torch.tensor(TOKEN_AT, device=to)


def table(to: str) -> tuple[Tensor, Tensor]:
    """starts and places of TOKEN_AT."""
    each = [[p for p, token in enumerate(TOKEN_AT) if token == t] for t in range(6)]
    starts = torch.tensor([0, *map(len, each)]).cumsum(0)
    return starts.to(to), torch.tensor([p for places in each for p in places], device=to)


def gather(given: list[Tensor], cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    width = sum(t.shape[1] for t in given) * given[0].shape[2]
    out = given[0].new_full((len(cos), width), torch.nan)
    return rope_gather(*given, cos, sin, *table(str(cos.device)), out, impl=impl)


def test_is_transformers_rotary_embedding() -> None:
    qkv, cos, sin, token_at = inputs((6, 2, 12), torch.float64, "cpu")
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.view(6, 10, 12)[token_at].split([6, 2, 2], dim=1))
    full = (torch.cat([t, t], dim=1)[token_at][None] for t in (cos, sin))
    expected = [*apply_rotary_pos_emb(q, k, *full), v]
    for x, true in zip(rope_spread(qkv, cos, sin, token_at, 2), expected, strict=True):
        torch.testing.assert_close(x, true[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS)
def test_gather_is_the_adjoint_of_spread(heads: tuple[int, int, int]) -> None:
    qkv, cos, sin, token_at = inputs(heads, torch.float64, "cpu")
    spread = rope_spread(qkv, cos, sin, token_at, heads[1])
    given = [torch.randn_like(x) for x in spread]
    both = sum((x * g).sum() for x, g in zip(spread, given, strict=True))
    torch.testing.assert_close((qkv * gather(given, cos, sin, "torch")).sum(), both)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_kernels(heads: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    qkv, cos, sin, token_at = inputs(heads, dtype, device(impl))
    wide = [t.double() for t in (qkv, cos, sin)]
    with poisoned_outputs():
        ours = rope_spread(qkv, cos, sin, token_at, heads[1], impl=impl)
    eager = rope_spread(qkv, cos, sin, token_at, heads[1], impl="torch")
    gt = rope_spread(*wide, token_at, heads[1], impl="torch")
    for name, *each in zip("qkv", ours, eager, gt, strict=True):
        assert_no_worse(name, *each, RELATIVE[dtype], 1e-6)
    summed = [gather(x, *c, i) for x, c, i in ((ours, (cos, sin), impl), (ours, (cos, sin), "torch"))]
    truth = gather([x.double() for x in ours], *wide[1:], "torch")
    assert_no_worse("gather", *summed, truth, RELATIVE[dtype], 1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_places_are_added_in_float32(impl: str) -> None:
    """A sum of 1 and many 1/512 in bfloat16 would be 1."""
    one = torch.ones(513, 1, 2, dtype=torch.bfloat16, device=device(impl))
    one[1:] = 2**-9
    cos, sin = one.new_ones(1, 1), one.new_zeros(1, 1)
    starts, places = torch.tensor([0, 513], device=one.device), torch.arange(513, device=one.device)
    out = rope_gather(one, one, one, cos, sin, starts, places, one.new_empty(1, 6), impl=impl)
    assert out.tolist() == [[2.0] * 6]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_queries_alone_not_rotated_are_summed(impl: str) -> None:
    to = device(impl)
    x = torch.randn(12, 3, 6, generator=torch.Generator().manual_seed(0)).to(to)
    cos, sin = torch.ones(6, 3, device=to), torch.zeros(6, 3, device=to)
    summed = gather([x, x[:, :0], x[:, :0]], cos, sin, impl)
    expected = x.new_zeros(6, 18).index_add_(0, torch.tensor(TOKEN_AT, device=to), x.flatten(1))
    torch.testing.assert_close(summed, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: str) -> None:
    qkv, cos, sin, token_at = inputs((6, 2, 12), torch.float32, device(impl))
    spread = rope_spread(qkv, cos, sin, token_at[:0], 2, impl=impl)
    assert [x.shape for x in spread] == [(0, 6, 12), (0, 2, 12), (0, 2, 12)]
    starts = torch.zeros(7, dtype=torch.int64, device=qkv.device)
    out = rope_gather(*spread, cos, sin, starts, token_at[:0], torch.ones_like(qkv), impl=impl)
    assert torch.equal(out, torch.zeros_like(qkv)), "a token without a place"


@pytest.mark.parametrize("impl", KERNELS)
def test_ops(impl: str) -> None:
    qkv, cos, sin, token_at = inputs((6, 2, 12), torch.float32, device(impl))
    torch.library.opcheck(_spread_op, (qkv, cos, sin, token_at, 2, impl))
    spread = rope_spread(qkv, cos, sin, token_at, 2, impl=impl)
    given = (*spread, cos, sin, *table(str(qkv.device)), torch.empty_like(qkv), impl)
    torch.library.opcheck(_gather_op, given)


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_one_graph_for_any_number_of_places(impl: str) -> None:
    qkv, cos, sin, token_at = inputs((6, 2, 12), torch.float32, "cpu")
    graphs = CompileCounter()

    def spread(token_at: Tensor) -> list[Tensor]:
        return rope_spread(qkv, cos, sin, token_at, 2, impl=impl)  # type: ignore[arg-type]

    compiled = torch.compile(spread, backend=graphs, fullgraph=True, dynamic=True)
    for M in range(3, len(token_at)):
        torch.testing.assert_close(compiled(token_at[:M].clone()), spread(token_at[:M].clone()))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_errors(impl: str) -> None:
    qkv, cos, sin, token_at = inputs((6, 2, 12), torch.float32, device(impl))
    for bad in (qkv[0], qkv[:, :47], qkv[:, :48]):
        with pytest.raises(ValueError, match=r"qkv must be \[N, \(Hq"):
            rope_spread(bad, cos, sin, token_at, 2, impl=impl)
    for tables in ((cos[:5], sin), (cos, sin[:, :5])):
        with pytest.raises(ValueError, match=r"cos and sin must be \[N, E/2\] of 6 tokens"):
            rope_spread(qkv, *tables, token_at, 2, impl=impl)
    for tensors in (
        (qkv, cos.double(), sin, token_at),
        (qkv, cos, sin, token_at.int()),
        (qkv.T.contiguous().T, cos, sin),
    ):
        with pytest.raises(ValueError, match=r"tensors must be torch\.(float32|int64), contiguous"):
            rope_spread(*(*tensors, token_at)[:4], 2, impl=impl)
    with pytest.raises(RuntimeError, match="forward only"):
        rope_spread(qkv.requires_grad_(), cos, sin, token_at, 2, impl=impl)
    spread = rope_spread(qkv.detach(), cos, sin, token_at, 2, impl=impl)
    starts, places = table(str(qkv.device))
    with pytest.raises(ValueError, match=r"queries must be \[M, Hq, 12\]"):
        rope_gather(spread[0], spread[1][1:], spread[2], cos, sin, starts, places, qkv, impl=impl)
    with pytest.raises(ValueError, match=r"out must be \[N, 120\] and starts"):
        rope_gather(*spread, cos, sin, starts[1:], places, qkv, impl=impl)
