"""The check of bounds in the interpreter: what it reports would be an illegal access on a GPU."""

from __future__ import annotations

import pytest
import torch
from bounds import Allowed, checked_bounds
from oracle import needs_triton

from bicot.kernels.dispatch import INTERPRETED, tl, triton

pytestmark = [
    needs_triton,
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone checks addresses"),
]


@triton.jit
def _copy(p_x, p_y, stride, first, end, p_free, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns [first, end) of each row. All of p_free may be touched."""
    o_x = first + tl.arange(0, BLOCK)
    o = tl.program_id(0) * stride + o_x
    tl.store(p_y + o, tl.load(p_x + o, mask=o_x < end), mask=o_x < end)


@pytest.mark.parametrize(
    ("first", "end", "rows"), [(-1, 3, 1), (0, 6, 1), (4, 6, 2), (0, 5, 3)], ids=["before", "gap", "gap only", "after"]
)
@pytest.mark.parametrize("written", [False, True])
def test_reports_an_access_outside(first: int, end: int, rows: int, written: bool) -> None:
    """Two rows of 5, of 8 columns, within a larger tensor: only these ten elements may be touched."""
    view, free = torch.zeros(4, 8)[1:3, :5], torch.zeros(4, 8)
    x, y = (free[1:], view) if written else (view, free[1:])
    with pytest.raises(Exception, match=f"{'writes' if written else 'reads'} [1-8] elements outside"):
        _copy[(rows,)](x, y, 8, first, end, free, BLOCK=8)


def test_allows_an_access_inside() -> None:
    x, y = torch.randn(4, 8)[1:3, :5], torch.zeros(4, 8)
    _copy[(2,)](x, y[1:3, :5], 8, 0, 5, x, BLOCK=8)
    assert torch.equal(y[1:3, :5], x) and y[::3].eq(0).all() and y[:, 5:].eq(0).all()


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4), torch.zeros(6, 4)[::2], torch.zeros(4, 3).T, torch.zeros(())])
def test_runs_are_the_elements(tensor: torch.Tensor) -> None:
    allowed = Allowed([tensor, torch.zeros(0), tensor])
    bytes_of = {b for begin, end in zip(allowed.begins, allowed.ends, strict=True) for b in range(begin, end)}
    elements = (tensor.as_strided((1,), (1,), i).data_ptr() for i in _offsets(tensor))
    assert bytes_of == {a + i for a in elements for i in range(4)}


def _offsets(tensor: torch.Tensor) -> list[int]:
    index = torch.cartesian_prod(*map(torch.arange, tensor.shape)) if tensor.ndim else torch.zeros(1, 0)
    return (index.long() * torch.tensor(tensor.stride(), dtype=torch.int64)).sum(-1).tolist()


def test_is_on_in_every_test() -> None:
    with checked_bounds(), pytest.raises(Exception, match="reads"):
        _copy[(1,)](torch.zeros(4), torch.zeros(8), 0, 0, 5, torch.zeros(0), BLOCK=8)
    with pytest.raises(Exception, match="reads 1 elements"):  # the check of conftest.py
        _copy[(1,)](torch.zeros(4), torch.zeros(8), 0, 0, 5, torch.zeros(0), BLOCK=8)
