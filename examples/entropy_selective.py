"""Train only the tokens of highest entropy (arXiv 2506.01939), as TRL's `top_entropy_quantile` does.

    python train.py --token_weights examples.entropy_selective:weights

TRL takes one threshold over the tokens of all ranks; here each stream of a micro-batch on this rank has its own. TRL
leaves the KL on all tokens, and divides the entropy bonus by the tokens that are left; here the others have no term at
all, and what the loss divides by stays.
"""

import torch
from torch import Tensor

from bicot.grpo.token_weights import Tokens

TOP_ENTROPY_QUANTILE = {"text": 0.2, "image": 0.2}  # the share that trains; 1.0 = all tokens


def weights(tokens: Tokens) -> Tensor:
    threshold = torch.quantile(tokens.entropies, 1 - TOP_ENTROPY_QUANTILE[tokens.name])
    return tokens.entropies >= threshold
