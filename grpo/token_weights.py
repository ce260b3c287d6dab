"""Weights of single tokens in the loss, by a function of your own: `token_weights: package.module:function`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.token_stream import TokenStream
from ..rewards.config import find_object


@dataclass(frozen=True)
class Tokens:
    """What the function sees: N tokens of one stream of a micro-batch, in the order of their samples.

    Args:
        name: "text" or "image".
        targets: [N] int64, the tokens.
        logprobs: [N] of the tokens under the policy, before this update.
        entropies: [N] of the policy there, in nats.
        ref_logprobs: [N] under the reference model; None where the stream's beta is 0.
        positions: [N] int64, of each token within its plan or picture.
        sample: [N] int64, each token's sample of the micro-batch, which has `num_generations` of a prompt in a row.
        advantages: [N], of each token's sample.
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
    """The function of that name: `function(tokens: Tokens) -> weights [N]`. Booleans are weights of 1 and 0.

    Raises:
        ValueError: the name leads to nothing, or to something that takes no `Tokens`.
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
        """The weights of a stream [N], by one more pass of its head; `advantages` [S].

        Raises:
            ValueError: the function returned no tensor [N] of finite numbers.
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
