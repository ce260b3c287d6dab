"""Weigh a token by what depends on it and by how much it changed, in the spirit of GCPO (arXiv 2509.22485).

    python train.py --token_weights examples.critical_tokens:weights

A token counts more the earlier it is drawn, because all later ones see it, and the farther its log-prob has moved from
the reference (beta above 0). The weights of a stream have a mean of 1, so that its learning rate stays what it was.
"""

import torch
from torch import Tensor

from bicot.grpo.token_weights import Tokens

EARLY = 0.2  # of the longest plan or of the picture: there the weight of being early has fallen to 1/e


def weights(tokens: Tokens) -> Tensor:
    early = torch.exp(-tokens.positions / (EARLY * (tokens.positions.max() + 1)))
    moved = torch.zeros_like(early)
    if tokens.ref_logprobs is not None:
        moved = (tokens.logprobs - tokens.ref_logprobs).abs()
    score = early / early.mean() + moved / moved.mean().clamp(min=1e-6)
    return score / score.mean()
