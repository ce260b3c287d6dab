"""Turns image tokens into pictures with the decoder of Janus's VQ model, a bounded number of pictures at a time.

It has a copy of the weights, because convolutions are fastest with weights in channels-last order, and because it needs
all weights even if the policy is sharded. S pictures, T tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.models.janus.modeling_janus import JanusVQVAE

from .graphs import StepGraphs
from .policy import Policy

PICTURE_BYTES = 2**30  # maximum size of the activations: small beside the KV cache, and enough to fill a GPU
_LIVE_MAPS = 6  # maximum number of feature maps of full resolution that a residual block holds at once


class ImageDecoder:
    """Decodes image tokens with the weights of a policy's VQ model, which `refresh` copies.

    Args:
        policy: gives the configuration, the device and the dtype.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.config.vq_config
        with torch.device("meta"):
            model: Any = JanusVQVAE(config)
        del model.encoder, model.quant_conv
        model.to_empty(device=policy.device).to(policy.dtype, memory_format=torch.channels_last)
        self.model = model.eval()
        self.graphs = StepGraphs(None)  # not the engine's: pictures are decoded while the next chunk is drawn
        self._static: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # shape -> input and output of its graph
        scale = 2 ** (len(config.channel_multiplier) - 1)
        pixels = (config.num_patches * scale) ** 2
        widest = config.base_channels * max(config.channel_multiplier[:2])
        self.most = max(1, PICTURE_BYTES // (_LIVE_MAPS * pixels * widest * policy.dtype.itemsize))

    @torch.no_grad()
    def refresh(self, vqmodel: Any, value: Callable[[Any, str], Tensor] = nn.Module.get_parameter) -> None:
        """Copy the weights of `vqmodel`, a JanusVQVAE that is complete on this rank.

        `value(vqmodel, name)` reads one of them.
        """
        for name, own in self.model.named_parameters():
            own.copy_(value(vqmodel, name))

    @record_function("VQ")
    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """[S, T] int64 -> [S, 3, H, W] float32 in [0, 1]."""
        decode = self._replay if self.graphs.enabled else self._decode
        return torch.cat([decode(some) for some in tokens.split(self.most)])

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.model.decode(tokens).float().add_(1).div_(2).clamp_(0, 1)

    def _replay(self, tokens: Tensor) -> Tensor:
        """Do the same with the CUDA graph for this number of pictures."""
        key = tuple(tokens.shape)
        if self.graphs.lacks(key):
            self._static[key] = tokens.clone(), self._decode(tokens)
        given, pictures = self._static[key]

        def step() -> None:
            pictures.copy_(self._decode(given))

        self.graphs.capture(key, step)
        given.copy_(tokens)
        self.graphs.run(key, step)
        return pictures.clone()
