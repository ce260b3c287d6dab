"""Weighs tokens by their position and by how much they changed, in the spirit of GCPO (arXiv 2509.22485).

    python train.py --token_weights examples.critical_tokens:weights

A token has a larger weight the earlier it is drawn, because all later tokens attend to it, and the farther its log-prob
has moved from that of the reference model (beta above 0). The weights of a stream have a mean of 1, so that the scale
of its gradient stays about the same.
"""

import torch
from torch import Tensor

from bicot.grpo.token_weights import Tokens

EARLY = 0.2  # after this share of the longest plan, or of the picture, the weight of early tokens has fallen to 1/e


def weights(tokens: Tokens) -> Tensor:
    early = torch.exp(-tokens.positions / (EARLY * (tokens.positions.max() + 1)))
    moved = torch.zeros_like(early)
    if tokens.ref_logprobs is not None:
        moved = (tokens.logprobs - tokens.ref_logprobs).abs()
    score = early / early.mean() + moved / moved.mean().clamp(min=1e-6)
    return score / score.mean()
