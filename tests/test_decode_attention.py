"""decode_attention against a loop over heads and keys, its kernels against the reference, the error of float8 pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BFLOAT16_ROUNDING,
    CUDA,
    IMPLEMENTATIONS,
    INTERPRETED,
    KERNELS,
    NATIVE,
    TRITON,
    assert_no_worse,
    device,
    gpu,
    no_host_sync,
    on_threads,
)
from torch import Tensor

from bicot.kernels import decode_attention as module
from bicot.kernels.decode_attention import _op, decode_attention
from bicot.kernels.kv_pool import FP8, quantize_fp8

# the interpreter's NumPy warns where the difference of two scores overflows to -inf, as it should
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# Relative, of the norm and of each element: sums in another order, and a rounding that the reference has too.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: BFLOAT16_ROUNDING if INTERPRETED else 2**-9, torch.float16: 2**-11}
ABSOLUTE = 1e-6  # of values near 1
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 8), (4, 4, 32), (6, 2, 20), (2, 2, 128), (8, 1, 64), (3, 3, 80), (2, 1, 256)]  # Hq, Hkv, E
# prefix_length and length of sequences: one key in a segment; tiles of 64 that end before, at and after its end
LENGTHS = [(0, 1), (1, 0), (5, 1), (0, 37), (37, 16), (37, 91), (37, 0), (0, 64), (1, 64), (37, 263)]
INF = float("inf")


@dataclass
class Pool:
    """The arguments of a call, in order. Slots that belong to no sequence hold NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    prefix_start: Tensor
    prefix_length: Tensor
    start: Tensor
    length: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def run(self, impl: str, scale: float | None = None) -> Tensor:
        there = [None if x is None else x.to(device(impl)) for x in vars(self).values()]
        *given, key_scales, value_scales = there
        if not self.q.is_contiguous():  # a copy to a GPU loses the strides
            given[0] = there[0].repeat(1, 2, 1)[:, : self.q.shape[1]]
        return decode_attention(*given, scale, key_scales=key_scales, value_scales=value_scales, impl=impl).cpu()

    def double(self) -> Pool:
        """Float64, scales multiplied in."""
        k, v = self.keys.double(), self.values.double()
        if self.key_scales is not None and self.value_scales is not None:
            k, v = k * self.key_scales[..., None].double(), v * self.value_scales[..., None].double()
        return replace(self, q=self.q.double(), keys=k, values=v, key_scales=None, value_scales=None)

    def to_fp8(self) -> Pool:
        k, key_scales = quantize_fp8(self.keys)
        v, value_scales = quantize_fp8(self.values)
        return replace(self, keys=k, values=v, key_scales=key_scales, value_scales=value_scales)

    def slots(self, r: int) -> list[int]:
        segments = ((self.prefix_start[r], self.prefix_length[r]), (self.start[r], self.length[r]))
        return [int(first) + i for first, n in segments for i in range(int(n))]


def pool(
    Hq: int,
    Hkv: int,
    E: int,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    *,
    seed: int = 0,
    spread: float = 2.0,
) -> Pool:
    """Sequences share the prefix at slot 3. Their own segments follow in shuffled order, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    prefix_length, length = torch.tensor(lengths, dtype=torch.int64).view(-1, 2).unbind(1)
    R, widest = len(lengths), int(prefix_length.max()) if lengths else 0
    start, end = torch.empty(R, dtype=torch.int64), 3 + widest + 2
    for r in torch.randperm(R, generator=generator).tolist():
        start[r], end = end, end + int(length[r]) + 1
    used = torch.zeros(end, dtype=torch.bool)
    used[3 : 3 + widest] = True
    for r in range(R):
        used[int(start[r]) : int(start[r] + length[r])] = True
    keys, values = torch.randn(2, end, Hkv, E, generator=generator)
    keys[~used] = values[~used] = torch.nan
    q = (spread * torch.randn(R, Hq + 2 * Hkv, E, generator=generator))[:, :Hq]  # as a slice of q, k and v
    return Pool(
        q.to(dtype), keys.to(dtype), values.to(dtype), torch.full((R,), 3), prefix_length.clone(), start, length.clone()
    )


def few(lengths: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    return [each for each in lengths if sum(each) < 64] + [(37, 91)] if INTERPRETED else lengths


def compare(p: Pool, impl: str, scale: float | None = None) -> None:
    ours, eager, gt = p.run(impl, scale), p.run("torch", scale), p.double().run("torch", scale)
    assert_no_worse("out", ours, eager, gt, RELATIVE[p.q.dtype], ABSOLUTE)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("Hq", "Hkv", "E"), SHAPES)
def test_the_reference_is_a_loop(Hq: int, Hkv: int, E: int, scale: float | None) -> None:
    p = pool(Hq, Hkv, E, torch.float64)
    out = p.run("torch", scale).view(len(LENGTHS), Hq, E)
    for r in range(len(LENGTHS)):
        for h in range(Hq):
            k, v = (x[p.slots(r), h // (Hq // Hkv)] for x in (p.keys, p.values))
            weights = (k @ p.q[r, h] * (E**-0.5 if scale is None else scale)).exp()
            torch.testing.assert_close(out[r, h], weights @ v / weights.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hq", "Hkv", "E"), SHAPES)
def test_kernels(Hq: int, Hkv: int, E: int, dtype: torch.dtype, impl: str) -> None:
    p = pool(Hq, Hkv, E, dtype, few(LENGTHS))
    compare(p, impl)
    assert torch.equal(p.run(impl), p.run(impl))


@pytest.mark.parametrize("impl", [TRITON])
def test_float16(impl: str) -> None:
    compare(pool(4, 4, 32, torch.float16, few(LENGTHS)), impl, scale=0.5)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hq", "Hkv", "E"), SHAPES[1:5])
def test_a_float8_pool(Hq: int, Hkv: int, E: int, dtype: torch.dtype, impl: str) -> None:
    """Exact in what it stores: scales far apart, and folded into the right scores and probabilities."""
    p = pool(Hq, Hkv, E, dtype, few(LENGTHS))
    magnitude = torch.logspace(-3, 1, len(p.keys))[:, None, None]
    p.keys, p.values = p.keys * torch.rand(len(p.keys), Hkv, 1), p.values * magnitude
    compare(p.to_fp8(), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_every_code_of_float8(side: str, impl: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = codes.float().isfinite()
    reads_nan = not (impl == "triton" and INTERPRETED)  # as a GPU does; the interpreter takes it for 480
    seen = finite | reads_nan
    if side == "values":  # of the only key
        p = pool(1, 1, 256, lengths=[(0, 1)])
        values, ones = codes.expand(len(p.keys), 1, 256).contiguous(), torch.ones(len(p.keys), 1)
        out = replace(p, keys=torch.zeros_like(values), values=values, key_scales=ones, value_scales=ones * 0.5).run(
            impl
        )
        expected = (codes.float() * 0.5)[seen]
        torch.testing.assert_close(out[0, seen], expected, rtol=0, atol=0, equal_nan=True)
        return
    # a score of c / |c| against one of 0: with the values 1 and 0 the output is its probability
    p = pool(1, 1, 16, lengths=[(0, 2)] * 256)
    keys, values = (torch.zeros(len(p.keys), 1, 16) for _ in range(2))
    keys[p.start, 0, 5] = codes.float()
    values[p.start] = 1
    q = torch.zeros(256, 1, 16)
    q[:, 0, 5] = torch.where(finite & (codes.float() != 0), 1 / codes.float().abs(), 1.0)
    p = replace(p, q=q, keys=keys.to(FP8), values=values.to(FP8))
    p = replace(p, key_scales=torch.ones(len(keys), 1), value_scales=torch.ones(len(keys), 1))
    expected = codes.float().sign().sigmoid()
    torch.testing.assert_close(p.run(impl, 1.0)[finite, 0], expected[finite], rtol=1e-6, atol=0)
    assert not reads_nan or p.run(impl, 1.0)[~finite].isnan().all()


def fp8_error(p: Pool) -> float:
    """Relative, of an attention over a float8 pool against that over the exact one, both in float64."""
    exact = p.double().run("torch")
    return float((p.to_fp8().double().run("torch") - exact).norm() / exact.norm())


def test_the_error_of_float8() -> None:
    """With 3 bits of mantissa and a scale for each token and head, errors are 2^-4 at most and 2^-5.3 on average.

    Models have channels of keys with outliers, here of 30 times the other channels. Numbers in other channels stay as
    precise, because float8 has an exponent.
    """
    lengths = [(160, 300)] * 16
    flat, peaked, outliers = (pool(4, 4, 128, lengths=lengths, spread=spread) for spread in (1.0, 4.0, 1.0))
    outliers.keys[..., [7, 40]] *= 30
    outliers.q[..., [7, 40]] /= 30
    errors = [fp8_error(p) for p in (flat, peaked, outliers)]
    print("float8 pool, relative error of the output (flat, peaked, outliers):", *(f"{e:.4f}" for e in errors))
    for error, bound in zip(errors, (0.039, 0.07, 0.039), strict=True):
        assert 0.85 * bound < error < bound


@pytest.mark.parametrize("impl", KERNELS)
def test_a_shared_prefix_equals_an_own_one(impl: str) -> None:
    p = pool(4, 2, 32, lengths=[(37, 16), (37, 91), (37, 1)])
    keys, values, start = [], [], []
    for r in range(3):
        start.append(sum(map(len, keys)))
        keys.append(p.keys[p.slots(r)])
        values.append(p.values[p.slots(r)])
    zero = torch.zeros(3, dtype=torch.int64)
    own = replace(
        p,
        keys=torch.cat(keys),
        values=torch.cat(values),
        prefix_start=zero + 10**12,  # of an empty prefix: not read
        prefix_length=zero,
        start=torch.tensor(start),
        length=p.prefix_length + p.length,
    )
    assert torch.equal(p.run(impl), own.run(impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_a_sequence_alone_and_in_a_batch(impl: str) -> None:
    p = pool(4, 4, 32, lengths=few(LENGTHS))
    together = p.run(impl)
    for r in range(len(p.q)):
        own = {name: getattr(p, name)[r : r + 1] for name in ("q", *module._SEGMENTS)}
        alone = replace(p, **own).run(impl)[0]
        # on a GPU fewer sequences have more splits, which are summed in another order
        torch.testing.assert_close(
            alone, together[r], rtol=1e-5 if impl == "triton" else 0, atol=1e-6 * (impl == "triton")
        )


@pytest.mark.parametrize("impl", [NATIVE])
def test_threads_change_nothing(impl: str) -> None:
    for p in (pool(6, 3, 64), pool(6, 3, 64, lengths=[(37, 900)])):
        one, two, five = on_threads(lambda p=p: p.run(impl), 1, 2, 5)
        assert torch.equal(one, two) and torch.equal(one, five)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [1e4, -1e4, 3e37])
def test_scores_far_from_zero(offset: float, impl: str) -> None:
    """Equal scores give the mean of the values, one score far above the others its value. Scores may rise or fall."""
    n = 40 if INTERPRETED else 300
    p = pool(1, 1, 16, lengths=[(0, n)])
    p.q[:] = 0
    p.q[..., 0] = 1
    own = p.slots(0)
    p.keys[own] = offset
    mean = p.values[own].mean(0)[0]
    torch.testing.assert_close(p.run(impl, 1.0)[0], mean, rtol=1e-5, atol=1e-6)
    for winner in (0, 1, n // 2, n - 1):
        p.keys[own] = -abs(offset)
        p.keys[own[winner]] = abs(offset)
        torch.testing.assert_close(p.run(impl, 1.0)[0], p.values[own[winner], 0], rtol=1e-6, atol=1e-7)
    ramp = torch.linspace(-200, 200, n)
    for scores in (ramp, -ramp):
        p.keys[own, 0, 0] = scores
        expected = scores.double().softmax(0) @ p.values[own, 0].double()
        torch.testing.assert_close(p.run(impl, 1.0)[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_key_of_minus_infinity_is_masked_and_nan_shows(impl: str) -> None:
    p = pool(1, 1, 16, lengths=[(2, 60), (2, 3)])
    p.q[:] = 1
    for slot in p.slots(0)[:33] + p.slots(1)[-1:]:
        p.keys[slot] = -INF
    out = p.run(impl)
    for r in range(2):
        seen = [s for s in p.slots(r) if p.keys[s, 0, 0] > -INF]
        expected = (p.keys[seen, 0].double().sum(-1) / 4).softmax(0) @ p.values[seen, 0].double()
        torch.testing.assert_close(out[r].double(), expected, rtol=1e-5, atol=1e-5)
    p.keys[p.slots(0)[40]] = torch.nan
    out = p.run(impl)
    assert out[0].isnan().all() and out[1].isfinite().all()


@settings(max_examples=3 if INTERPRETED else 20 if CUDA else 60)  # most compile a kernel on a GPU
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 150)).filter(any), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (2, 2), (6, 2)]),
    st.sampled_from([2, 16, 18, 33, 64]),
    st.integers(0, 100),
)
@pytest.mark.parametrize("impl", KERNELS)
def test_any_lengths(impl: str, lengths: list[tuple[int, int]], heads: tuple[int, int], E: int, seed: int) -> None:
    compare(pool(*heads, E, lengths=lengths, seed=seed), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_sequences(impl: str) -> None:
    assert pool(4, 2, 32, lengths=[]).run(impl).shape == (0, 128)


@pytest.mark.parametrize("impl", [TRITON])
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits(dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more splits than a sequence has tiles, some splits have no key."""
    for fp8 in (False, True):
        p = pool(2, 2, 64, dtype, [(0, 1), (37, 91), (0, 263)])
        for processors in (1, 2, 10**4):
            monkeypatch.setattr(module, "processors", lambda *_, n=processors: n)
            monkeypatch.setattr(module, "_SPLIT_KEYS", 16)
            compare(p.to_fp8() if fp8 else p, impl)
    assert module.num_splits(6, len(p.keys), 10**4) == 32


def test_num_splits_depends_on_shapes_and_not_on_lengths() -> None:
    assert module.num_splits(2048, 10**6, 132) == 1  # every multiprocessor is busy
    assert module.num_splits(32 * 16, 32 * 736, 132) == 1  # nearly four on each
    assert module.num_splits(16 * 16, 16 * 736, 132) == 2
    assert module.num_splits(2 * 16, 2 * 736, 132) == 8  # 9 wanted, of 6 times 256 keys
    assert module.num_splits(1, 100, 132) == 1  # too few keys
    assert module.num_splits(1, 10**9, 10**4) == 64
    for programs in range(1, 600, 7):
        n = module.num_splits(programs, 10**5, 132)
        assert n & (n - 1) == 0 and (n == 64 or n * programs >= 2 * 132)


def changed(**changes: Any) -> Pool:
    return replace(pool(4, 2, 32), **changes)


LONG = torch.ones(len(LENGTHS), dtype=torch.int64)
POOL = torch.zeros(900, 2, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(10, 4, 31)}, r"keys and values must be \[P, Hkv, 31\]"),
        ({"q": torch.zeros(10, 3, 32)}, "divisor of 3"),
        ({"q": torch.zeros(10, 4, 300)}, "E up to 256"),
        ({"q": torch.zeros(10, 4, 32, dtype=torch.int64)}, "floating"),
        ({"q": torch.zeros(10, 32, 4).mT}, "strided"),
        ({"values": POOL[:5]}, "keys and values must be"),
        ({"keys": POOL.bfloat16(), "values": POOL.bfloat16()}, "without scales must be torch.float32"),
        ({"keys": POOL.to(FP8), "values": POOL.to(FP8)}, "without scales must be torch.float32"),
        ({"keys": POOL, "values": POOL, "key_scales": POOL[..., 0]}, "or neither"),
        (
            {"keys": POOL, "values": POOL, "key_scales": POOL[..., 0], "value_scales": POOL[..., 0]},
            "with scales must be",
        ),
        ({"start": LONG.int()}, r"start must be \[10\] int64"),
        ({"prefix_length": LONG[:3]}, r"prefix_length must be \[10\] int64"),
        ({"length": LONG.repeat(2)[::2]}, "contiguous"),
        ({"keys": POOL.mT.contiguous().mT, "values": POOL}, "contiguous"),
    ],
)
def test_bad_inputs(changes: dict[str, Any], message: str) -> None:
    p = changed(**changes)
    with pytest.raises(ValueError, match=message):
        decode_attention(*list(vars(p).values())[:7], key_scales=p.key_scales, value_scales=p.value_scales)


@pytest.mark.parametrize("impl", [NATIVE])
@pytest.mark.parametrize(
    "change",
    ["start -1", "start 1000000", f"start {2**63 - 1}", "prefix_start -2", "length 100000", "length -1", "length 0"],
)
def test_sequences_outside_the_pool(change: str, impl: str) -> None:
    p = pool(2, 2, 16, lengths=[(2, 3), (2, 4), (2, 5)])
    name, value = change.split()[0], int(change.split()[1])
    getattr(p, name)[1] = value
    if value == 0:
        p.prefix_length[1] = 0
    with pytest.raises(IndexError, match=rf"sequence 1 has no key, or one outside .* {change}"):
        p.run(impl)


def test_float64_is_pytorchs_and_no_gradient_flows() -> None:
    p = pool(2, 2, 16, torch.float64)
    assert torch.equal(p.run("auto"), p.run("torch"))
    for name in ("q", "keys", "values"):
        with pytest.raises(RuntimeError, match="forward only"):
            replace(p, **{name: getattr(p, name).clone().requires_grad_()}).run("auto")


@pytest.mark.parametrize("impl", [NATIVE])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_op_and_torch_compile(fp8: bool, impl: str) -> None:
    p = pool(4, 2, 32, lengths=[(5, 1), (0, 40)])
    p = p.to_fp8() if fp8 else p
    arguments = list(vars(p).values())
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if fp8 else ["test_schema"]  # which multiplies, and PyTorch multiplies no float8
    torch.library.opcheck(_op, (*arguments[:7], 0.2, *arguments[7:], impl), test_utils=checks)
    scales = {"key_scales": p.key_scales, "value_scales": p.value_scales}
    compiled = torch.compile(
        lambda *a: decode_attention(*a, **scales, impl=impl) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*arguments[:7]), p.run(impl) + 1)


def test_torch_compile_of_the_reference() -> None:
    p = pool(4, 2, 32, lengths=[(5, 1), (0, 40)])
    compiled = torch.compile(lambda *a: decode_attention(*a, impl="torch"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*list(vars(p).values())[:7]), p.run("torch"), rtol=1e-5, atol=1e-6)


@gpu
def test_a_cuda_graph_replays_other_sequences() -> None:
    """The host does not wait, and the launches do not depend on the sequences."""
    p = pool(4, 4, 64, torch.bfloat16)
    given = [x.cuda() for x in list(vars(p).values())[:7]]
    decode_attention(*given)
    with no_host_sync():
        decode_attention(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*given)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    for x, there in zip((p.prefix_start, p.prefix_length, p.start, p.length), given[3:], strict=True):
        there.copy_(x[order])
    graph.replay()
    expected = replace(p, **{name: getattr(p, name)[order] for name in module._SEGMENTS})
    assert_no_worse("out", out.cpu(), expected.run("torch"), expected.double().run("torch"), 2**-9, ABSOLUTE)
