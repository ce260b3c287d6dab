"""rope_kv_write against transformers' rotary embedding, its kernels against the reference in float64, and where each
token's keys and values land."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bicot.kernels.kv_pool import FP8, quantize_fp8
from bicot.kernels.rope_kv_write import _op, rope_kv_write

# One rounding, where the reference has it; before it a fused multiply-add may be the more precise of the two.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: BFLOAT16_ROUNDING if INTERPRETED else 2**-12}
DTYPES = list(RELATIVE)
# Triton's interpreter converts to float8 wrongly if the mantissa rounds up to 2: 127.9 becomes 64, not 128. So it tests
# slots and scales, and a GPU tests rounding.
COMPILED = pytest.param(
    "triton", marks=[pytest.mark.gpu, pytest.mark.triton, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
)
# N, Hq, Hkv, E: one head; grouped queries; a half that no power of two divides; the 1B model's heads
SHAPES = [(1, 1, 1, 2), (5, 6, 2, 12), (3, 5, 5, 80), (4, 16, 16, 128), (9, 3, 1, 6), (2, 2, 1, 256)]
CANARY = 7.0


@dataclass
class Tokens:
    """The arguments of a call, in order. Slots of no token hold CANARY."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    def clone(self) -> Tokens:
        return Tokens(*(x if x is None else x.clone() for x in self.arguments()))  # type: ignore[arg-type]

    def double(self) -> Tokens:
        wide = [x.double() if x.is_floating_point() else x.clone() for x in self.arguments()[:7] if x is not None]
        return Tokens(*wide)

    def run(self, impl: str) -> Tensor:
        return rope_kv_write(*self.arguments(), impl=impl)  # type: ignore[arg-type]

    def untouched(self) -> Tensor:
        free = torch.ones(len(self.keys), dtype=torch.bool)
        free[self.slots.cpu()] = False
        return free.nonzero().flatten().to(self.slots.device)


def tokens(
    N: int, Hq: int, Hkv: int, E: int, dtype: torch.dtype, to: str = "cpu", *, fp8: bool = False, scale: float = 1.0
) -> Tokens:
    generator = torch.Generator().manual_seed(N * E + Hq)
    L, P = N + 700, 2 * N + 3
    angles = torch.arange(L)[:, None] * 1e4 ** -(torch.arange(E // 2) / (E // 2))
    pools = [torch.full((P, Hkv, E), CANARY, dtype=FP8 if fp8 else dtype, device=to) for _ in range(2)]
    scales = [torch.full((P, Hkv), CANARY, device=to) for _ in range(2)] if fp8 else []
    return Tokens(
        (torch.randn(N, (Hq + 2 * Hkv) * E, generator=generator) * scale).to(to, dtype),
        angles.cos().to(to, dtype),
        angles.sin().to(to, dtype),
        torch.randint(0, L, (N,), generator=generator).to(to),
        torch.randperm(P, generator=generator)[:N].to(to),
        *pools,
        *scales,
    )


@pytest.mark.parametrize(("N", "Hq", "Hkv", "E"), SHAPES)
def test_the_reference_is_transformers(N: int, Hq: int, Hkv: int, E: int) -> None:
    t = tokens(N, Hq, Hkv, E, torch.float64)
    q, k, v = t.qkv.clone().view(N, -1, E).split([Hq, Hkv, Hkv], dim=1)
    cos, sin = (torch.cat([table, table], dim=1)[t.positions] for table in (t.cos, t.sin))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = t.run("torch")
    torch.testing.assert_close(ours, q, rtol=0, atol=1e-14)
    torch.testing.assert_close(t.keys[t.slots], k, rtol=0, atol=1e-14)
    assert torch.equal(t.values[t.slots], v)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "Hq", "Hkv", "E"), SHAPES)
def test_kernels(N: int, Hq: int, Hkv: int, E: int, dtype: torch.dtype, impl: str) -> None:
    ours = tokens(N, Hq, Hkv, E, dtype, device(impl))
    eager, gt, before = ours.clone(), ours.double(), ours.clone()
    q, q_eager, q_gt = ours.run(impl), eager.run("torch"), gt.run("torch")
    assert q.shape == (N, Hq, E) and q.data_ptr() == ours.qkv.data_ptr()
    assert_no_worse("q", q, q_eager, q_gt, RELATIVE[dtype], 1e-7)
    assert_no_worse("keys", ours.keys, eager.keys, gt.keys, RELATIVE[dtype], 1e-7)
    assert torch.equal(ours.values, eager.values)
    free = ours.untouched()
    assert (ours.keys[free] == CANARY).all() and (ours.values[free] == CANARY).all()
    assert torch.equal(ours.qkv.view(N, -1, E)[:, -Hkv:], before.qkv.view(N, -1, E)[:, -Hkv:])
    for name in ("cos", "sin", "positions", "slots"):
        assert torch.equal(getattr(ours, name), getattr(before, name))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_rotation(impl: str) -> None:
    """Position 0 changes nothing; norms of pairs stay; the product of two heads depends on their distance alone."""
    N, E = 6, 64
    t = tokens(N, 1, 1, E, torch.float32, device(impl))
    t.qkv.copy_(t.qkv[0].clone().expand(N, -1))
    t.positions.copy_(torch.tensor([0, 3, 40, 43, 600, 603]))
    before = t.qkv.clone()
    q, k = t.run(impl)[:, 0], t.keys[t.slots][:, 0]
    assert torch.equal(q[0], before[0, :E]) and torch.equal(k[0], before[0, E : 2 * E])
    norms = lambda x: x.unflatten(-1, (2, E // 2)).norm(dim=-2)  # noqa: E731
    torch.testing.assert_close(norms(q), norms(before[:, :E]), rtol=1e-5, atol=1e-5)
    scores = (q[1::2] * k[::2]).sum(1)  # all at distance 3
    torch.testing.assert_close(scores, scores[:1].expand(3), rtol=1e-4, atol=1e-4)
    assert (scores[0] - (q[0] * k[0]).sum()).abs() > 0.1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_alone(dtype: torch.dtype, impl: str) -> None:
    """A token has the same bits alone and among others; NaN stays in its head; without tokens nothing is written."""
    t = tokens(4, 4, 2, 16, dtype, device(impl))
    t.qkv.view(4, -1, 16)[1, 4, 3] = torch.nan  # of the first key head
    last = replace(t.clone(), positions=t.positions[3:], slots=t.slots[3:], qkv=t.qkv[3:].clone())
    q = t.run(impl)
    assert torch.equal(last.run(impl), q[3:])
    assert torch.equal(last.keys[last.slots], t.keys[t.slots[3:]])
    assert not q.isnan().any() and not t.values.isnan().any()
    assert t.keys.isnan().nonzero().tolist() == [[int(t.slots[1]), 0, 3], [int(t.slots[1]), 0, 11]]
    nothing = replace(t.clone(), qkv=t.qkv[:0], positions=t.positions[:0], slots=t.slots[:0])
    assert nothing.run(impl).shape == (0, 4, 16) and torch.equal(nothing.values, t.values)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_tokens_share_a_slot(impl: str) -> None:
    t = tokens(6, 2, 2, 8, torch.float32, device(impl))
    alone = t.clone()
    q = alone.run(impl)
    t.slots[3:] = t.slots[3]
    assert torch.equal(t.run(impl), q)
    real, candidates = alone.slots[:3], alone.values[alone.slots[3:]]
    assert torch.equal(t.keys[real], alone.keys[real]) and torch.equal(t.values[real], alone.values[real])
    assert (t.values[t.slots[3]] == candidates).any(0).all(), "each number is one of the tokens' own"


@pytest.mark.parametrize("impl", ["torch", "auto", TRITON])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "Hq", "Hkv", "E"), SHAPES)
def test_float8_pool(N: int, Hq: int, Hkv: int, E: int, dtype: torch.dtype, impl: str) -> None:
    """Heads of numbers that float8 holds, times a power of 2, rotated by right angles: all results are exact."""
    generator = torch.Generator().manual_seed(E)
    t = tokens(N, Hq, Hkv, E, dtype, fp8=True)
    held = (8 + torch.randint(0, 8, (N, Hq + 2 * Hkv, E), generator=generator)) / 8.0
    held *= 2.0 ** torch.randint(-6, 8, held.shape, generator=generator)
    held[..., generator.initial_seed() % E] = 448
    held *= torch.randint(0, 2, held.shape, generator=generator) * 2 - 1
    sizes = 2.0 ** torch.randint(-30, 10, (N, Hq + 2 * Hkv, 1), generator=generator)
    sizes[0, -1] = 0
    if N > 1 and not INTERPRETED:  # its conversion of subnormal float32 is wrong too
        sizes[1, -1] = 2.0**-140  # its scale is subnormal
    t.qkv.copy_((held * sizes).view(N, -1))
    angles = torch.randint(0, 4, t.cos.shape, generator=generator)
    t.cos.copy_(torch.tensor([1, 0, -1, 0])[angles])
    t.sin.copy_(torch.tensor([0, 1, 0, -1])[angles])
    t = Tokens(*(None if x is None else x.to(device(impl)) for x in t.arguments()))  # type: ignore[arg-type]
    pool = torch.zeros_like(t.keys, dtype=dtype)
    plain = replace(t.clone(), keys=pool, values=pool.clone(), key_scales=None, value_scales=None)
    assert torch.equal(t.run(impl), plain.run("torch"))
    sizes = sizes.squeeze(-1).where(sizes.squeeze(-1) > 2.0**-100, 1.0).to(t.qkv.device)
    assert t.key_scales is not None and t.value_scales is not None
    assert torch.equal(t.key_scales[t.slots], sizes[:, Hq : Hq + Hkv])
    assert torch.equal(t.value_scales[t.slots], sizes[:, Hq + Hkv :])
    for stored, scales, expected in ((t.keys, t.key_scales, plain.keys), (t.values, t.value_scales, plain.values)):
        x = stored[t.slots].float() * scales[t.slots][..., None]
        assert torch.equal(x, expected[t.slots].float().where(expected[t.slots].abs() > 2.0**-100, 0.0))
        free = t.untouched()
        assert (stored[free].float() == CANARY).all() and (scales[free] == CANARY).all()


@pytest.mark.parametrize("impl", ["torch", COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_error(dtype: torch.dtype, impl: str) -> None:
    """At most half of the last of four significant bits, or half a subnormal step."""
    N, Hq, Hkv, E = 9, 4, 2, 64
    plain, t = (tokens(N, Hq, Hkv, E, dtype, device(impl), fp8=fp8, scale=30) for fp8 in (False, True))
    plain.run("torch"), t.run(impl)
    for name in ("key", "value"):
        expected = getattr(plain, f"{name}s")[t.slots].float()
        stored, scales = getattr(t, f"{name}s")[t.slots].float(), getattr(t, f"{name}_scales")[t.slots]
        torch.testing.assert_close(scales, expected.abs().amax(-1) / 448, rtol=RELATIVE[dtype], atol=0)
        assert (stored.abs().amax(-1) == 448).all()
        error = (stored * scales[..., None] - expected).abs()
        assert (error <= 1.001 * (2**-4 * expected.abs()).maximum(2**-10 * scales[..., None])).all()
        assert error.mean() > 0.01 * expected.abs().mean()


def test_float8_scales_are_a_division() -> None:
    """On a GPU, a tensor / Python number is a product with the rounded reciprocal, which may be one bit off."""

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), options: Any = None) -> Any:
            if op.overloadpacket == torch.ops.aten.div:
                divisors.append(args[1])
            return op(*args, **(options or {}))

    divisors: list[Any] = []
    with Divisions():
        quantize_fp8(torch.ones(2, 3, 4))
    assert len(divisors) == 2 and all(isinstance(x, Tensor) for x in divisors)


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_float8_rounds_to_nearest(impl: str) -> None:
    """float8 holds 16, 18 and 20. Truncation would never give 20, nor 18 for 17.9."""
    t = tokens(1, 1, 1, 8, torch.float32, device(impl), fp8=True)
    values = torch.tensor([448.0, 16.9, 17.1, 17.9, 18.9, 19.1, -17.1, -19.1])
    t.qkv[0, 16:] = values.to(t.qkv)
    t.run(impl)
    assert t.values[t.slots[0], 0].float().tolist() == [448, 16, 18, 18, 18, 20, -18, -20]
    assert t.value_scales is not None and t.value_scales[t.slots[0]].tolist() == [1]


@gpu
@pytest.mark.triton
def test_a_gpu_stores_the_float8_of_the_reference() -> None:
    t = tokens(64, 16, 16, 128, torch.bfloat16, "cuda", fp8=True)
    eager = t.clone()
    t.run("triton"), eager.run("torch")
    assert t.value_scales is not None and eager.value_scales is not None
    assert torch.equal(t.values.view(torch.uint8), eager.values.view(torch.uint8))
    assert torch.equal(t.value_scales, eager.value_scales)


@gpu
@pytest.mark.triton
def test_a_captured_launch_follows_positions_and_slots() -> None:
    t = tokens(8, 16, 16, 128, torch.bfloat16, "cuda")
    qkv = t.qkv.clone()
    t.clone().run("triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with no_host_sync(), torch.cuda.graph(graph):
        q = t.run("triton")
    for shift in (1, 300):
        t.qkv.copy_(qkv)
        t.positions.add_(shift).remainder_(len(t.cos))
        t.slots.add_(shift).remainder_(len(t.keys))
        eager = t.clone()
        graph.replay()
        torch.testing.assert_close(q, eager.run("triton"), rtol=0, atol=0)
        torch.testing.assert_close(t.keys, eager.keys, rtol=0, atol=0)
        torch.testing.assert_close(t.values, eager.values, rtol=0, atol=0)


@pytest.mark.parametrize("impl", [NATIVE])
def test_threads_do_not_change_the_bits(impl: str) -> None:
    t = tokens(64, 8, 8, 128, torch.float32)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        own = t.clone()
        return own.run(impl), own.keys, own.values

    assert all(torch.equal(a, b) for a, b in zip(*on_threads(run, 1, 3), strict=True))


@pytest.mark.parametrize("impl", KERNELS)
def test_op(impl: str) -> None:
    torch.library.opcheck(_op, (*tokens(3, 4, 2, 8, torch.float32, device(impl)).arguments(), impl))


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_compiles_whole(impl: str) -> None:
    ours = tokens(3, 4, 2, 8, torch.float32)
    eager = ours.clone()

    def layer(t: Tokens) -> Tensor:
        q = rope_kv_write(*t.arguments(), impl=impl) * 2  # type: ignore[arg-type]
        return q.sum() + t.keys.sum()

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(ours), layer(eager), rtol=1e-5, atol=1e-5)
    for name in ("qkv", "keys", "values"):
        torch.testing.assert_close(getattr(ours, name), getattr(eager, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", NATIVE])
@pytest.mark.parametrize("name", ["positions", "slots"])
def test_out_of_range(name: str, impl: str) -> None:
    t = tokens(4, 2, 1, 8, torch.float32)
    getattr(t, name)[2] = 9999
    before = t.clone()
    with pytest.raises(IndexError, match="9999" if impl == "native" else "index"):
        t.run(impl)
    if impl == "native":
        assert torch.equal(t.qkv, before.qkv) and torch.equal(t.keys, before.keys)
        getattr(t, name)[2] = -1
        with pytest.raises(IndexError, match=rf"{name}\[2\] = -1"):
            t.run(impl)


def test_errors() -> None:
    t, fp8 = tokens(4, 4, 2, 8, torch.float32), tokens(4, 4, 2, 8, torch.float32, fp8=True)
    for bad, message in [
        (replace(t, keys=t.keys[0]), r"keys and values must be \[P, Hkv, E\]"),
        (replace(t, values=t.values[1:]), r"keys and values must be \[P, Hkv, E\]"),
        (replace(t, keys=t.keys[..., :7], values=t.values[..., :7]), "E even"),
        (replace(t, qkv=t.qkv[:, :32]), r"qkv must be \[N, \(Hq \+ 2·2\)·8\]"),
        (replace(t, qkv=t.qkv[:, :63]), r"qkv must be \[N, \(Hq \+ 2·2\)·8\]"),
        (replace(t, cos=t.cos[:, :3]), r"cos and sin must be \[L, 4\]"),
        (replace(t, sin=t.sin[1:]), r"cos and sin must be \[L, 4\]"),
        (replace(t, cos=t.cos.bfloat16()), "cos and sin must be torch.float32 as qkv"),
        (replace(t, positions=t.positions.int()), r"positions must be \[4\] int64"),
        (replace(t, slots=t.slots[1:]), r"slots must be \[4\] int64"),
        (replace(t, keys=t.keys.bfloat16()), "keys and values without scales must be torch.float32"),
        (replace(fp8, key_scales=None), "give both key_scales and value_scales, or neither"),
        (replace(fp8, keys=t.keys), "keys and values with scales must be torch.float8_e4m3fn"),
        (replace(fp8, key_scales=torch.zeros(10, 2)), r"scales must be \[11, 2\] float32"),
        (replace(fp8, value_scales=torch.zeros(11, 2, dtype=torch.float64)), r"scales must be \[11, 2\] float32"),
        (replace(t, slots=t.slots.to("meta")), "slots must be contiguous on cpu"),
        (replace(t, qkv=t.qkv.T.contiguous().T), "qkv must be contiguous on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad.run("auto")
    with pytest.raises(ValueError, match="it takes no float8 pool"):
        fp8.run("native")
    for name in ("qkv", "keys"):
        with pytest.raises(RuntimeError, match=r"forward only: call it under torch.no_grad\(\)"):
            replace(t, **{name: getattr(t, name).clone().requires_grad_()}).run("auto")
