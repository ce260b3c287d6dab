"""Training's forward pass: packed tokens go through the modules of transformers' Llama, in few kernel launches.

The linear layers are the model's own nn.Linear modules, so that adapters, ZeRO-3's hooks and each parameter's gradient
work as in transformers. q, k, v (or gate, up) are one matrix product if they lie side by side in memory, as `join`
leaves them, and have no hooks. Between two matrix products runs a single kernel: the residual add fused with the norm,
the rotary embedding fused with the copy into attention's layout, or the activation. N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.silu_mul import silu_mul
from .recompute import Keep, keep_all, recomputed
from .sequences import Layout, collect, sequence_attention


class Norm(LlamaRMSNorm):
    """LlamaRMSNorm that can also add the residual stream. It stays a module, so that its hooks are called."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """[..., D] -> the norm of x; with a residual, the norm of the sum, and the sum."""
        if residual is None:
            return rms_norm(x.flatten(0, -2), self.weight, self.variance_epsilon).view(x.shape)
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon)


def install(decoder: nn.Module) -> None:
    """Make each norm of a LlamaModel a `Norm`."""
    for module in decoder.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = Norm


def join(decoder: Any) -> None:
    """Put q, k, v and gate, up of each layer side by side in memory, as `RolloutEngine` does for a policy."""
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            weights = [module.weight for module in group]
            if all(map(_is_plain, group)) and side_by_side(weights) is None and all(map(is_alone, weights)):
                move_together(weights)


def forward(decoder: Any, x: Tensor, layout: Layout, selective: bool = False) -> Tensor:
    """Run all layers: embeddings x [N, D] of the tokens -> [N, D] hidden states after the last norm.

    Layers with `gradient_checkpointing` in train mode recompute their activations, as in transformers. With
    `selective`, the backward pass recomputes what takes no matrix product: norms, activation functions, the inputs of
    attention, and the copy of its outputs to the tokens.
    """
    cos, sin = (t[0, :, : t.shape[-1] // 2].contiguous() for t in decoder.rotary_emb(x[None], layout.positions[None]))
    residual: Tensor | None = None
    for layer in decoder.layers:
        if layer.gradient_checkpointing and layer.training:
            x, residual = layer._gradient_checkpointing_func(_layer, layer, x, residual, cos, sin, layout, keep_all)
        else:
            x, residual = _layer(layer, x, residual, cos, sin, layout, recomputed if selective else keep_all)
    normed, _ = decoder.norm(x, residual)
    return normed


def _layer(
    layer: Any, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, layout: Layout, keep: Keep
) -> tuple[Tensor, Tensor]:
    """Run one layer -> the output of its MLP, and the residual stream. The next layer adds the two."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, residual = _norm_linears(
        layer.input_layernorm, x, residual, [attention.q_proj, attention.k_proj, attention.v_proj], keep
    )
    kv_heads = attention.config.num_key_value_heads
    attended = sequence_attention(qkv, cos, sin, kv_heads, attention.scaling, layout, keep)
    del qkv  # without gradients this frees the memory
    x = _linear(attention.o_proj, partial(collect, layout), attended, keep)
    del attended
    gate_up, residual = _norm_linears(layer.post_attention_layernorm, x, residual, [mlp.gate_proj, mlp.up_proj], keep)
    return _linear(mlp.down_proj, silu_mul, [gate_up], keep), residual


def _norm_linears(
    norm: Norm, x: Tensor, residual: Tensor | None, modules: Sequence[nn.Module], keep: Keep
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream, and apply linear layers to the norm of the sum -> their outputs, and the sum."""
    normed, total = (norm(x), x) if residual is None else norm(x, residual)
    with keep([normed], _again(norm, total)):
        return linears(normed, modules), total


def _linear(module: nn.Module, compute: Callable[..., Tensor], given: Sequence[Tensor], keep: Keep) -> Tensor:
    """Apply a linear layer to `compute(*given)`."""
    x = compute(*given)
    with keep([x], _again(compute, *given)):
        return module(x)


def _again(compute: Callable[..., Tensor], *given: Tensor) -> Callable[[], list[Tensor]]:
    """The function with which the backward pass computes the same tensor again."""
    detached = [x.detach() for x in given]
    return lambda: [compute(*detached)]


def linears(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Apply several linear layers to x [N, D] -> their outputs side by side, [N, ΣD_out]."""
    if all(map(_is_plain, modules)):  # first, because reading a weight makes ZeRO-3 gather it for the whole pass
        weights = [module.weight for module in modules]
        if (joined := side_by_side(weights)) is not None:  # type: ignore[arg-type]
            return _Joined.apply(x, joined, *weights)
    return torch.cat([module(x) for module in modules], dim=-1)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is a linear layer without bias or hooks, so that it need not be called itself."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and module.bias is None and not any(hooks)


def side_by_side(parameters: Sequence[Tensor]) -> Tensor | None:
    """One view of all parameters, if each begins in memory where the previous one ends; otherwise None."""
    first = parameters[0].detach()
    for left, right in pairwise(parameters):
        adjacent = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        if not adjacent or left.storage_offset() + left.numel() != right.storage_offset():
            return None
    if not all(parameter.is_contiguous() for parameter in parameters):
        return None
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride(), first.storage_offset())


def is_alone(parameter: Tensor, joined: Tensor | None = None) -> bool:
    """Whether the storage holds nothing but this parameter, or nothing but `joined`, which the parameter is part of."""
    storage = parameter.untyped_storage()
    moved = joined is not None and joined.untyped_storage().data_ptr() == storage.data_ptr()
    size = (joined if moved else parameter).nbytes  # type: ignore[union-attr]
    # DeepSpeed marks parameters in a flat buffer of ZeRO-1 or 2, and parameters that ZeRO-3 shards
    return storage.nbytes() == size and not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id")


def move_together(parameters: Sequence[Tensor]) -> Tensor:
    """Copy the parameters into one tensor, and make them views of it."""
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return joined


class _Joined(torch.autograd.Function):
    """x @ joined.T, where `joined` is one view of all weights; each weight gets its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, joined)
        ctx.sizes = [len(weight) for weight in weights]
        return F.linear(x, joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        d_x = grad @ joined if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[2:]
        if not any(needed):
            return d_x, None, *([None] * len(needed))
        each = (grad.T @ x).split(ctx.sizes)
        return d_x, None, *(part if wanted else None for part, wanted in zip(each, needed, strict=True))
