"""cfg_sample as an op: greedy draws, log-probs, what may not change a draw, torch.compile, bad input, and a GPU."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from oracle import (
    NATIVE,
    assert_no_worse,
    compiles_nothing,
    device,
    gpu,
    no_host_sync,
)
from sampling import (
    GREEDY,
    INF,
    MARKS,
    TOLERANCE,
    TRUNCATED,
    assert_alike,
    dtypes,
    few,
    guided,
    kernels,
    log_probs,
    normals,
    sample,
)
from torch import Tensor

from bicot.kernels.cfg_sample import Draw, cfg_sample
from bicot.kernels.dispatch import INTERPRETED

pytestmark = MARKS


def grid(B: int, V: int, seed: int = 0) -> Tensor:
    """[B, V] float32 logits out of few values: nearly every maximum is tied."""
    return torch.randint(-4, 5, (B, V), generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.parametrize("temperature", [0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 3.0])
def test_top_k_1_is_argmax(temperature: float, impl: str) -> None:
    low = 1.5 + torch.rand(few(500) // 2, generator=torch.Generator().manual_seed(0)) / 2
    neighbours = torch.stack([low, torch.nextafter(low, torch.tensor(9.0))], dim=1)  # many are one float once scaled
    for z in (grid(few(64) // 2, 50), neighbours):
        for options in ({"top_k": 1}, {"top_p": 1e-9}):
            draw = sample(impl, z, None, temperature=temperature, **options, seed=5)
            assert draw.token.tolist() == [row.index(max(row)) for row in z.tolist()]


def test_temperature_0_is_argmax_of_the_guided_logits(impl: str) -> None:
    cond, uncond = grid(few(64), 50), grid(few(64), 50, seed=1)
    expected = [row.index(max(row)) for row in guided(cond, uncond, 5.0).tolist()]
    assert sample(impl, cond, uncond, guidance=5.0, **GREEDY).token.tolist() == expected != cond.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [1, 33, 1000])
def test_log_probs_are_those_of_the_whole_distributions(V: int, dtype: torch.dtype, impl: str) -> None:
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("float64 is PyTorch's")
    cond, uncond = normals(2, 4, V).to(dtype)
    for options in ({"guidance": 5.0, "temperature": 0.8, "top_k": 3, "top_p": 0.9}, {"guidance": 5.0, **GREEDY}):
        draw = sample(impl, cond, uncond, **options, seed=1)
        assert draw.logp_cond.dtype == draw.logp_guided.dtype == torch.promote_types(dtype, torch.float32)
        expected = log_probs(cond, uncond, draw.token, **options)
        for ours, logp, widens in zip(draw[1:], expected, (1, 4), strict=True):  # w widens the rounding
            torch.testing.assert_close(ours.double(), logp, rtol=0, atol=widens * TOLERANCE[dtype])


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 3 * x,
    "peaked": lambda x: x + 60 * (torch.arange(x.shape[1]) == x.shape[1] // 2),
    "flat": lambda x: 1e-3 * x,
    "negative": lambda x: -x.abs() - 20,
    "offset": lambda x: x + 1e4,
    "negative offset": lambda x: x - 1e4,
    "tied": lambda x: x.round(),
    "masked": lambda x: x.masked_fill((x < -1) & (torch.arange(x.shape[1]) > 0), -INF),
    "wide": lambda x: 1e4 * x,
    "last": lambda x: x + 30 * (torch.arange(x.shape[1]) == x.shape[1] - 1),
}


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [33, 4097] if INTERPRETED else [1, 33, 4097])
@pytest.mark.parametrize("kind", LOGITS)
def test_log_probs_are_no_worse_than_the_references(kind: str, V: int, dtype: torch.dtype, impl: str) -> None:
    cond, uncond = (LOGITS[kind](x / 2).to(dtype) for x in normals(2, 1 if INTERPRETED else 5, V))
    for guidance, temperature in ((1.0, 1.0), (5.0, 0.7), (5.0, 0.0)):
        options = {"guidance": guidance, "temperature": temperature}
        ours, eager = (sample(which, cond, uncond, **options, seed=2) for which in (impl, "torch"))
        assert torch.equal(ours.token, eager.token)
        # float64 may draw another token: the log-probs of this one
        for name, gt in zip(Draw._fields[1:], log_probs(cond, uncond, ours.token, **options), strict=True):
            assert_no_worse(name, getattr(ours, name), getattr(eager, name), gt, 1e-6, 1e-6)


class TestInvariance:
    def test_a_row_draws_the_same_wherever_and_with_whomever(self, impl: str) -> None:
        cond, uncond = normals(2, 9, 1000)
        offset = torch.arange(9) * 977 + (3 << 32)
        options = {"guidance": 3.0, "temperature": 0.9, "top_k": 300, "top_p": 0.99, "seed": 4}
        together = sample(impl, cond, uncond, **options, offset=offset)
        assert len(set(together.token.tolist())) > 4
        for order in ([8, 3, 5, 1, 0, 2, 4, 7, 6], [4], [6, 6, 2]):
            apart = sample(impl, cond[order], uncond[order], **options, offset=offset[order])
            assert all(torch.equal(a, t[order]) for a, t in zip(apart, together, strict=True))

    def test_seed_and_offset_decide_the_draw(self, impl: str) -> None:
        z, offset = torch.zeros(few(64), 5000), torch.arange(few(64))
        one, again = (sample(impl, z, None, seed=s, offset=offset).token for s in (9, torch.tensor(9)))
        assert torch.equal(one, again)
        for seed, counters in ((10, offset), (9 + (1 << 32), offset), (9, offset + 64), (9, offset + (1 << 32))):
            other = sample(impl, z, None, seed=seed, offset=counters).token
            assert (one == other).sum() <= 2  # each by a chance of 1 in 5000

    def test_guidance_1_is_the_conditional_draw(self, impl: str) -> None:
        cond, uncond = normals(2, few(20), 100)
        uncond[:, ::7], uncond[:, 1], uncond[2] = -INF, math.nan, -INF  # none of which is read
        options = {"temperature": 0.8, "top_p": 0.9, "seed": 2}
        alone = sample(impl, cond, None, **options)
        assert all(map(torch.equal, sample(impl, cond, uncond, guidance=1.0, **options), alone))
        assert torch.equal(alone.logp_cond, alone.logp_guided)
        assert not torch.equal(sample(impl, cond, cond.flip(0), guidance=2.0, **options).token, alone.token)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_logits_are_computed_in_float32(self, dtype: torch.dtype, impl: str) -> None:
        if dtype == torch.float16 and impl == "native":
            pytest.skip("the C++ kernel takes no float16")
        cond, uncond = normals(2, few(20), 500).to(dtype)
        options = {"guidance": 5.0, "temperature": 0.8, "top_k": 50, "seed": 2}
        ours, wide = sample(impl, cond, uncond, **options), sample(impl, cond.float(), uncond.float(), **options)
        assert_alike(ours, wide, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("shifts", [(1e4, 1e4), (-1e4, -1e4), (1e4, -1e4), (-1e4, 1e4)])
    def test_large_offsets_change_nothing(self, shifts: tuple[float, float], impl: str) -> None:
        cond, uncond = (normals(2, few(20), 100) * 64).round() / 64  # so that float32 holds every sum exactly
        for guidance in (1.0, 5.0):
            ours = sample(impl, cond + shifts[0], uncond + shifts[1], guidance=guidance, seed=2)
            assert_alike(ours, sample(impl, cond, uncond, guidance=guidance, seed=2), rtol=0)

    def test_a_token_masked_by_either_row_is_never_drawn(self, impl: str) -> None:
        cond, uncond = torch.zeros(2, few(500), 6)
        cond[:, 1], uncond[:, 4], cond[:, 5], uncond[:, 5] = -INF, -INF, -INF, -INF
        for options in ({}, {"top_k": 5}, {"top_p": 0.99}, GREEDY):
            for guidance in (0.0, 0.5, 5.0):
                draw = sample(impl, cond, uncond, guidance=guidance, **options, seed=2)
                assert set(draw.token.tolist()) == ({0} if options is GREEDY else {0, 2, 3})
                assert draw.logp_guided.isfinite().all()

    @dtypes
    def test_a_mask_is_that_of_the_draw_alone(self, dtype: torch.dtype, impl: str) -> None:
        cond, mask = normals(few(40), 300).to(dtype), torch.zeros(300, dtype=dtype)
        mask[::3] = mask[290:] = -INF
        for options in ({}, TRUNCATED, GREEDY):
            ours = sample(impl, cond, None, mask=mask, **options, seed=2)
            masked = sample(impl, cond + mask, None, **options, seed=2)
            assert (mask[ours.token] == 0).all()
            logp_cond = log_probs(cond, None, ours.token, **options)[0].float()
            torch.testing.assert_close(ours.logp_cond, logp_cond, rtol=0, atol=1e-5)
            assert_alike(ours._replace(logp_cond=masked.logp_cond), masked, rtol=0, atol=2e-6)

    def test_input_is_left_alone_gets_no_gradient_and_may_be_empty(self, impl: str) -> None:
        cond, uncond = (grid(4, 9, seed=s).to(device(impl)).requires_grad_() for s in (0, 1))
        before = cond.detach().clone(), uncond.detach().clone()
        options = {"guidance": 5.0, "top_k": 3, "top_p": 0.9, "seed": 0, "impl": impl}
        draw = cfg_sample(cond, uncond, **options, offset=torch.arange(4, device=device(impl)))
        assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])
        assert not draw.logp_cond.requires_grad and not draw.logp_guided.requires_grad
        for other in (None, torch.empty(0, 7)):
            draw = sample(impl, torch.empty(0, 7), other, guidance=5.0, top_k=3, top_p=0.9)
            assert draw.token.shape == draw.logp_cond.shape == draw.logp_guided.shape == (0,)

    @pytest.mark.parametrize("impl", [NATIVE])
    def test_threads_change_no_bit(self, impl: str) -> None:
        cond, uncond = normals(2, 7, 16385) / 2
        threads = torch.get_num_threads()
        draws = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                draws.append(sample(impl, cond, uncond, guidance=5.0, top_k=300, top_p=0.9))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for draw in draws[1:] for x, y in zip(draw, draws[0], strict=True))


class TestCompiler:
    @kernels
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype, impl: str) -> None:
        cond, uncond = torch.randn(2, 3, 33, device=device(impl)).to(dtype)
        seed, offset = torch.tensor(5, device=device(impl)), torch.arange(3, device=device(impl))
        for other, top_k, top_p in ((uncond, 0, 1.0), (None, 4, 0.9)):
            arguments = (cond, other, 5.0, 0.7, top_k, top_p, seed, offset, impl)
            torch.library.opcheck(torch.ops.bicot.cfg_sample.default, arguments)

    def test_compiles_to_one_graph(self, impl: str) -> None:
        torch._dynamo.reset()  # the implementations before this one count against its recompilations
        compiled = torch.compile(cfg_sample, fullgraph=True, backend="aot_eager")
        seed = torch.tensor(3, device=device(impl))
        truncated = {"top_k": 5, "top_p": 0.9}
        for B, options in ((4, {}), (4, {"temperature": 0.0}), (4, truncated), (6, truncated)):  # 6 stands for any B
            cond, uncond = (torch.randn(B, 50, device=device(impl)) for _ in range(2))
            options |= {"guidance": 5.0, "seed": seed, "offset": torch.arange(B, device=device(impl)), "impl": impl}
            assert_alike(compiled(cond, uncond, **options), cfg_sample(cond, uncond, **options))
        if device(impl) == "cpu":
            cond[2, 7] = math.nan
            with pytest.raises(ValueError, match="^cond logits of row 2 are not finite"):
                compiled(cond, uncond, **options)


def row_2(columns: slice, value: float) -> Tensor:
    """[4, 9] zeros but for some columns of row 2."""
    z = torch.zeros(4, 9)
    z[2, columns] = value
    return z


GOOD, LAST, ALL = torch.zeros(4, 9), slice(8, 9), slice(None)
HIDING = row_2(LAST, -INF)  # hides a bad logit from the guided ones
BAD_ROWS = [
    ("cond logits of row 2 .*every token masked", row_2(ALL, -INF), None),
    ("uncond logits of row 2 .*every token masked", row_2(slice(2), -INF), row_2(ALL, -INF)),
    ("guided logits of row 2 .*every token masked", row_2(slice(2), -INF), row_2(slice(2, 9), -INF)),
    ("guided logits of row 0 .*not finite", torch.full((4, 9), 3e38), torch.full((4, 9), -3e38)),  # the mix overflows
]
for _bad in (row_2(LAST, math.nan), row_2(LAST, INF)):
    BAD_ROWS += [("cond logits of row 2 are not finite", _bad, uncond) for uncond in (None, GOOD, HIDING)]
    BAD_ROWS += [("uncond logits of row 2 are not finite", cond, _bad) for cond in (GOOD, HIDING)]


@pytest.mark.parametrize(
    "options",
    # one truncation is enough for the interpreter, which is slow
    [{}, {"top_k": 5, "top_p": 0.9}, GREEDY, *([] if INTERPRETED else [{"top_k": 2}, {"top_p": 0.9}])],
)
def test_a_row_without_an_answer_is_named(options: dict, impl: str) -> None:
    if device(impl) == "cuda":
        pytest.skip("an assertion on the device")
    for (message, cond, uncond), guidance in itertools.product(BAD_ROWS, (5.0,) if INTERPRETED else (5.0, -1.0)):
        with pytest.raises(ValueError, match="^" + message):
            sample(impl, cond, uncond, guidance=guidance, **options)


@gpu
class TestOnAGpu:
    @pytest.mark.parametrize("impl", ["triton", "torch"])
    @pytest.mark.parametrize("bad", ["nan", "inf"])
    def test_a_bad_row_is_an_assertion_on_a_gpu(self, bad: str, impl: str) -> None:
        for value, fails in (("1.0", False), (bad, True)):
            script = f"""
import torch
from bicot.kernels.cfg_sample import cfg_sample
z = torch.zeros(4, 9, device="cuda")
z[2, 8] = float("{value}")
cfg_sample(z, z.flip(0), guidance=5.0, seed=0, offset=torch.arange(4, device="cuda"), impl="{impl}")
torch.cuda.synchronize()
"""
            # in a process of its own: a device-side assertion leaves CUDA unusable
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
            assert (result.returncode != 0) == fails, result.stderr
            assert ("device-side assert" in result.stderr) == fails

    def test_a_cuda_graph_draws_anew_with_each_replay(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        cond, uncond = torch.randn(2, 16, 16384, device="cuda", generator=generator).bfloat16()
        seed, offset = torch.tensor(3, device="cuda"), torch.arange(16, device="cuda")
        for options in ({}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0.0}):
            options |= {"guidance": 5.0, "seed": seed, "offset": offset, "impl": "triton"}
            cfg_sample(cond, uncond, **options)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                draw = cfg_sample(cond, uncond, **options)
            for step in range(3):
                seed.fill_(step)
                offset.add_(1)
                graph.replay()
                expected = cfg_sample(cond, uncond, **options)
                assert all(map(torch.equal, draw, expected))

    def test_nothing_waits_for_the_device_and_nothing_compiles_again(self) -> None:
        def step(B: int, V: int, seed: int, guidance: float, temperature: float, top_k: int, top_p: float) -> None:
            cond, uncond = torch.randn(2, B, V, device="cuda").bfloat16()
            options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            cfg_sample(cond, uncond, **options, seed=seed, offset=torch.arange(B, device="cuda"), impl="triton")

        step(16, 16384, 0, 5.0, 1.0, 50, 0.9)
        with compiles_nothing(), no_host_sync():
            step(7, 102400, 1, 3.0, 0.7, 1, 1e-9)
            step(300, 256, 2**40, 0.0, 1.3, 16, 0.5)

    def test_more_elements_than_a_32_bit_offset_reaches(self) -> None:
        B, V = 24_000, 102_400  # 2.5e9 logits, 4.9 GB
        cond = torch.randn(B, V, device="cuda", dtype=torch.bfloat16)
        ours = cfg_sample(cond, None, seed=0, offset=torch.arange(B, device="cuda"), impl="triton")
        last = cfg_sample(cond[-3:], None, seed=0, offset=torch.arange(B - 3, B, device="cuda"), impl="torch")
        assert torch.equal(ours.token[-3:], last.token)
        torch.testing.assert_close(ours.logp_cond[-3:], last.logp_cond, rtol=1e-6, atol=1e-5)


Z, OFFSET = torch.zeros(2, 5), torch.arange(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond": Z[0]}, r"cond \[B, V\] \(5,\), uncond None and offset \[B\] \(2,\) differ"),
        ({"uncond": Z[:1]}, r"cond \[B, V\] \(2, 5\), uncond \(1, 5\) and offset \[B\] \(2,\) differ"),
        ({"offset": OFFSET[:1]}, r"cond \[B, V\] \(2, 5\), uncond None and offset \[B\] \(1,\) differ"),
        ({"offset": OFFSET.int()}, "offset must be int64 counters, got torch.int32"),
        ({"temperature": -0.1}, r"out of range: .*temperature=-0.1 \(>= 0, finite\)"),
        ({"temperature": math.nan}, "out of range: .*temperature=nan"),
        ({"temperature": INF}, "out of range: .*temperature=inf"),
        ({"top_k": -1}, r"out of range: .*top_k=-1 \(>= 0\)"),
        ({"top_p": 0.0}, r"out of range: .*top_p=0.0 \(0, 1\]"),
        ({"top_p": 1.1}, "out of range: .*top_p=1.1"),
        ({"top_p": math.nan}, "out of range: .*top_p=nan"),
        ({"uncond": Z, "guidance": math.nan}, r"out of range: guidance=nan \(finite\)"),
        ({"cond": Z[:, :1].expand(2, 2**23)}, "a vocabulary has 1 to 8388607 tokens, got V = 8388608"),
        ({"cond": torch.zeros(2, 0)}, "a vocabulary has 1 to 8388607 tokens, got V = 0"),
        ({"uncond": Z.bfloat16()}, r"must share a floating dtype, got \[torch.float32, torch.bfloat16\]"),
        ({"cond": Z.long()}, r"must share a floating dtype, got \[torch.int64\]"),
        ({"offset": OFFSET.to("meta")}, r"must share a device, got \['cpu', 'meta'\]"),
        ({"seed": torch.zeros(2).long()}, r"seed must be an int or one int64, got \(2,\) torch.int64"),
        ({"seed": torch.tensor(1.0)}, r"seed must be an int or one int64, got \(\) torch.float32"),
        ({"cond": Z.double(), "impl": "native"}, 'impl="native" cannot run here'),
        ({"impl": "cuda"}, 'impl must be "auto"'),
        ({"uncond": Z, "mask": Z[0]}, r"mask must be \[V\] = \[5\], without uncond, got \[5\]"),
        ({"mask": Z}, r"mask must be \[V\] = \[5\], without uncond, got \[2, 5\]"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg_sample(**{"cond": Z, "uncond": None, "seed": 0, "offset": OFFSET, **options})
