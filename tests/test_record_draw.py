"""record_draw against the definition, sample by sample."""

from __future__ import annotations

import pytest
import torch
from oracle import TRITON, device

from bicot.kernels.record_draw import record_draw


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "R", "D"), [(5, 10, 48), (3, 3, 20), (1, 2, 128)])
def test_draws_are_kept_counted_and_embedded(B: int, R: int, D: int, dtype: torch.dtype, impl: str) -> None:
    torch.manual_seed(B)
    on, L = device(impl), 4
    whole = torch.randint(0, 3, (6, R + 2), device=on)  # wider than the batch
    whole[3, :B] = torch.arange(B) * L + 1
    whole[5, :R] = torch.randint(0, 2, (R,))
    state, before = whole[:, :R], whole.clone()
    draw = torch.randint(0, 9, (B,), device=on), torch.randn(B, device=on), torch.randn(B, device=on)
    outputs = [torch.full((B * L,), 7, device=on).to(drawn.dtype) for drawn in draw]
    table, x = torch.randn(9, D, device=on).to(dtype), torch.zeros(R + 2, D, device=on, dtype=dtype)
    running = torch.tensor([True, False] * 3, device=on)[:B]
    expected = running & (draw[0] != draw[0][0])
    options = {"grows": 2, "output": 3, "impl": impl}
    record_draw(draw, state, outputs, table, x[:R], running=running, end=int(draw[0][0]), **options)  # type: ignore[arg-type]
    assert torch.equal(running, expected)
    for output, drawn in zip(outputs, draw, strict=True):
        kept = torch.full_like(output, 7)
        kept[1::L] = drawn
        assert torch.equal(output, kept)
    grown = before.clone()
    grown[2:5, :R] += before[5, :R]
    assert torch.equal(whole, grown), "nothing outside the batch changes"
    assert torch.equal(x[:R], table[draw[0].repeat(R // B)]) and not x[R:].any()
    record_draw(draw, state, outputs, table, x[:R], **options)  # type: ignore[arg-type]
    assert torch.equal(running, expected), "without `running`, no sample ends"
    with pytest.raises(ValueError, match="R a multiple of"):
        record_draw(draw, state, outputs, table, x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be contiguous"):
        record_draw(draw, whole.T.contiguous().T[:, :R], outputs, table, x[:R], **options)  # type: ignore[arg-type]
