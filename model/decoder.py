"""Janus's language model for decoding alone: packed prompts in, their keys and values kept; then a token a row a step.

It reads `Weights` and writes a `KVPool`. A step has nine or ten launches a layer and no shape that depends on a length,
so a CUDA graph can hold it. R rows, D hidden, N packed prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.decode_attention import decode_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope_kv_write import rope_kv_write
from ..kernels.silu_mul import silu_mul
from .kv import KVPool
from .packed import upload
from .policy import Policy
from .weights import Weights

PREFILL_TOKENS = 16384  # of one pass: enough to be bound by arithmetic, and a bound on activations
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence at hand


class Decoder:
    """The forward passes of a rollout.

    Args:
        policy: its configuration and rotary embedding.
        weights: its newest values.
        pool: where keys and values go.
        max_context: most positions.

    Raises:
        ValueError: a rotary embedding that changes with the length of a sequence.
    """

    def __init__(self, policy: Policy, weights: Weights, pool: KVPool, max_context: int) -> None:
        config, rotary = policy.config.text_config, policy.decoder.rotary_emb
        if rotary.rope_type not in _STATIC_ROPE:
            raise ValueError(
                f"rope_type {rotary.rope_type!r} changes with the length; the engine decodes {_STATIC_ROPE}"
            )
        self.weights, self.pool = weights, pool
        self.eps = config.rms_norm_eps
        self.query_heads = config.num_attention_heads
        positions = torch.arange(max_context, device=policy.device)
        like = torch.empty(0, dtype=policy.dtype, device=policy.device)
        self.cos, self.sin = (t[0, :, : pool.dim // 2].contiguous() for t in rotary(like, positions[None]))

    def step(self, x: Tensor, prefix_start: Tensor, prefix_length: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """One token a row.

        Args:
            x: [R, D] the tokens' embeddings; overwritten.
            prefix_start, prefix_length, start, length: [R] int64, where each row's earlier tokens lie; this one goes
                to slot start + length.

        Returns:
            [R, D] hidden states after the last norm.
        """
        lengths = length + 1

        def attend(query: Tensor, keys: Tensor, values: Tensor, *scales: Tensor | None) -> Tensor:
            rows = (prefix_start, prefix_length, start, lengths)
            key_scales, value_scales = scales
            return decode_attention(query, keys, values, *rows, key_scales=key_scales, value_scales=value_scales)

        return self._layers(x, prefix_length + length, start + length, attend)

    def _layers(
        self, x: Tensor, positions: Tensor, slots: Tensor, attend: Callable[..., Tensor], keys_only: bool = False
    ) -> Tensor:
        """The body: x [N, D] (overwritten) at `positions`, its keys and values written to `slots`."""
        layers = self.weights.layers
        normed = rms_norm(x, layers[0].attention_norm.tensor, self.eps)
        for i, layer in enumerate(layers):
            cache = self.pool.layer(i)
            query = rope_kv_write(layer.qkv(normed), self.cos, self.sin, positions, slots, *cache)
            if keys_only and i + 1 == len(layers):
                break  # nobody reads what the last layer would add
            normed = rms_norm(layer.out(attend(query, *cache)), layer.mlp_norm.tensor, self.eps, x)
            following = layers[i + 1].attention_norm if i + 1 < len(layers) else self.weights.norm
            normed = rms_norm(layer.down(silu_mul(layer.gate_up(normed))), following.tensor, self.eps, x)
        return normed

    def prefill(self, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Write the keys and values of whole prompts: prompt i to the slots from starts[i] on."""
        filled = [i for i, prompt in enumerate(prompts) if prompt]
        prompts, starts = [prompts[i] for i in filled], [starts[i] for i in filled]
        begin = tokens = 0
        for i, prompt in enumerate(prompts):
            if tokens + len(prompt) > PREFILL_TOKENS and i > begin:
                self._prefill(prompts[begin:i], starts[begin:i])
                begin, tokens = i, 0
            tokens += len(prompt)
        if tokens:
            self._prefill(prompts[begin:], starts[begin:])

    def _prefill(self, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        device = self.cos.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = lengths.cumsum(0)
        ids = upload([token for prompt in prompts for token in prompt], device)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        slots = upload(positions + torch.repeat_interleave(torch.tensor(starts), lengths), device)
        # attention alone needs a rectangle: right-padded, its pads repeat a row's last token and are dropped again
        columns = torch.arange(int(lengths.max()))
        packed = upload((ends - lengths)[:, None] + torch.minimum(columns, lengths[:, None] - 1), device)
        kept = upload((columns < lengths[:, None]).flatten().nonzero()[:, 0], device)

        def attend(query: Tensor, keys: Tensor, values: Tensor, *scales: Tensor | None) -> Tensor:
            caches = zip((keys, values), scales, strict=True)
            key, value = (_read(cache, scale, slots, query.dtype)[packed].transpose(1, 2) for cache, scale in caches)
            grouped = self.query_heads != self.pool.heads
            attended = F.scaled_dot_product_attention(
                query[packed].transpose(1, 2), key, value, is_causal=True, enable_gqa=grouped
            )
            return attended.transpose(1, 2).flatten(2).flatten(0, 1)[kept]

        x = F.embedding(ids, self.weights.embed_text.tensor)
        self._layers(x, upload(positions, device), slots, attend, keys_only=True)


def _read(cache: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values at `slots`, out of an fp8 pool as well."""
    if scales is None:
        return cache[slots]
    return (cache[slots].float() * scales[slots][..., None]).to(dtype)
