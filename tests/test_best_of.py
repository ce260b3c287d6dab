"""Best of N: pictures without a score."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TOY
from torch import Tensor

from bicot import Policy
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
