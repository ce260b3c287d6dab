"""prefill_attention against each prompt's own softmax in float64, in a pool whose other slots hold NaN."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracle import BFLOAT16_ROUNDING, TRITON, assert_no_worse, device
from torch import Tensor

from bicot.kernels.kv_pool import FP8, quantize_fp8
from bicot.kernels.prefill_attention import prefill_attention

# in Triton's interpreter, differences of -inf
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# of the norm and of each element: probabilities are rounded to the dtype before the second product
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2 * BFLOAT16_ROUNDING, torch.float16: 2**-10}
LENGTHS = [1, 37, 64, 3, 130, 1, 1, 20]
SHAPES = [(4, 4, 32), (6, 2, 20), (2, 2, 128), (4, 1, 8)]  # Hq, Hkv, E


def packed(
    Hq: int, Hkv: int, E: int, dtype: torch.dtype, lengths: Sequence[int] = LENGTHS
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q as a slice of q, k and v; prompts lie in the pool in reverse order, one slot apart."""
    generator = torch.Generator().manual_seed(sum(lengths))
    N = sum(lengths)
    starts = [1 + sum(n + 1 for n in lengths[i + 1 :]) for i in range(len(lengths))]
    slots = torch.tensor([start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)])
    first = torch.tensor([sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)])
    pools = torch.full((2, N + len(lengths) + 1, Hkv, E), torch.nan)
    pools[:, slots] = torch.randn(2, N, Hkv, E, generator=generator)
    q = 2 * torch.randn(N, Hq + 2, E, generator=generator)
    keys, values = pools.to(dtype)
    return q.to(dtype)[:, :Hq], keys, values, slots, first


def exact(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, first: Tensor) -> Tensor:
    q, keys, values = q.double(), keys[slots].double(), values[slots].double()
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    n = torch.arange(len(q))
    seen = (n <= n[:, None]) & (n >= first[:, None])
    scores = torch.einsum("nhe,jhe->hnj", q, keys) * q.shape[2] ** -0.5
    return torch.einsum("hnj,jhe->nhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), values).flatten(1)


def run(impl: str, *given: Tensor, scales: Sequence[Tensor] = (None, None)) -> Tensor:  # type: ignore[assignment]
    q, *others = (x.to(device(impl)) for x in given)
    key_scales, value_scales = (x if x is None else x.to(device(impl)) for x in scales)
    return prefill_attention(q, *others, key_scales=key_scales, value_scales=value_scales, impl=impl).cpu()  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_attends_its_prompt(shape: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    given = packed(*shape, dtype)
    ours, eager = run(impl, *given), run("torch", *given)
    assert_no_worse("out", ours, eager, exact(*given), RELATIVE[dtype], 1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_float8_pools(impl: str) -> None:
    q, keys, values, slots, first = packed(6, 2, 20, torch.float32)
    (keys, key_scales), (values, value_scales) = map(quantize_fp8, (keys.nan_to_num(), values.nan_to_num()))
    out = run(impl, q, keys, values, slots, first, scales=(key_scales, value_scales))
    keys, values = (x.float() * scales[..., None] for x, scales in ((keys, key_scales), (values, value_scales)))
    torch.testing.assert_close(out.double(), exact(q, keys, values, slots, first), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", [TRITON])
def test_padding_tokens_change_nothing(impl: str) -> None:
    """Each is a prompt of its own; all are in one slot."""
    q, keys, values, slots, first = packed(4, 4, 32, torch.float32)
    more = torch.arange(len(q), len(q) + 100)
    padded = torch.cat([q, q[:1].expand(100, -1, -1)]), keys, values, torch.cat([slots, slots[:1].expand(100)])
    out = run(impl, *padded, torch.cat([first, more]))
    assert torch.equal(out[: len(q)], run(impl, q, keys, values, slots, first)) and out.isfinite().all()


def test_bad_input_is_named() -> None:
    q, keys, values, slots, first = packed(4, 2, 32, torch.float32)
    assert prefill_attention(q[:0], keys, values, slots[:0], first[:0]).shape == (0, 128)
    for given, message in (
        ((q[:, :3], keys, values, slots, first), "a divisor of 3"),
        ((q, keys, values, slots[1:], first), r"slots must be \[257\] int64"),
        ((q, keys, values.repeat(1, 2, 1)[:, :2], slots, first), "values must be contiguous on cpu"),
        ((q, keys, values, slots.repeat(2)[::2], first), "slots must be contiguous on cpu"),
        ((q, keys, values, slots, first.int()), r"first must be .* torch.int32"),
        ((q.mT.contiguous().mT, keys, values, slots, first), "strided"),
        ((q, keys.to(FP8), values.to(FP8), slots, first), "without scales"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_attention(*given)
    with pytest.raises(ValueError, match="no C\\+\\+ kernel"):
        prefill_attention(q, keys, values, slots, first, impl="native")
    for wants in ((q.clone().requires_grad_(), keys, values), (q, keys, values.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="forward only"):
            prefill_attention(*wants, slots, first)
