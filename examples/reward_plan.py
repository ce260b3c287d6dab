"""A reward of your own can read the plan, and your own keys of the prompt file.

{"prompt": "a kitchen", "task_type": "object", "must_mention": ["window", "kettle"]}      # a line of prompts.jsonl
python train.py --train_file prompts.jsonl --rewards.names scene,examples.reward_plan:Mentions
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bicot.rewards.base import Example


class Mentions:
    """Share of the words in `must_mention` that the plan mentions. It does not apply to prompts without this key."""

    name = "mentions"

    def applies(self, example: Example) -> bool:
        return bool(example.metadata.get("must_mention"))

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        shares = []
        for example in examples:
            words = example.metadata["must_mention"]
            found = [re.search(rf"\b{re.escape(word)}\b", example.plan, re.IGNORECASE) for word in words]
            shares.append(sum(map(bool, found)) / len(words))
        return torch.tensor(shares)
