"""All rewards of a run behind one call: pictures in, a [S, R] matrix out.

Shapes: S samples, R rewards (those that train first, then the monitored ones), images [S, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Example, Reward

BUILTIN = {
    "scene": "bicot.rewards.scene:SceneReward",
    "scene_relation": "bicot.rewards.scene:SceneRelation",
}


class RewardError(RuntimeError):
    """A reward failed: the message names the reward and the prompt."""


def load_reward(name: str) -> Reward:
    """A built-in reward, or `package.module:Class` (called without arguments) or `package.module:instance`.

    Raises:
        ValueError: the name leads to nothing, or to something that is not a reward.
    """
    module_name, colon, attribute = BUILTIN.get(name, name).partition(":")
    if not colon:
        raise ValueError(
            f"unknown reward {name!r}; built in are {', '.join(sorted(BUILTIN))}, your own is package.module:Class"
        )
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    reward = target() if inspect.isclass(target) else target
    if not isinstance(reward, Reward):
        raise ValueError(f"reward {name!r} needs a `name` and a `score(images, examples)`; see CONTRIBUTING.md")
    return reward


@dataclass(frozen=True)
class RewardHandle:
    """Scores on their way. `result()` gives them, [S, R] float32, NaN = not applicable."""

    scores: Tensor

    def result(self) -> Tensor:
        return self.scores


class RewardEnsemble:
    """Scores pictures with every reward.

    Args:
        rewards: those that train.
        weights: one for each, default 1.
        monitors: scored as well, with weight 0.
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float] | None = None, monitors: Sequence[Reward] = ()
    ) -> None:
        self.rewards = [*rewards, *monitors]
        self.names = [reward.name for reward in self.rewards]
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ValueError(f"two rewards have the name {twice.pop()!r}; names must differ, they label the metrics")
        trained = [1.0] * len(rewards) if weights is None else list(weights)
        self.weights = torch.tensor([*trained, *[0.0] * len(monitors)])

    def submit(self, images: Tensor, examples: Sequence[Example]) -> RewardHandle:
        """Start scoring S pictures of S examples.

        Raises:
            RewardError: a reward raised, or returned another shape or an infinite score.
        """
        return RewardHandle(torch.stack([self._score(reward, images, examples) for reward in self.rewards], dim=1))

    def total(self, scores: Tensor) -> Tensor:
        """[S, R] -> [S]: the weighted sum of the rewards that apply, NaN where none does."""
        weights = self.weights.to(scores)
        applies = (~scores.isnan() & (weights != 0)).any(1)
        return (scores.nan_to_num(nan=0.0) * weights).sum(1).masked_fill(~applies, torch.nan)

    def _score(self, reward: Reward, images: Tensor, examples: Sequence[Example]) -> Tensor:
        try:
            with torch.no_grad():
                scores = reward.score(images, examples)
        except Exception as error:
            raise RewardError(
                f"reward {reward.name!r} failed on {_culprit(reward, images, examples)}: {error}"
            ) from error
        scores = torch.as_tensor(scores, dtype=torch.float32, device=images.device)
        if scores.shape != (len(examples),):
            raise RewardError(f"reward {reward.name!r} returned {tuple(scores.shape)} for {len(examples)} pictures")
        if scores.isinf().any():
            at = int(scores.isinf().nonzero()[0])
            raise RewardError(f"reward {reward.name!r} gave {scores[at].item()} for {examples[at].prompt!r}")
        return scores


def _culprit(reward: Reward, images: Tensor, examples: Sequence[Example]) -> str:
    """The prompt that fails alone; the batch, if each of its prompts succeeds alone."""
    for s, example in enumerate(examples):
        try:
            reward.score(images[s : s + 1], [example])
        except Exception:  # any: the error itself is already on its way to the user
            return repr(example.prompt)
    return f"a batch of {len(examples)} prompts from {examples[0].prompt!r} on, though on none of them alone"
