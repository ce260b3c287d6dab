"""A reward of your own that reads the plan and your own keys of the prompt file.

{"prompt": "a kitchen", "task_type": "object", "must_mention": ["window", "kettle"]}      # a row of prompts.jsonl
python train.py --train_file prompts.jsonl --rewards.names scene,examples.reward_plan:Mentions
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bicot.rewards.base import Example


class Mentions:
    """Share of the words under the row's key `must_mention` that the plan mentions; other rows have no such reward."""

    name = "mentions"

    def applies(self, example: Example) -> bool:
        return bool(example.metadata.get("must_mention"))

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        shares = []
        for example in examples:
            words = example.metadata["must_mention"]
            shares.append(sum(word in example.plan.lower() for word in words) / len(words))
        return torch.tensor(shares)
