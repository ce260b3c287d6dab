"""Trains only the tokens of highest entropy (arXiv 2506.01939), as TRL's `top_entropy_quantile` does.

    python train.py --token_weights examples.entropy_selective:weights

TRL computes one threshold for the tokens of all ranks. Here each stream of each micro-batch has its own. In TRL, the
other tokens keep their KL, and the entropy bonus is divided by the number of selected tokens. Here the other tokens
have neither KL nor entropy bonus, and the loss is divided by the number of all tokens.
"""

import torch
from torch import Tensor

from bicot.grpo.token_weights import Tokens

TOP_ENTROPY_QUANTILE = {"text": 0.2, "image": 0.2}  # share of the tokens that are trained; 1.0 = all


def weights(tokens: Tokens) -> Tensor:
    threshold = torch.quantile(tokens.entropies, 1 - TOP_ENTROPY_QUANTILE[tokens.name])
    return tokens.entropies >= threshold
