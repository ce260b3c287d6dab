"""Best of N: what cannot be ranked is named, and the bench judges pictures that it does not change."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TOY
from torch import Tensor

from bicot import Policy
from bicot.bench.best_of import FILLS, NUMBERS, N, fill_greedily, measure, table
from bicot.grpo.best_of import best_of, require_scores
from bicot.rewards.base import Example
from bicot.rewards.config import FunctionReward
from bicot.rewards.ensemble import RewardEnsemble


@pytest.fixture(scope="module")
def toy() -> Policy:
    return Policy.from_pretrained(TOY, device="cpu")


def test_pictures_without_a_score_come_last_and_are_named_where_none_has_one(toy: Policy) -> None:
    def redness(images: Tensor, examples: list[Example]) -> Tensor:
        red, asked = images[:, 0].mean((1, 2)), torch.tensor([example.prompt == "a circle" for example in examples])
        return red.where(asked & (red < red.max()), math.nan)

    rewards = RewardEnsemble([FunctionReward("redness", redness)])
    examples = [Example(prompt, "any") for prompt in ("a circle", "a square")]
    require_scores(rewards, examples)  # such a reward says only afterwards that it does not apply
    given = (3, 0, "auto", toy.settings.sampling)
    (ranked,) = best_of(toy, rewards, examples[:1], *given)
    assert ranked[0].score > ranked[1].score and math.isnan(ranked[2].score)
    assert sorted(one.picture.seed for one in ranked) == [0, 1, 2]
    with pytest.raises(ValueError, match="no reward applies to any picture of the prompt 'a square'"):
        list(best_of(toy, rewards, examples, *given))


def test_filling_changes_no_picture_that_goes_on(toy: Policy) -> None:
    before = toy.generate("two circles", n=3, image_temperature=4)
    filled = fill_greedily(toy)
    after = toy.generate("two circles", n=3, image_temperature=4)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(before, after, strict=True))
    half = toy.num_image_tokens // 2
    assert [torch.equal(a.tokens[:half], row[:half]) for a, row in zip(after, filled[0], strict=True)] == [True] * 3
    assert not torch.equal(after[0].tokens, filled[0][0])
    best = measure(toy, 0, filled, 2)
    assert [*best] == [*(f"best of {n}" for n in NUMBERS), *FILLS] and best[f"best of {N}"] == max(best.values())
    found, mean = table({"a": [best, best], "b": [best]}), f"{best['best of 8']:.4f}"
    assert found["header"][2:] == ["a", "b"] and [row[0] for row in found["rows"]] == [*best]
    assert ["best of 8", "50", mean, mean] in found["rows"]
