"""Image tokens to pictures: the decoder half of Janus's VQ model, channels-last, a bounded number at a time.

The half is a copy, because its convolutions run fastest with weights in channels-last order, and because it must be
complete where the policy is sharded. S pictures, T tokens each.
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

CHUNK_BYTES = 2**30  # of activations: bounds the memory beside the KV cache, and still fills a GPU
_LIVE_MAPS = 6  # feature maps of full resolution that a residual block holds at its widest moment


class ImageDecoder:
    """Decodes image tokens with a policy's VQ model, whose weights it copies at `refresh`.

    Args:
        policy: whose configuration, device and dtype it takes.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.config.vq_config
        with torch.device("meta"):
            model: Any = JanusVQVAE(config)
        del model.encoder, model.quant_conv
        model.to_empty(device=policy.device).to(policy.dtype, memory_format=torch.channels_last)
        self.model = model.eval()
        self.graphs = StepGraphs(None)  # of its own: pictures are decoded beside the next chunk's steps
        self._static: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # what a graph reads and writes
        scale = 2 ** (len(config.channel_multiplier) - 1)
        pixels = (config.num_patches * scale) ** 2
        widest = config.base_channels * max(config.channel_multiplier[:2])
        self.chunk = max(1, CHUNK_BYTES // (_LIVE_MAPS * pixels * widest * policy.dtype.itemsize))

    @torch.no_grad()
    def refresh(self, vqmodel: Any, value: Callable[[Any, str], Tensor] = nn.Module.get_parameter) -> None:
        """Copy the weights of `vqmodel`, a JanusVQVAE that is complete on this rank; `value` reads one by its name."""
        for name, own in self.model.named_parameters():
            own.copy_(value(vqmodel, name))

    @record_function("VQ")
    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """[S, T] int64 -> [S, 3, H, W] float32 in [0, 1]."""
        decode = self._replay if self.graphs.enabled else self._decode
        return torch.cat([decode(part) for part in tokens.split(self.chunk)])

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.model.decode(tokens).float().add_(1).div_(2).clamp_(0, 1)

    def _replay(self, tokens: Tensor) -> Tensor:
        """The same by the graph for so many pictures."""
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
