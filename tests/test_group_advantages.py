"""group_advantages against TRL's formulas in Python floats, where a missing reward counts as its group's mean.

The kernel runs in float32, the reference also in float64.
"""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CUDA, TRITON, device, poisoned_outputs
from torch import Tensor

from bicot.kernels.group_advantages import Combine, Scale, group_advantages

EPS = 1e-4
NAN = math.nan
OPTIONS: list[tuple[Scale, Combine]] = list(
    product(["group", "batch", "none"], ["sum_then_normalize", "normalize_then_sum"])
)
IMPLEMENTATIONS = ["torch", TRITON]
# dtype and absolute tolerance for rewards with a std near 1: division by std + eps turns float32's 6e-8 into a few 1e-6
PRECISION = {"torch": (torch.float64, 1e-10), "triton": (torch.float32, 1e-5)}
everywhere = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_option = pytest.mark.parametrize(("scale", "combine"), OPTIONS)


def mean(values: list[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return math.fsum(present) / len(present) if present else NAN


def std(values: list[float]) -> float:
    present, center = [v for v in values if not math.isnan(v)], mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in present) / (len(present) - 1)) if len(present) > 1 else 0.0


def filled(column: list[float], G: int) -> list[float]:
    """Missing rewards replaced by the mean of their group, or by the mean of all samples if the group has none."""
    result = []
    for start in range(0, len(column), G):
        group = column[start : start + G]
        neutral = mean(group) if not math.isnan(mean(group)) else mean(column)
        result += [(0.0 if math.isnan(neutral) else neutral) if math.isnan(v) else v for v in group]
    return result


def oracle(rewards: Tensor, G: int, weights: list[float], scale: Scale, combine: Combine) -> list[float]:
    columns, S = [[float(v) for v in column] for column in rewards.T], len(rewards)
    scored = [any(w != 0 and not math.isnan(c[s]) for w, c in zip(weights, columns, strict=True)) for s in range(S)]
    starts = range(0, S, G)
    if combine == "normalize_then_sum":
        for i, c in enumerate(columns):
            groups = [c[start : start + G] for start in starts]
            columns[i] = [0.0 if math.isnan(v) else (v - mean(g)) / (std(g) + EPS) for g in groups for v in g]
    else:
        columns = [filled(column, G) for column in columns]
    x = [math.fsum(w * c[s] for w, c in zip(weights, columns, strict=True)) if scored[s] else NAN for s in range(S)]
    if combine == "normalize_then_sum":
        advantages = [(v - mean(x)) / (std(x) + EPS) for v in x]
    else:
        advantages = []
        for group in (x[start : start + G] for start in starts):
            divisor = {"group": std(group) + EPS, "batch": std(x) + EPS, "none": 1.0}[scale]
            advantages += [(v - mean(group)) / divisor for v in group]
    return [0.0 if math.isnan(v) else v for v in advantages]


def run(rewards: Tensor, G: int, weights: object = None, *, impl: str, **options: object) -> Tensor:
    with poisoned_outputs():
        ours = group_advantages(rewards.to(device(impl)), G, weights, impl=impl, **options)  # type: ignore[arg-type]
    assert ours.device.type == device(impl) and not ours.requires_grad
    return ours.cpu()


def check(
    rewards: Tensor, G: int, weights: list[float] | None, scale: Scale, combine: Combine, atol: float, impl: str
) -> None:
    ours = run(rewards, G, weights, scale=scale, combine=combine, impl=impl).double()
    expected = oracle(rewards, G, weights or [1.0] * rewards.shape[1], scale, combine)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def random_rewards(S: int, R: int, dtype: torch.dtype, missing: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(S, R, generator=generator, dtype=torch.float64) + torch.arange(R)
    return rewards.masked_fill(torch.rand(S, R, generator=generator) < missing, NAN).to(dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, list[float]]:
    """(rewards [S, R] float64, G, weights), with equal rewards and missing ones among them."""
    P, G, R = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    value = st.floats(-10, 10) | st.sampled_from([0.0, 0.1, 1.0, NAN])
    rewards = draw(st.lists(st.lists(value, min_size=R, max_size=R), min_size=P * G, max_size=P * G))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=R, max_size=R))
    return torch.tensor(rewards, dtype=torch.float64), G, weights


@settings(max_examples=60)
@given(problems(), st.sampled_from(OPTIONS), st.randoms(), st.floats(-100, 100))
def test_equals_the_oracle_in_any_order_at_any_level(
    problem: tuple, options: tuple[Scale, Combine], random: object, shift: float
) -> None:
    rewards, G, weights = problem
    scale, combine = options
    check(
        rewards, G, weights, scale, combine, 1e-9, "torch"
    )  # at worst, the rounding error of rewards of 10 is divided by eps
    ours = group_advantages(rewards, G, weights, scale=scale, combine=combine)
    if combine == "sum_then_normalize" and scale != "batch":
        assert ours.view(-1, G).sum(1).abs().max() < 1e-9
    order = [p * G + i for p in range(len(rewards) // G) for i in random.sample(range(G), G)]  # type: ignore[attr-defined]
    shifts = shift * torch.arange(1.0, rewards.shape[1] + 1, dtype=torch.float64)
    if scale != "batch":  # which depends on the differences between prompts
        shifts = shifts * torch.arange(len(rewards) // G).repeat_interleave(G)[:, None]
    other = group_advantages((rewards + shifts)[order], G, weights, scale=scale, combine=combine)
    torch.testing.assert_close(other, ours[order], rtol=0, atol=1e-7)


@each_option
@pytest.mark.parametrize("unit", [1e-3, 1e6])
def test_without_eps_the_unit_of_the_rewards_does_not_matter(unit: float, scale: Scale, combine: Combine) -> None:
    if scale == "none":
        return
    rewards = random_rewards(24, 3, torch.float64, missing=0.2)
    ours, expected = (group_advantages(u * rewards, 8, scale=scale, combine=combine, eps=1e-14) for u in (unit, 1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@everywhere
@each_option
def test_several_weighted_rewards(scale: Scale, combine: Combine, impl: str) -> None:
    for missing, dtype in product([0.0, 0.3], {torch.float32, PRECISION[impl][0]}):
        atol = 1e-5 if dtype == torch.float32 else 1e-10
        rewards = random_rewards(24, 3, dtype, missing)
        check(rewards, 8, [1.0, 0.5, 2.0], scale, combine, atol, impl)
        check(rewards, 6, None, scale, combine, atol, impl)


@everywhere
@each_option
@pytest.mark.parametrize(("P", "G", "R"), [(131, 8, 3), (1027, 1, 2), (3, 300, 5)])
def test_many_groups_and_large_ones(P: int, G: int, R: int, scale: Scale, combine: Combine, impl: str) -> None:
    rewards = random_rewards(P * G, R, torch.float32, missing=0.2) + torch.arange(P).repeat_interleave(G)[:, None]
    rewards[: P // 2 * G, 0] = NAN
    rewards[-G:] = NAN
    check(rewards, G, [1.0, 0.5, -2.0, 0.0, 1.0][:R], scale, combine, 2e-5, impl)


@everywhere
@each_option
def test_a_tiny_spread_at_a_large_offset(scale: Scale, combine: Combine, impl: str) -> None:
    # multiples of float32's step at 1e6, so that the inputs are exact: E[x²] - E[x]² would be noise of 1e5 here
    rewards = 1e6 + 0.0625 * torch.randint(0, 9, (24, 2), generator=torch.Generator().manual_seed(0)).float()
    check(rewards, 8, [1.0, 0.25], scale, combine, 1e-5, impl)
    rewards[:8, 0] = NAN  # the whole group counts as the mean of all samples, which float32 rounds
    check(rewards, 8, [1.0, 0.25], scale, combine, 1e-5, impl)


@everywhere
@each_option
def test_equal_rewards_give_exactly_zero(scale: Scale, combine: Combine, impl: str) -> None:
    options = {"scale": scale, "combine": combine, "impl": impl}
    for G, eps in product([1, 3, 7, 8], [EPS, 0.0]):
        for values in ([0.35, 0.1], [0.7, 1 / 3], [1e6 + 0.1, -7.7], [NAN, 0.7]):
            rewards = torch.tensor([values, [0.3, NAN]]).repeat_interleave(G, dim=0)
            assert run(rewards, G, [0.7, 1.1], eps=eps, **options).eq(0).all()
    rewards = torch.full((8, 2), 0.3)
    rewards[:4, 0] = torch.arange(4.0)
    ours = run(rewards, 4, eps=0.0, **options).double()
    expected = run(rewards.double(), 4, eps=0.0, **{**options, "impl": "torch"})
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@everywhere
def test_two_samples(impl: str) -> None:
    ours = run(torch.tensor([1.0, 3.0]), 2, impl=impl)
    torch.testing.assert_close(ours, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + EPS))


@everywhere
class TestMissing:
    @each_option
    def test_moves_no_advantage(self, impl: str, scale: Scale, combine: Combine) -> None:
        options = {"scale": scale, "combine": combine, "impl": impl}
        # the first reward is 0.9 for all samples that have it; counted as 0, it would punish the others
        rewards = torch.tensor([[0.9, 0.5], [NAN, 0.5], [0.9, 0.5], [NAN, 0.5]])
        assert run(rewards, 4, **options).eq(0).all()
        dtype, atol = PRECISION[impl]
        gap, mean_there = (random_rewards(8, 2, dtype) for _ in range(2))
        gap[2, 1], mean_there[2, 1] = NAN, gap[[0, 1, 3], 1].mean()
        if combine == "sum_then_normalize":
            torch.testing.assert_close(run(gap, 4, **options), run(mean_there, 4, **options), rtol=0, atol=atol)

    def test_in_a_whole_group(self, impl: str) -> None:
        dtype, atol = PRECISION[impl]
        rewards = random_rewards(8, 2, dtype)
        rewards[:4, 0] = NAN
        ours = run(rewards, 4, impl=impl)
        torch.testing.assert_close(ours[:4], run(rewards[:4, 1], 4, impl=impl), rtol=0, atol=atol)
        torch.testing.assert_close(ours[4:], run(rewards[4:], 4, impl=impl), rtol=0, atol=atol)
        rewards = torch.tensor(
            [[0.9, 1.0], [0.9, 2.0], [NAN, 1.0], [NAN, 2.0]]
        )  # nor does it change the std of all samples
        ours = run(rewards, 2, scale="batch", impl=impl)
        torch.testing.assert_close(ours, run(rewards[:, 1], 2, scale="batch", impl=impl))

    @each_option
    def test_all_rewards_of_a_sample(self, impl: str, scale: Scale, combine: Combine) -> None:
        dtype, atol = PRECISION[impl]
        rewards = random_rewards(5, 2, dtype)
        gap = torch.cat([rewards, torch.full((1, 2), NAN, dtype=dtype)])
        ours = run(gap, 6, scale=scale, combine=combine, impl=impl)
        assert ours[5] == 0
        expected = run(rewards, 5, scale=scale, combine=combine, impl=impl)
        torch.testing.assert_close(ours[:5], expected, rtol=0, atol=atol)
        assert run(torch.full((4, 2), NAN), 2, scale=scale, combine=combine, impl=impl).eq(0).all()

    def test_does_not_change_the_order_of_the_others(self, impl: str) -> None:
        rewards = torch.tensor([[3.0, 0.0], [1.0, 0.5], [NAN, 1.0], [2.0, 0.2]])
        ours = run(rewards, 4, impl=impl)
        assert ours[[0, 3, 1]].argsort(descending=True).tolist() == [0, 1, 2]  # by 3.0, 2.2, 1.5
        torch.testing.assert_close(ours[0] - ours[3], (ours[3] - ours[1]) * 0.8 / 0.7)


@everywhere
@each_option
def test_a_reward_of_weight_0_is_only_monitored(scale: Scale, combine: Combine, impl: str) -> None:
    rewards = random_rewards(8, 2, torch.float32)
    rewards[3, 1] = NAN  # this sample has only the monitored reward
    kept = run(rewards[:, 1], 4, scale=scale, combine=combine, impl=impl)
    for monitored in (rewards[:, 0], 100 * rewards[:, 0], torch.full((8,), NAN)):
        both = torch.stack([monitored, rewards[:, 1]], dim=1)
        ours = run(both, 4, [0.0, 1.0], scale=scale, combine=combine, impl=impl)
        # with another number of rewards, the Triton kernel may sum in another order
        torch.testing.assert_close(ours, kept, rtol=0, atol=2e-6 if impl == "triton" else 0)
    assert kept[3] == 0 and kept.ne(0).sum() == 7


@everywhere
@each_option
def test_one_sample_and_none(scale: Scale, combine: Combine, impl: str) -> None:
    if combine == "sum_then_normalize":
        assert run(torch.tensor([1.0, 5.0, -2.0]), 1, scale=scale, impl=impl).eq(0).all()
    assert run(torch.tensor([[5.0]]), 1, scale=scale, combine=combine, impl=impl).tolist() == [0]
    assert run(torch.empty(0, 2), 4, scale=scale, combine=combine, impl=impl).shape == (0,)
    assert run(torch.empty(4, 0), 4, scale=scale, combine=combine, impl=impl).tolist() == [0] * 4


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_dtype_and_weights_as_a_tensor(dtype: torch.dtype, impl: str) -> None:
    rewards = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype == torch.float64 and impl != "torch":
        with pytest.raises(ValueError, match=f'impl="{impl}" cannot run here: it takes .*, got torch.float64'):
            run(rewards, 2, impl=impl)
        impl = "auto"
    ours = run(rewards, 2, torch.tensor([1, 2]), impl=impl)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, run(rewards.to(wide), 2, [1.0, 2.0], impl=impl), rtol=0, atol=0)


@everywhere
@each_option
def test_strided_input_stays_as_it_is_and_gets_no_gradient(scale: Scale, combine: Combine, impl: str) -> None:
    rewards = random_rewards(8, 3, torch.float32, missing=0.3).to(device(impl)).requires_grad_()
    weights = torch.tensor([1.0, 9.0, 0.5, 9.0, 2.0, 9.0], requires_grad=True, device=device(impl))[::2]
    before, options = rewards.detach().clone(), {"scale": scale, "combine": combine, "impl": impl}
    strided = torch.stack([rewards.T, rewards.T + 1], dim=2)[..., 0].T
    assert not strided.is_contiguous() and not weights.is_contiguous()
    ours = run(strided, 4, weights, **options)
    torch.testing.assert_close(ours, run(rewards, 4, [1.0, 0.5, 2.0], **options), rtol=0, atol=0)
    torch.testing.assert_close(rewards.detach(), before, equal_nan=True, rtol=0, atol=0)


@everywhere
@pytest.mark.parametrize("scale", ["group", "none"])
def test_groups_are_independent(scale: Scale, impl: str) -> None:
    rewards = random_rewards(24, 3, torch.float32, missing=0.2)
    alone = torch.cat([run(group, 8, scale=scale, impl=impl) for group in rewards.split(8)])
    # a GPU may sum in another order with more groups
    torch.testing.assert_close(run(rewards, 8, scale=scale, impl=impl), alone, rtol=0, atol=2e-6 if CUDA else 0)


@pytest.mark.parametrize("impl", [TRITON])
def test_opcheck(impl: str) -> None:
    rewards, weights = (x.to(device(impl)) for x in (random_rewards(8, 3, torch.float32, missing=0.3), torch.ones(3)))
    for options in (("batch", "sum_then_normalize"), ("none", "normalize_then_sum")):
        torch.library.opcheck(torch.ops.bicot.group_advantages.default, (rewards, 4, weights, *options, EPS))


@everywhere
def test_compiles_to_one_graph(impl: str) -> None:
    torch._dynamo.reset()  # compilations for other implementations count towards the limit
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    for S in (8, 12):  # the second with S unknown to the compiler
        rewards = random_rewards(S, 2, torch.float32, missing=0.2).to(device(impl))
        for weights in (None, [1.0, 0.5], torch.tensor([1.0, 0.5])):
            ours = compiled(rewards, 4, weights, scale="batch", impl=impl)
            torch.testing.assert_close(ours.cpu(), run(rewards, 4, weights, scale="batch", impl=impl))
    rewards[5] = math.inf
    if not rewards.is_cuda:
        with pytest.raises((ValueError, RuntimeError), match="infinite reward"):
            compiled(rewards, 4, None, scale="batch", impl=impl)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_infinite_reward_is_an_assertion_on_a_gpu(impl: str) -> None:
    for value, fails in ((2.0, False), (math.inf, True)):
        script = f"""
import torch
from bicot.kernels.group_advantages import group_advantages
group_advantages(torch.tensor([0.0, 1.0, float("{value}"), 2.0], device="cuda"), 2, impl="{impl}")
torch.cuda.synchronize()
"""
        # in a process of its own: a device-side assertion leaves CUDA unusable
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (result.returncode != 0) == fails, result.stderr
        assert ("device-side assert" in result.stderr) == fails


LAST_INFINITE = torch.tensor([[0.0, NAN, 1.0]] * 7 + [[0.0, NAN, -math.inf]])


@pytest.mark.parametrize(
    ("rewards", "group_size", "kwargs", "message"),
    [
        (torch.zeros(2, 3, 4), 2, {}, r"rewards must be \[S, R\] or \[S\], got shape \(2, 3, 4\)"),
        (torch.zeros(7), 2, {}, "7 rewards cannot be split into groups of group_size=2"),
        (torch.zeros(7), 0, {}, "7 rewards cannot be split into groups of group_size=0"),
        (torch.zeros(4, 2), 2, {"weights": [1.0]}, "1 weights for 2 rewards"),
        (torch.zeros(4, 2), 2, {"weights": torch.ones(2, 2)}, "4 weights for 2 rewards"),
        (torch.zeros(4), 2, {"eps": -1.0}, "eps=-1.0 must be at least 0"),
        (torch.zeros(4), 2, {"eps": math.nan}, "eps=nan must be at least 0"),
        (torch.zeros(4), 2, {"scale": "groups"}, "scale='groups' is unknown; use 'group', 'batch' or 'none'"),
        (torch.zeros(4), 2, {"combine": "sum"}, "combine='sum' is unknown; use 'sum_then_normalize' or"),
        (torch.zeros(4), 2, {"impl": "native"}, 'impl="native" cannot run here: there is no C\\+\\+ kernel; use'),
        (torch.tensor([0, 1, math.inf, 2]), 2, {}, "infinite reward for sample 2; NaN means missing"),
        (torch.tensor([0, -math.inf, 1, 2]), 2, {}, "infinite reward for sample 1; NaN means missing"),
        (LAST_INFINITE, 4, {"weights": [1.0, 1.0, 0.0]}, "infinite reward for sample 7; NaN means missing"),
    ],
)
def test_bad_input_is_named(rewards: Tensor, group_size: int, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group_size, **kwargs)
