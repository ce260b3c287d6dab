"""Gives each token a weight in the loss, by a function of the user's: `token_weights: package.module:function`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.token_stream import TokenStream
from ..rewards.config import find_object


@dataclass(frozen=True)
class Tokens:
    """The argument of the function: N tokens of one stream of a micro-batch, in the order of their samples.

    Args:
        name: "text" or "image".
        targets: [N] int64, the tokens.
        logprobs: [N] log-probs of the tokens under the policy, before this update.
        entropies: [N] entropies of the policy's distributions, in nats.
        ref_logprobs: [N] log-probs under the reference model; None if the stream's beta is 0.
        positions: [N] int64, the position of each token within its plan or picture.
        sample: [N] int64, the index of each token's sample in the micro-batch. Consecutive `num_generations` samples
            have the same prompt.
        advantages: [N], the advantage of each token's sample.
    """

    name: str
    targets: Tensor
    logprobs: Tensor
    entropies: Tensor
    ref_logprobs: Tensor | None
    positions: Tensor
    sample: Tensor
    advantages: Tensor


class TokenWeights:
    """The function with this name: `function(tokens: Tokens) -> weights [N]`. Booleans count as 1 and 0.

    Raises:
        ValueError: there is no such function, or it does not take one argument.
    """

    def __init__(self, name: str) -> None:
        self.name, self.function = name, find_object("token_weights", name)
        try:
            inspect.signature(self.function).bind(None)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"token_weights {name!r} must be a function of one argument, the tokens: {error}"
            ) from None

    @torch.no_grad()
    def __call__(self, stream: TokenStream, advantages: Tensor) -> Tensor:
        """The weights [N] of a stream's tokens, which costs another pass of its head. `advantages` are [S].

        Raises:
            ValueError: the function did not return a tensor [N] of finite numbers.
        """
        N, sample = len(stream.targets), stream.sample
        if not N:
            return advantages.new_empty(0)
        stats = stream.stats()
        tokens = Tokens(
            name=stream.name,
            targets=stream.targets,
            logprobs=stats.logprob,
            entropies=stats.entropy,
            ref_logprobs=stream.ref_logprob,
            positions=torch.arange(N, device=sample.device) - torch.searchsorted(sample, sample),
            sample=sample,
            advantages=advantages[sample],
        )
        weights = self.function(tokens)
        found = type(weights).__name__
        if isinstance(weights, Tensor):
            found = f"a tensor {list(weights.shape)} on {weights.device}"
            if weights.shape == sample.shape and weights.device == sample.device:
                if weights.isfinite().all():
                    return weights.float()
                found = "weights that are not finite"
        raise ValueError(
            f"token_weights {self.name!r} returned {found} for the {stream.name} tokens; it must return a tensor [{N}] "
            f"of finite numbers on {sample.device}"
        )
