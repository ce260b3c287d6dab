"""group_advantages against TRL's formulas in plain Python floats, with a missing reward at its group's mean; and its
kernels against the reference, which is the only one that takes float64.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CUDA, IMPLEMENTATIONS, KERNELS, assert_no_worse, device, poisoned_outputs
from torch import Tensor

from bicot.kernels.group_advantages import Combine, Scale, group_advantages

# absolute, for rewards spread over about 1; the division by std + eps carries float32's 6e-8 up to a few 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# the kernels take float32; what is exact in the reference is exact in them too
PRECISION = {"torch": (torch.float64, 1e-12), "native": (torch.float32, 2e-6), "triton": (torch.float32, 2e-6)}
ROUNDINGS = 4  # of float32, in units of the spread of the rewards, by which a kernel may be worse than the reference
EPS = 1e-4
NAN = math.nan
SCALES: list[Scale] = ["group", "batch", "none"]
COMBINES: list[Combine] = ["sum_then_normalize", "normalize_then_sum"]


def mean(values: list[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return math.fsum(present) / len(present) if present else NAN


def std(values: list[float]) -> float:
    present, center = [v for v in values if not math.isnan(v)], mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in present) / (len(present) - 1)) if len(present) > 1 else 0.0


def filled(column: list[float], G: int) -> list[float]:
    """Missing rewards replaced by their group's mean, or by the batch's where the group has none."""
    result = []
    for start in range(0, len(column), G):
        group = column[start : start + G]
        neutral = mean(group) if not math.isnan(mean(group)) else mean(column)
        result += [(0.0 if math.isnan(neutral) else neutral) if math.isnan(v) else v for v in group]
    return result


def run(rewards: Tensor, G: int, weights: object = None, *, impl: str, **options: object) -> Tensor:
    ours = group_advantages(rewards.to(device(impl)), G, weights, impl=impl, **options)  # type: ignore[arg-type]
    assert ours.device.type == device(impl) and not ours.requires_grad
    return ours.cpu()


def oracle(
    rewards: Tensor, G: int, weights: list[float], scale: Scale, combine: Combine, eps: float
) -> tuple[list[float], list[float]]:
    """The advantages, and the condition of each: how far it moves when a reward moves by the spread of its group.

    Weights may cancel rewards that spread over 1 down to an x of 1e-7, which a small std + eps then divides: such an
    advantage is far from exact in any float32 computation, and the condition says how far.
    """
    columns = [[float(v) for v in column] for column in rewards.T]
    S = len(rewards)
    scored = [any(w != 0 and not math.isnan(c[s]) for w, c in zip(weights, columns, strict=True)) for s in range(S)]

    def total(columns: list[list[float]]) -> list[float]:
        return [
            math.fsum(w * c[s] for w, c in zip(weights, columns, strict=True)) if scored[s] else NAN for s in range(S)
        ]

    def width(columns: list[list[float]], begin: int, end: int) -> float:
        present = [[v for v in column[begin:end] if not math.isnan(v)] for column in columns]
        return math.fsum(abs(w) * (max(p) - min(p)) for w, p in zip(weights, present, strict=True) if p)

    advantages, conditions = [], []
    if combine == "normalize_then_sum":
        z = []
        for column in columns:
            z.append([])
            for start in range(0, S, G):
                group = column[start : start + G]
                z[-1] += [0.0 if math.isnan(v) else (v - mean(group)) / (std(group) + eps) for v in group]
        x, divisor = total(z), std(total(z)) + eps
        advantages = [(v - mean(x)) / divisor for v in x]
        for start in range(0, S, G):
            group = advantages[start : start + G]
            conditions += [(width(z, start, start + G) + (1 + abs(a)) * width(z, 0, S)) / divisor for a in group]
    else:
        columns = [filled(column, G) for column in columns]
        x = total(columns)
        for start in range(0, S, G):
            group = x[start : start + G]
            divisor = {"group": std(group) + eps, "batch": std(x) + eps, "none": 1.0}[scale]
            advantages += [(v - mean(group)) / divisor for v in group]
            around = {"group": width(columns, start, start + G), "batch": width(columns, 0, S), "none": 0.0}[scale]
            own = width(columns, start, start + G)
            conditions += [(own + abs(a) * around) / divisor for a in advantages[-G:]]
    return [0.0 if math.isnan(v) else v for v in advantages], [0.0 if math.isnan(v) else v for v in conditions]


def check(
    rewards: Tensor,
    G: int,
    weights: list[float] | None,
    scale: Scale,
    combine: Combine,
    atol: float,
    impl: str = "torch",
) -> None:
    ours = run(rewards, G, weights, scale=scale, combine=combine, impl=impl)
    expected, _ = oracle(rewards, G, weights or [1.0] * rewards.shape[1], scale, combine, EPS)
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def random_rewards(S: int, R: int, dtype: torch.dtype, missing: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(S, R, generator=generator, dtype=torch.float64) + torch.arange(R)
    return rewards.masked_fill(torch.rand(S, R, generator=generator) < missing, NAN).to(dtype)


@st.composite
def problems(draw: st.DrawFn, missing: bool = True) -> tuple[Tensor, int, list[float]]:
    """(rewards [S, R] float64, G, weights), with equal rewards and missing ones among them."""
    P, G, R = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    value = st.floats(-10, 10) | st.sampled_from([0.0, 0.1, 1.0] + [NAN] * missing)
    rewards = draw(st.lists(st.lists(value, min_size=R, max_size=R), min_size=P * G, max_size=P * G))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=R, max_size=R))
    return torch.tensor(rewards, dtype=torch.float64), G, weights


anything = settings(deadline=None, max_examples=60)
options = {"scale": st.sampled_from(SCALES), "combine": st.sampled_from(COMBINES)}


@anything
@given(problems(), options["scale"], options["combine"])
def test_equals_the_oracle_anywhere(problem: tuple, scale: Scale, combine: Combine) -> None:
    rewards, G, weights = problem
    check(rewards, G, weights, scale, combine, 1e-9)  # rounding of rewards of 10, divided by eps at worst


@anything
@given(problems(), st.sampled_from(["group", "none"]))
def test_a_group_sums_to_zero(problem: tuple, scale: Scale) -> None:
    rewards, G, weights = problem
    sums = group_advantages(rewards, G, weights, scale=scale).view(-1, G).sum(1)
    assert sums.abs().max() < 1e-9


@anything
@given(problems(), st.randoms(), options["scale"], options["combine"])
def test_order_within_a_group_does_not_matter(problem: tuple, random: object, scale: Scale, combine: Combine) -> None:
    rewards, G, weights = problem
    order = [p * G + i for p in range(len(rewards) // G) for i in random.sample(range(G), G)]  # type: ignore[attr-defined]
    ours = group_advantages(rewards[order], G, weights, scale=scale, combine=combine)
    expected = group_advantages(rewards, G, weights, scale=scale, combine=combine)[order]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@anything
@given(problems(), st.floats(-100, 100), options["scale"], options["combine"])
def test_shifting_a_reward_changes_nothing(problem: tuple, shift: float, scale: Scale, combine: Combine) -> None:
    rewards, G, weights = problem
    shifts = shift * torch.arange(1.0, rewards.shape[1] + 1, dtype=torch.float64)
    if scale != "batch":  # whose spread sees the differences between prompts
        shifts = shifts * torch.arange(len(rewards) // G).repeat_interleave(G)[:, None]
    ours = group_advantages(rewards + shifts, G, weights, scale=scale, combine=combine)
    expected = group_advantages(rewards, G, weights, scale=scale, combine=combine)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("unit", [1e-3, 7.0, 1e6])
def test_without_eps_the_unit_of_the_rewards_does_not_matter(unit: float, scale: Scale, combine: Combine) -> None:
    rewards = random_rewards(24, 3, torch.float64, missing=0.2)
    ours = group_advantages(unit * rewards, 8, scale=scale, combine=combine, eps=1e-14)
    expected = group_advantages(rewards, 8, scale=scale, combine=combine, eps=1e-14)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_several_weighted_rewards(missing: float, scale: Scale, combine: Combine, impl: str) -> None:
    for dtype in [torch.float32] + [torch.float64] * (impl == "torch"):
        rewards = random_rewards(24, 3, dtype, missing)
        check(rewards, 8, [1.0, 0.5, 2.0], scale, combine, TOLERANCE[dtype], impl)
        check(rewards, 6, None, scale, combine, TOLERANCE[dtype], impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_samples_are_half_their_distance_over_an_unbiased_std(impl: str) -> None:
    ours = run(torch.tensor([1.0, 3.0]), 2, impl=impl)
    torch.testing.assert_close(ours, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + EPS))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_tiny_spread_on_a_large_offset_survives(scale: Scale, combine: Combine, impl: str) -> None:
    # multiples of float32's step at 1e6, so that the inputs are exact: E[x²] - E[x]² would be noise of 1e5 here
    rewards = 1e6 + 0.0625 * torch.randint(0, 9, (24, 2), generator=torch.Generator().manual_seed(0)).float()
    check(rewards, 8, [1.0, 0.25], scale, combine, TOLERANCE[torch.float32], impl)
    rewards[:8, 0] = NAN  # a whole group at the batch's mean, which float32 cannot hold to the digit it takes
    check(rewards, 8, [1.0, 0.25], scale, combine, TOLERANCE[torch.float32], impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("G", [1, 3, 7])
def test_equal_rewards_are_exactly_zero(G: int, scale: Scale, combine: Combine, impl: str) -> None:
    for values in ([0.1, 1 / 3], [1e6 + 0.1, -7.7], [NAN, 0.7]):
        rewards = torch.tensor([values, [0.3, NAN]]).repeat_interleave(G, dim=0)
        assert run(rewards, G, [0.7, 1.1], scale=scale, combine=combine, impl=impl).eq(0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
class TestMissing:
    @pytest.mark.parametrize("scale", SCALES)
    def test_stands_at_its_groups_mean(self, impl: str, scale: Scale) -> None:
        dtype, atol = PRECISION[impl]
        rewards = random_rewards(8, 2, dtype)
        gap, mean_there = rewards.clone(), rewards.clone()
        gap[2, 1], mean_there[2, 1] = NAN, rewards[[0, 1, 3], 1].mean()
        ours, expected = (run(r, 4, scale=scale, impl=impl) for r in (gap, mean_there))
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)

    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_moves_no_sample_for_or_against(self, impl: str, scale: Scale, combine: Combine) -> None:
        # 0.9 for everybody whom it applies to: as 0 it would punish the two others
        rewards = torch.tensor([[0.9, 0.5], [NAN, 0.5], [0.9, 0.5], [NAN, 0.5]])
        assert run(rewards, 4, scale=scale, combine=combine, impl=impl).eq(0).all()

    def test_in_a_whole_group_leaves_the_other_reward(self, impl: str) -> None:
        dtype, atol = PRECISION[impl]
        rewards = random_rewards(8, 2, dtype)
        rewards[:4, 0] = NAN
        ours = run(rewards, 4, impl=impl)
        torch.testing.assert_close(ours[:4], run(rewards[:4, 1], 4, impl=impl), rtol=0, atol=atol)
        torch.testing.assert_close(ours[4:], run(rewards[4:], 4, impl=impl), rtol=0, atol=atol)

    def test_in_a_whole_group_does_not_widen_the_spread_of_the_batch(self, impl: str) -> None:
        rewards = torch.tensor([[0.9, 1.0], [0.9, 2.0], [NAN, 1.0], [NAN, 2.0]])
        ours = run(rewards, 2, scale="batch", impl=impl)
        torch.testing.assert_close(ours, run(rewards[:, 1], 2, scale="batch", impl=impl))

    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_every_reward_takes_the_sample_out(self, impl: str, scale: Scale, combine: Combine) -> None:
        dtype, atol = PRECISION[impl]
        rewards = random_rewards(5, 2, dtype)
        gap = torch.cat([rewards, torch.full((1, 2), NAN, dtype=dtype)])
        ours = run(gap, 6, scale=scale, combine=combine, impl=impl)
        assert ours[5] == 0
        expected = run(rewards, 5, scale=scale, combine=combine, impl=impl)
        torch.testing.assert_close(ours[:5], expected, rtol=0, atol=atol)
        nothing = torch.full((4, 2), NAN)
        assert run(nothing, 2, scale=scale, combine=combine, impl=impl).eq(0).all()

    def test_does_not_change_the_order_of_the_others(self, impl: str) -> None:
        rewards = torch.tensor([[3.0, 0.0], [1.0, 0.5], [NAN, 1.0], [2.0, 0.2]])
        ours = run(rewards, 4, impl=impl)
        assert ours[[0, 3, 1]].argsort(descending=True).tolist() == [0, 1, 2]  # by 3.0, 2.2, 1.5
        torch.testing.assert_close(ours[0] - ours[3], (ours[3] - ours[1]) * 0.8 / 0.7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_reward_of_weight_zero_only_watches(scale: Scale, combine: Combine, impl: str) -> None:
    rewards = random_rewards(8, 2, torch.float32)
    rewards[3, 1] = NAN  # scored by the watching reward alone
    kept = run(rewards[:, 1], 4, scale=scale, combine=combine, impl=impl)
    for watching in (rewards[:, 0], 100 * rewards[:, 0], torch.full((8,), NAN)):
        both = torch.stack([watching, rewards[:, 1]], dim=1)
        ours = run(both, 4, [0.0, 1.0], scale=scale, combine=combine, impl=impl)
        # another number of rewards is another tile of the Triton kernel, which may add in another order
        torch.testing.assert_close(ours, kept, rtol=0, atol=2e-6 if impl == "triton" else 0)
    assert kept[3] == 0 and kept.ne(0).sum() == 7


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_one_sample_alone_and_none_at_all(scale: Scale, combine: Combine, impl: str) -> None:
    if combine == "sum_then_normalize":
        assert run(torch.tensor([1.0, 5.0, -2.0]), 1, scale=scale, impl=impl).eq(0).all()
    assert run(torch.tensor([[5.0]]), 1, scale=scale, combine=combine, impl=impl).tolist() == [0]
    assert run(torch.empty(0, 2), 4, scale=scale, combine=combine, impl=impl).shape == (0,)
    assert run(torch.empty(4, 0), 4, scale=scale, combine=combine, impl=impl).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dtype_and_weights_as_a_tensor(given_dtype: torch.dtype, dtype: torch.dtype, impl: str) -> None:
    rewards = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]).to(given_dtype)
    if given_dtype == torch.float64 and impl != "torch":
        with pytest.raises(ValueError, match=f'impl="{impl}" cannot run here: it takes .*, got torch.float64'):
            run(rewards, 2, impl=impl)
        assert torch.equal(group_advantages(rewards, 2), run(rewards, 2, impl="torch"))
        return
    ours = run(rewards, 2, torch.tensor([1, 2]), impl=impl)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, run(rewards.to(dtype), 2, [1.0, 2.0], impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_input_is_left_alone_and_may_be_strided(impl: str) -> None:
    rewards = random_rewards(8, 3, torch.float32, missing=0.3).to(device(impl))
    weights = torch.tensor([1.0, 9.0, 0.5, 9.0, 2.0, 9.0]).to(device(impl))[::2]  # a copy to a GPU would lose strides
    before = rewards.clone()
    strided = torch.stack([rewards.T, rewards.T + 1], dim=2)[..., 0].T
    assert not strided.is_contiguous() and not weights.is_contiguous()
    for scale in SCALES:
        ours = run(strided, 4, weights, scale=scale, impl=impl)
        torch.testing.assert_close(ours, run(rewards, 4, [1.0, 0.5, 2.0], scale=scale, impl=impl), rtol=0, atol=0)
    torch.testing.assert_close(rewards, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient_flows(impl: str) -> None:
    rewards = random_rewards(8, 2, torch.float32).requires_grad_()
    weights = torch.ones(2, requires_grad=True)
    for scale in SCALES:
        run(rewards, 4, weights, scale=scale, impl=impl)  # asserts it


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_no_spread_and_no_eps_is_zero(scale: Scale, combine: Combine, impl: str) -> None:
    rewards = torch.full((8, 2), 0.3)
    assert run(rewards, 4, scale=scale, combine=combine, eps=0.0, impl=impl).eq(0).all()
    rewards[:4, 0] = torch.arange(4.0)
    ours = run(rewards, 4, scale=scale, combine=combine, eps=0.0, impl=impl)
    expected = run(rewards.double(), 4, scale=scale, combine=combine, eps=0.0, impl="torch")
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)


@st.composite
def noisy_problems(draw: st.DrawFn) -> tuple[Tensor, int, list[float]]:
    """(rewards [S, R] float32, G, weights): large offsets, tiny spreads, groups of one level, whole groups missing."""
    P, G, R = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def some(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    rewards = torch.randn(P, G, R, generator=generator) * some([1.0, 0.02, 0.0], P, 1, R)
    rewards = some([0.0, 1e4, -1e4, 0.7], 1, 1, R) + some([0.0, 0.0, 3.0], P, 1, R) + rewards
    rewards[torch.rand(P, G, R, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))] = NAN
    rewards[(torch.rand(P, 1, R, generator=generator) < draw(st.sampled_from([0.0, 0.3]))).expand(P, G, R)] = NAN
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=R, max_size=R))
    return rewards.view(P * G, R), G, weights


def assert_no_worse_than_float32(
    rewards: Tensor, G: int, weights: list[float], scale: Scale, combine: Combine, impl: str
) -> None:
    def of(impl: str, rewards: Tensor) -> Tensor:
        return run(rewards, G, weights, scale=scale, combine=combine, impl=impl)

    gt, eager = of("torch", rewards.double()), of("torch", rewards)
    with poisoned_outputs():
        ours = of(impl, rewards)
        assert torch.equal(ours, of(impl, rewards)), "another result for the same input"
    assert ours.dtype == torch.float32
    condition = torch.tensor(oracle(rewards, G, weights, scale, combine, EPS)[1], dtype=torch.float64)
    assert ours[condition == 0].eq(0).all()
    unscored = (rewards.isnan() | (torch.tensor(weights) == 0)).all(1)
    assert ours[unscored].eq(0).all()
    scaled = [a.double() / condition.masked_fill(condition == 0, 1) for a in (ours, eager, gt)]
    assert_no_worse("advantages over their condition", *scaled, relative=0, absolute=ROUNDINGS * 2**-24)


@pytest.mark.parametrize("impl", KERNELS)
@settings(deadline=None, max_examples=15 if CUDA else 60)  # nearly every example is another kernel to compile
@given(noisy_problems() | problems(), options["scale"], options["combine"])
def test_no_worse_than_float32(impl: str, problem: tuple, scale: Scale, combine: Combine) -> None:
    rewards, G, weights = problem
    rewards = rewards.float().masked_fill(rewards.abs() < 1e-30, 0)  # a GPU may flush what is not a normal number
    assert_no_worse_than_float32(rewards, G, weights, scale, combine, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("P", "G", "R"), [(131, 8, 3), (1027, 1, 2), (3, 300, 5)])
def test_more_groups_than_one_block_holds(P: int, G: int, R: int, scale: Scale, combine: Combine, impl: str) -> None:
    rewards = random_rewards(P * G, R, torch.float32, missing=0.2) + 100 * torch.arange(P).repeat_interleave(G)[:, None]
    rewards[: P // 2 * G, 0] = NAN  # the first blocks know nothing of the first reward
    rewards[-G:] = NAN
    assert_no_worse_than_float32(rewards, G, [1.0, 0.5, -2.0, 0.0, 1.0][:R], scale, combine, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_does_not_see_the_others(scale: Scale, impl: str) -> None:
    rewards = random_rewards(24, 3, torch.float32, missing=0.2)
    alone = torch.cat([run(group, 8, scale=scale, impl=impl) for group in rewards.split(8)])
    assert torch.equal(run(rewards, 8, scale=scale, impl=impl), alone)


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl: str) -> None:
    rewards, weights = random_rewards(8, 3, torch.float32, missing=0.3).to(device(impl)), torch.ones(3)
    for scale, combine in (("batch", "sum_then_normalize"), ("none", "normalize_then_sum")):
        inputs = (rewards, 4, weights.to(device(impl)), scale, combine, EPS, impl)
        torch.library.opcheck(torch.ops.bicot.group_advantages.default, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_to_one_graph(impl: str) -> None:
    torch._dynamo.reset()  # the implementations before this one count against its recompilations
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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_named_wherever_it_is(value: float, impl: str) -> None:
    if device(impl) == "cuda":
        pytest.skip("an assertion on the device")
    for sample in (0, 1047):  # of the first block and of the last
        rewards = random_rewards(1048, 3, torch.float32, missing=0.5)
        rewards[sample, 2] = value
        for weights in (None, [1.0, 1.0, 0.0]):
            with (
                poisoned_outputs(),
                pytest.raises(ValueError, match=f"infinite reward for sample {sample}; NaN means missing"),
            ):
                run(rewards, 8, weights, impl=impl)


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


@pytest.mark.parametrize(
    ("rewards", "group_size", "kwargs", "message"),
    [
        (torch.zeros(2, 3, 4), 2, {}, r"rewards must be \[S, R\] or \[S\], got shape \(2, 3, 4\)"),
        (torch.zeros(7), 2, {}, "7 rewards cannot be split into groups of group_size=2"),
        (torch.zeros(7), 0, {}, "7 rewards cannot be split into groups of group_size=0"),
        (torch.zeros(4, 2), 2, {"weights": [1.0]}, "1 weights for 2 rewards"),
        (torch.zeros(4, 2), 2, {"weights": torch.ones(2, 2)}, "4 weights for 2 rewards"),
        (torch.zeros(4), 2, {"scale": "groups"}, "scale='groups' is unknown; use 'group', 'batch' or 'none'"),
        (torch.zeros(4), 2, {"combine": "sum"}, "combine='sum' is unknown; use 'sum_then_normalize' or"),
        (torch.tensor([0, 1, math.inf, 2]), 2, {}, "infinite reward for sample 2; NaN means missing"),
        (torch.tensor([0, -math.inf, 1, 2]), 2, {}, "infinite reward for sample 1; NaN means missing"),
    ],
)
def test_bad_input_is_named(rewards: Tensor, group_size: int, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group_size, **kwargs)
