"""group_advantages against TRL's formulas in plain Python floats, with a missing reward at its group's mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bicot.kernels.group_advantages import Combine, Scale, group_advantages

# absolute, for rewards spread over about 1; the division by std + eps carries float32's 6e-8 up to a few 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
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


def oracle(rewards: Tensor, G: int, weights: list[float], scale: Scale, combine: Combine, eps: float) -> list[float]:
    columns = [[float(v) for v in column] for column in rewards.T]
    S = len(rewards)
    scored = [any(w != 0 and not math.isnan(c[s]) for w, c in zip(weights, columns, strict=True)) for s in range(S)]

    def total(columns: list[list[float]]) -> list[float]:
        return [
            math.fsum(w * c[s] for w, c in zip(weights, columns, strict=True)) if scored[s] else NAN for s in range(S)
        ]

    advantages = []
    if combine == "normalize_then_sum":
        z = []
        for column in columns:
            z.append([])
            for start in range(0, S, G):
                group = column[start : start + G]
                z[-1] += [0.0 if math.isnan(v) else (v - mean(group)) / (std(group) + eps) for v in group]
        x = total(z)
        advantages = [(v - mean(x)) / (std(x) + eps) for v in x]
    else:
        x = total([filled(column, G) for column in columns])
        for start in range(0, S, G):
            group = x[start : start + G]
            divisor = {"group": std(group) + eps, "batch": std(x) + eps, "none": 1.0}[scale]
            advantages += [(v - mean(group)) / divisor for v in group]
    return [0.0 if math.isnan(v) else v for v in advantages]


def check(rewards: Tensor, G: int, weights: list[float] | None, scale: Scale, combine: Combine, atol: float) -> None:
    ours = group_advantages(rewards, G, weights, scale=scale, combine=combine)
    expected = oracle(rewards, G, weights or [1.0] * rewards.shape[1], scale, combine, EPS)
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_several_weighted_rewards(missing: float, scale: Scale, combine: Combine, dtype: torch.dtype) -> None:
    rewards = random_rewards(24, 3, dtype, missing)
    check(rewards, 8, [1.0, 0.5, 2.0], scale, combine, TOLERANCE[dtype])
    check(rewards, 6, None, scale, combine, TOLERANCE[dtype])


def test_two_samples_are_half_their_distance_over_an_unbiased_std() -> None:
    ours = group_advantages(torch.tensor([1.0, 3.0]), 2)
    torch.testing.assert_close(ours, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + EPS))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_tiny_spread_on_a_large_offset_survives(scale: Scale, combine: Combine) -> None:
    # multiples of float32's step at 1e6, so that the inputs are exact: E[x²] - E[x]² would be noise of 1e5 here
    rewards = 1e6 + 0.0625 * torch.randint(0, 9, (24, 2), generator=torch.Generator().manual_seed(0)).float()
    check(rewards, 8, [1.0, 0.25], scale, combine, TOLERANCE[torch.float32])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("G", [1, 3, 7])
def test_equal_rewards_are_exactly_zero(G: int, scale: Scale, combine: Combine) -> None:
    for values in ([0.1, 1 / 3], [1e6 + 0.1, -7.7], [NAN, 0.7]):
        rewards = torch.tensor([values, [0.3, NAN]]).repeat_interleave(G, dim=0)
        assert group_advantages(rewards, G, [0.7, 1.1], scale=scale, combine=combine).eq(0).all()


class TestMissing:
    @pytest.mark.parametrize("scale", SCALES)
    def test_stands_at_its_groups_mean(self, scale: Scale) -> None:
        rewards = random_rewards(8, 2, torch.float64)
        gap, mean_there = rewards.clone(), rewards.clone()
        gap[2, 1], mean_there[2, 1] = NAN, rewards[[0, 1, 3], 1].mean()
        ours, expected = (group_advantages(r, 4, scale=scale) for r in (gap, mean_there))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_moves_no_sample_for_or_against(self, scale: Scale, combine: Combine) -> None:
        # 0.9 for everybody whom it applies to: as 0 it would punish the two others
        rewards = torch.tensor([[0.9, 0.5], [NAN, 0.5], [0.9, 0.5], [NAN, 0.5]])
        assert group_advantages(rewards, 4, scale=scale, combine=combine).eq(0).all()

    def test_in_a_whole_group_leaves_the_other_reward(self) -> None:
        rewards = random_rewards(8, 2, torch.float64)
        rewards[:4, 0] = NAN
        ours = group_advantages(rewards, 4)
        torch.testing.assert_close(ours[:4], group_advantages(rewards[:4, 1], 4), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours[4:], group_advantages(rewards[4:], 4), rtol=0, atol=1e-12)

    def test_in_a_whole_group_does_not_widen_the_spread_of_the_batch(self) -> None:
        rewards = torch.tensor([[0.9, 1.0], [0.9, 2.0], [NAN, 1.0], [NAN, 2.0]])
        ours = group_advantages(rewards, 2, scale="batch")
        torch.testing.assert_close(ours, group_advantages(rewards[:, 1], 2, scale="batch"))

    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_every_reward_takes_the_sample_out(self, scale: Scale, combine: Combine) -> None:
        rewards = random_rewards(5, 2, torch.float64)
        gap = torch.cat([rewards, torch.full((1, 2), NAN, dtype=torch.float64)])
        ours = group_advantages(gap, 6, scale=scale, combine=combine)
        assert ours[5] == 0
        expected = group_advantages(rewards, 5, scale=scale, combine=combine)
        torch.testing.assert_close(ours[:5], expected, rtol=0, atol=1e-12)
        nothing = torch.full((4, 2), NAN)
        assert group_advantages(nothing, 2, scale=scale, combine=combine).eq(0).all()

    def test_does_not_change_the_order_of_the_others(self) -> None:
        rewards = torch.tensor([[3.0, 0.0], [1.0, 0.5], [NAN, 1.0], [2.0, 0.2]])
        ours = group_advantages(rewards, 4)
        assert ours[[0, 3, 1]].argsort(descending=True).tolist() == [0, 1, 2]  # by 3.0, 2.2, 1.5
        torch.testing.assert_close(ours[0] - ours[3], (ours[3] - ours[1]) * 0.8 / 0.7)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_reward_of_weight_zero_only_watches(scale: Scale, combine: Combine) -> None:
    rewards = random_rewards(8, 2, torch.float32)
    rewards[3, 1] = NAN  # scored by the watching reward alone
    kept = group_advantages(rewards[:, 1], 4, scale=scale, combine=combine)
    for watching in (rewards[:, 0], 100 * rewards[:, 0], torch.full((8,), NAN)):
        both = torch.stack([watching, rewards[:, 1]], dim=1)
        assert torch.equal(group_advantages(both, 4, [0.0, 1.0], scale=scale, combine=combine), kept)
    assert kept[3] == 0 and kept.ne(0).sum() == 7


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale", SCALES)
def test_one_sample_alone_and_none_at_all(scale: Scale, combine: Combine) -> None:
    if combine == "sum_then_normalize":
        assert group_advantages(torch.tensor([1.0, 5.0, -2.0]), 1, scale=scale).eq(0).all()
    assert group_advantages(torch.tensor([[5.0]]), 1, scale=scale, combine=combine).tolist() == [0]
    assert group_advantages(torch.empty(0, 2), 4, scale=scale, combine=combine).shape == (0,)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)
def test_dtype_and_weights_as_a_tensor(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]).to(given_dtype)
    ours = group_advantages(rewards, 2, torch.tensor([1, 2]))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, group_advantages(rewards.to(dtype), 2, [1.0, 2.0]), rtol=0, atol=0)


def test_input_is_left_alone() -> None:
    rewards = random_rewards(8, 3, torch.float32, missing=0.3)
    before = rewards.clone()
    for scale in SCALES:
        group_advantages(rewards, 4, scale=scale)
    torch.testing.assert_close(rewards, before, equal_nan=True, rtol=0, atol=0)


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
