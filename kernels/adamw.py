"""An AdamW update of parameters with float32 masters, in one pass over memory.

    g = scale · grad;    m = β1·m + (1 - β1)·g;    v = β2·v + (1 - β2)·g²
    master -= lr·λ·master;    master -= lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + ε);    weight = master

m and v are exp_avg and exp_avg_sq, λ is the weight decay, t counts the updates of a parameter, this one included. A
bfloat16 gradient is read as it is. Computed in float32; only `weight` is rounded to its own dtype.

Floor: 28 bytes for each bfloat16 weight. PyTorch moves 48: it makes a float32 gradient (6), scales it (8), updates (28)
and rounds the master (6).

Source: AdamW (arXiv 1711.05101), as in `torch.optim.AdamW`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import Impl, choose, launch, tl, triton

_CONFIG = {"BLOCK": 1024, "num_warps": 8}  # four elements a thread: with eight, bfloat16 goes through shared memory


@triton.jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    p_master, p_grad, p_exp_avg, p_exp_avg_sq, p_weight, p_scale, size, beta1, rest1, beta2, rest2, decay, rate, root,
    eps, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(p_scale)
    if scale != scale:
        return
    m = o < size
    b_grad = tl.load(p_grad + o, m).to(tl.float32) * scale
    b_exp_avg = beta1 * tl.load(p_exp_avg + o, m) + rest1 * b_grad
    b_exp_avg_sq = beta2 * tl.load(p_exp_avg_sq + o, m) + rest2 * b_grad * b_grad
    b_master = tl.load(p_master + o, m)
    b_master -= decay * b_master
    b_master -= rate * b_exp_avg / (tl.sqrt(b_exp_avg_sq) * root + eps)
    tl.store(p_exp_avg + o, b_exp_avg, m)
    tl.store(p_exp_avg_sq + o, b_exp_avg_sq, m)
    tl.store(p_master + o, b_master, m)
    if p_weight is not None:
        tl.store(p_weight + o, b_master.to(p_weight.dtype.element_ty), m)


@torch.no_grad()
def adamw(
    weight: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    scale: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    impl: Impl = "auto",
) -> None:
    """Update a parameter in place, without making the host wait.

    Args:
        weight: the model's parameter, any shape. All tensors have its shape and are contiguous.
        master: float32 or float64; it may be `weight` itself.
        grad: floating point; it is not changed.
        exp_avg, exp_avg_sq: the moments, dtype of master, zero before the first update.
        step: number of updates, this one included.
        scale: [] float32 on the device, the factor that clips the gradients' norm. NaN leaves everything as it is.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        impl: "triton" (CUDA), "torch" (PyTorch's fused AdamW), or "auto": Triton on a GPU, and else PyTorch.

    Raises:
        ValueError: shapes that differ, a tensor that is not contiguous, a master of 16 bits, or an `impl` that cannot
            run.

    Source: arXiv 1711.05101.
    """
    tensors = (weight, master, grad, exp_avg, exp_avg_sq)
    if not all(t.shape == weight.shape and t.is_contiguous() for t in tensors):
        shapes = [(*t.shape,) for t in tensors]
        raise ValueError(f"weight, master, grad and moments must be contiguous and of one shape, got {shapes}")
    if master.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the master must be float32 or float64, got {master.dtype}, in which small updates get lost")
    beta1, beta2 = betas
    if choose(impl, master.device, master.dtype, cpp=False) == "triton":
        size, rounded = weight.numel(), None if weight is master else weight
        launch(
            _adamw_kernel, (triton.cdiv(size, _CONFIG["BLOCK"]),), master, grad, exp_avg, exp_avg_sq, rounded, scale,
            size, beta1, 1 - beta1, beta2, 1 - beta2, lr * weight_decay, lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), eps, **_CONFIG,
        )  # fmt: skip
        return
    updates, wide = torch.full((), float(step), device=master.device), grad.to(master.dtype) * scale
    torch._fused_adamw_(
        [master], [wide], [exp_avg], [exp_avg_sq], [], [updates], found_inf=scale.isnan().float(),
        amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=lr, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    if weight is not master:
        weight.copy_(master)
