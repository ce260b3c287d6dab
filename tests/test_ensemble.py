"""Loading rewards by name and dotted path, missing scores, and errors that name the reward and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bicot.rewards.base import Example
from bicot.rewards.ensemble import RewardEnsemble, RewardError, load_reward

EXAMPLES = [Example("a cat", "object", nouns=("cat",)), Example("two dogs", "numeracy")]
IMAGES = torch.rand(2, 3, 4, 4)


class Constant:
    def __init__(self, name: str, *values: float) -> None:
        self.name, self.values = name, values

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.tensor(self.values)


class Failing(Constant):
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        if any("dogs" in example.prompt for example in examples):
            raise RuntimeError("cannot count dogs")
        return torch.zeros(len(examples))


class FailingOnBatches(Constant):
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.zeros(1) if len(examples) == 1 else self.missing  # type: ignore[attr-defined]


def test_scores_weights_and_missing_rewards() -> None:
    nan = float("nan")
    ensemble = RewardEnsemble([Constant("a", 1.0, nan), Constant("b", 0.5, nan)], [1.0, 2.0], [Constant("m", 9.0, 9.0)])
    scores = ensemble.submit(IMAGES, EXAMPLES).result()
    assert ensemble.names == ["a", "b", "m"] and ensemble.weights.tolist() == [1.0, 2.0, 0.0]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.5, 9.0], [nan, nan, 9.0]]), equal_nan=True)
    # the monitor neither adds to a reward nor stands in for one
    torch.testing.assert_close(ensemble.total(scores), torch.tensor([2.0, nan]), equal_nan=True)


def test_user_reward_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ensemble_rewards.py").write_text(
        "class Brightness:\n"
        "    name = 'brightness'\n"
        "    def score(self, images, examples):\n"
        "        return images.mean((1, 2, 3))\n"
        "ready = Brightness()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ensemble_rewards:Brightness", "ensemble_rewards:ready"):
        scores = RewardEnsemble([load_reward(name)]).submit(IMAGES, EXAMPLES).result()
        torch.testing.assert_close(scores[:, 0], IMAGES.mean((1, 2, 3)))
    for name, message in [
        ("ensemble_rewards:Darkness", "cannot be imported: module 'ensemble_rewards' has no attribute 'Darkness'"),
        ("no_such_module:X", "cannot be imported: No module named 'no_such_module'"),
        ("ensemble_rewards:number", "needs a `name` and a `score"),
        ("hpsv9", "unknown reward 'hpsv9'; built in are scene"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(name)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Failing("broken"), "reward 'broken' failed on 'two dogs': cannot count dogs"),
        (FailingOnBatches("big"), "reward 'big' failed on a batch of 2 prompts from 'a cat' on, though .* 'missing'"),
        (Constant("short", 1.0), r"reward 'short' returned \(1,\) for 2 pictures"),
        (Constant("wild", 1.0, float("inf")), "reward 'wild' gave inf for 'two dogs'"),
    ],
)
def test_a_reward_that_fails_is_named(reward: Constant, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardEnsemble([reward]).submit(IMAGES, EXAMPLES)


def test_two_rewards_of_one_name() -> None:
    with pytest.raises(ValueError, match="two rewards have the name 'a'"):
        RewardEnsemble([Constant("a", 1.0)], None, [Constant("a", 1.0)])
