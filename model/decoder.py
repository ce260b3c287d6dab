"""Decodes with Janus's language model: a prefill of packed prompts, then decode steps of one token for each sequence.

It reads `Weights` and writes the KV cache, a `KVPool`. A decode step launches nine or ten kernels per layer, or six
with `fused_linear`. No shape depends on the length of a sequence, so the step can be a CUDA graph. The shapes of a
prefill depend on its number of tokens alone, so it is padded to one of a few sizes, each with a graph. R sequences,
D hidden, N packed prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from ..kernels.decode_attention import decode_attention
from ..kernels.decode_linear import BLOCK_OUTPUTS, MAX_SEQUENCES, decode_linear, decode_linear_add
from ..kernels.host import upload
from ..kernels.prefill_attention import prefill_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope_kv_write import rope_kv_write
from ..kernels.silu_mul import silu_mul
from .graphs import StepGraphs
from .kv import SCRATCH, KVPool
from .packed import int64
from .policy import Policy
from .weights import Weights

PREFILL_TOKENS = 2048  # maximum of one pass: enough to be bound by arithmetic, and few enough to bound the activations
_BUCKET = 256  # a prefill is padded to a multiple of this, so that few graphs suffice; a smaller one is hardly faster
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # types whose frequencies do not depend on the sequence


class Decoder:
    """The forward passes of a rollout.

    Args:
        policy: gives the configuration and the rotary embedding.
        weights: of the policy.
        pool: the KV cache.
        max_context: maximum number of tokens in a sequence.
        graphs: runs prefills, as CUDA graphs or eagerly.

    Attributes:
        fused_linear: decode up to 64 sequences with `decode_linear` in the place of cuBLAS, norms and activation. Off
            until a GPU has shown that this saves time (python -m bicot.bench.bench_rollout compares).

    Raises:
        ValueError: a rotary embedding that changes with the length of a sequence.
    """

    def __init__(self, policy: Policy, weights: Weights, pool: KVPool, max_context: int, graphs: StepGraphs) -> None:
        config, rotary = policy.config.text_config, policy.decoder.rotary_emb
        if rotary.rope_type not in _STATIC_ROPE:
            raise ValueError(
                f"rope_type {rotary.rope_type!r} changes with the length; the engine takes {', '.join(_STATIC_ROPE)}"
            )
        self.weights, self.pool, self.graphs = weights, pool, graphs
        self._tables: dict[int, Tensor] = {}  # number of tokens -> the input of its graph
        self.eps = config.rms_norm_eps
        self.fused_linear = False
        self._arrived = torch.zeros(-(-config.hidden_size // BLOCK_OUTPUTS), dtype=torch.int32, device=policy.device)
        positions = torch.arange(max_context, device=policy.device)
        like = torch.empty(0, dtype=policy.dtype, device=policy.device)
        self.cos, self.sin = (t[0, :, : pool.dim // 2].contiguous() for t in rotary(like, positions[None]))

    def step(
        self,
        x: Tensor,
        prefix_start: Tensor,
        prefix_length: Tensor,
        start: Tensor,
        length: Tensor,
        positions: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Decode one token of each sequence.

        Args:
            x: [R, D] the embeddings of the tokens; overwritten.
            prefix_start, prefix_length, start, length: [R] int64, the two segments of each sequence in the pool. The
                second one includes the new token.
            positions, slots: [R] int64, of the new token in its sequence and in the pool.

        Returns:
            [R, D] hidden states after the last norm.
        """

        def attend(query: Tensor, keys: Tensor, values: Tensor, *scales: Tensor | None) -> Tensor:
            segments = (prefix_start, prefix_length, start, length)
            key_scales, value_scales = scales
            return decode_attention(query, keys, values, *segments, key_scales=key_scales, value_scales=value_scales)

        fused = self.fused_linear and len(x) <= MAX_SEQUENCES and not self.weights.has_biases
        return (self._fused_layers if fused else self._layers)(x, positions, slots, attend)

    def _fused_layers(self, x: Tensor, positions: Tensor, slots: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """`_layers` with norms, activations and residual sums inside the products."""
        layers = self.weights.layers
        normed, squares = rms_norm(x, layers[0].attention_norm.tensor, self.eps), None
        for i, layer in enumerate(layers):
            cache = self.pool.layer(i)
            qkv = decode_linear(normed, layer.qkv.weight, squares, eps=self.eps)
            attended = attend(rope_kv_write(qkv, self.cos, self.sin, positions, slots, *cache), *cache)
            normed, squares = decode_linear_add(attended, layer.out.weight, x, layer.mlp_norm.tensor, self._arrived)
            hidden = decode_linear(normed, layer.gate_up.weight, squares, eps=self.eps, silu=True)
            following = layers[i + 1].attention_norm if i + 1 < len(layers) else self.weights.norm
            normed, squares = decode_linear_add(hidden, layer.down.weight, x, following.tensor, self._arrived)
        return rms_norm(x, self.weights.norm.tensor, self.eps)

    def _layers(
        self, x: Tensor, positions: Tensor, slots: Tensor, attend: Callable[..., Tensor], keys_only: bool = False
    ) -> Tensor:
        """Run all layers on x [N, D] (overwritten) at `positions`, and write the keys and values to `slots`.

        With `keys_only`, stop after the keys and values of the last layer.
        """
        layers = self.weights.layers
        normed = rms_norm(x, layers[0].attention_norm.tensor, self.eps)
        for i, layer in enumerate(layers):
            cache = self.pool.layer(i)
            query = rope_kv_write(layer.qkv(normed), self.cos, self.sin, positions, slots, *cache)
            if keys_only and i + 1 == len(layers):
                break
            normed = rms_norm(layer.out(attend(query, *cache)), layer.mlp_norm.tensor, self.eps, x)
            following = layers[i + 1].attention_norm if i + 1 < len(layers) else self.weights.norm
            normed = rms_norm(layer.down(silu_mul(layer.gate_up(normed))), following.tensor, self.eps, x)
        return normed

    @record_function("prefill")
    def prefill(self, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Write the keys and values of whole prompts to the pool: those of prompt i to the slots from starts[i] on."""
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
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        begins = lengths.cumsum(0) - lengths
        tokens = int(lengths.sum())
        size = self._bucket(tokens)
        table = torch.zeros(4, size, dtype=torch.int64)
        table[0, :tokens] = int64(list(chain(*prompts)))
        table[3] = torch.arange(size)  # each padding token is a prompt of its own, in the scratch slot
        table[3, :tokens] = torch.repeat_interleave(begins, lengths)
        table[1, :tokens] = torch.arange(tokens) - table[3, :tokens]
        table[2] = SCRATCH
        table[2, :tokens] = torch.arange(tokens) + torch.repeat_interleave(torch.tensor(starts) - begins, lengths)
        on_device = upload(table, self.cos.device)
        if not self.graphs.enabled:
            return self._write(on_device)
        self._capture(size)  # a single prompt can be longer than PREFILL_TOKENS
        self._tables[size].copy_(on_device)
        self.graphs.run(*self._graph(size))

    def prepare(self) -> None:
        """Capture the graphs of all sizes up to PREFILL_TOKENS."""
        for size in range(_BUCKET, PREFILL_TOKENS + 1, _BUCKET):
            self._capture(size)

    def _capture(self, size: int) -> None:
        key, step = self._graph(size)
        if self.graphs.lacks(key):
            # all slots are the scratch slot, since a capture first runs the step, which must not overwrite a sequence
            self._tables[size] = torch.zeros(4, size, dtype=torch.int64, device=self.cos.device)
            self.graphs.capture(key, step)

    def _graph(self, size: int) -> tuple[Hashable, Callable[[], None]]:
        return ("prefill", size), lambda: self._write(self._tables[size])

    def _bucket(self, tokens: int) -> int:
        """The size that a pass of `tokens` is padded to. One graph serves all passes up to its size."""
        return -(-tokens // _BUCKET) * _BUCKET if self.graphs.enabled else tokens

    def _write(self, table: Tensor) -> None:
        """Write the keys and values of packed tokens. `table` [4, N] has the id, position and slot of each token, and
        the index of the first token of its prompt."""
        ids, positions, slots, first = table

        def attend(query: Tensor, keys: Tensor, values: Tensor, *scales: Tensor | None) -> Tensor:
            key_scales, value_scales = scales
            return prefill_attention(
                query, keys, values, slots, first, key_scales=key_scales, value_scales=value_scales
            )

        x = F.embedding(ids, self.weights.embed_text.tensor)
        self._layers(x, positions, slots, attend, keys_only=True)
