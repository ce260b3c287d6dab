"""Each kernel of ours against the formula in PyTorch, that formula compiled, and kernels of other libraries.

python -m bicot.bench.kernels OP [--device cpu|cuda] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.adamw import adamw
from ..kernels.cfg_sample import Draw, cfg_sample
from ..kernels.decode_attention import decode_attention
from ..kernels.decode_linear import BLOCK_OUTPUTS, decode_linear, decode_linear_add
from ..kernels.group_advantages import group_advantages
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope_kv_write import rope_kv_write
from ..kernels.silu_mul import silu_mul
from .harness import Case, Outputs, Provider, against_eager, kernel, main, normal, relative_error
from .loss_kernels import DTYPES, loss, of_hidden, of_logits

BOTH = (torch.bfloat16, torch.float32)
CONTEXT = 800  # positions of a rotary embedding
GUIDANCE, SEED = 5.0, 7


def random(high: int, shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator(device).manual_seed(0), device=device)


def decoded_and_trained(case: Callable[..., Case], width: int, trained: int, device: str, tiny: bool) -> list[Case]:
    """Two decode steps, and a micro-batch forward and backward: on a GPU a published one, on a CPU of `trained`."""
    width, rows = (64, (2,)) if tiny else (width, (16, 128))
    trained = 3 if tiny else 11_000 if device == "cuda" else trained
    decoded = [case({}, N, width, dtype) for N in rows for dtype in BOTH]
    return [*decoded, *(case({"what": "forward and backward"}, trained, width, dtype) for dtype in BOTH)]


def norms(device: str, tiny: bool) -> list[Case]:
    """A norm of Janus-Pro-1B with the residual add before it, of one decode step and of training.

    Training is forward and backward, with the gradient of the weight. Floor, at the rate of a large copy: x and the
    residual are read, the sum and the norm are written; in training also the sum and both gradients are read, and one
    gradient is written.
    """
    eps, impl = 1e-6, kernel(device)
    training = Provider(lambda x: add_rms_norm(x[0], x[1], x[2], eps, impl=impl))
    in_place: Any = lambda x: (rms_norm(x[0], x[2], eps, x[1], impl=impl), x[1])  # noqa: E731
    decoding = Provider(in_place, "adds in place", lambda x: (x[0], x[1].clone(), x[2]))

    def eager(given: Any) -> Outputs:
        x, residual, weight = given
        residual = residual + x
        hidden = residual.to(torch.promote_types(x.dtype, torch.float32))
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
        return weight * hidden.to(x.dtype), residual

    def case(what: dict[str, str], N: int, D: int, dtype: torch.dtype) -> Case:
        return against_eager(
            {**what, "N": N, "D": D},
            dtype,
            lambda: (*normal((2, N, D), dtype, device), torch.linspace(0.5, 1.5, D, device=device).to(dtype)),
            training if what else decoding,
            Provider(eager, "transformers"),
            trained=3 if what else 0,
            bytes=(8 if what else 4) * N * D * dtype.itemsize,
        )

    return decoded_and_trained(case, 2048, 1024, device, tiny)


def gates(device: str, tiny: bool) -> list[Case]:
    """The gated activation of Janus-Pro-1B, of one decode step and of training.

    Training is forward and backward. Floor, at the rate of a large copy: gate and up are read, their product is
    written; in training also gate, up and the product's gradient are read, and two gradients are written.
    """
    ours = Provider(lambda x: (silu_mul(x[0], impl=kernel(device)),))

    def eager(x: Any) -> Outputs:
        gate, up = x[0].chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    def case(what: dict[str, str], N: int, size: int, dtype: torch.dtype) -> Case:
        return against_eager(
            {**what, "N": N, "I": size},
            dtype,
            lambda: (normal((N, 2 * size), dtype, device),),
            ours,
            Provider(eager, "transformers, after one projection for both"),
            trained=1 if what else 0,
            bytes=(8 if what else 3) * N * size * dtype.itemsize,
        )

    return decoded_and_trained(case, 5632, 512, device, tiny)


def rotations(device: str, tiny: bool) -> list[Case]:
    """Rotate and store the tokens of one decode step of Janus-Pro-1B, 16 heads of 128.

    Floor, at the rate of a large copy: queries, keys and values are read and written.
    """
    heads, E = 16, 128

    def inputs(N: int, dtype: torch.dtype) -> Any:
        angles = torch.arange(CONTEXT, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, E // 2, device=device)
        slots = torch.randperm(2 * N, generator=torch.Generator(device).manual_seed(0), device=device)[:N]
        keys, values = torch.zeros(2, 2 * N, heads, E, dtype=dtype, device=device)
        tables = angles.cos().to(dtype), angles.sin().to(dtype), random(CONTEXT, (N,), device)
        return normal((N, 3 * heads * E), dtype, device), *tables, slots, keys, values

    def turned(x: Tensor) -> Tensor:
        return torch.cat([-x[..., E // 2 :], x[..., : E // 2]], dim=-1)

    def eager(x: Any) -> Outputs:
        qkv, cos, sin, positions, slots, keys, values = x
        q, k, v = qkv.view(len(qkv), 3, heads, E).unbind(1)
        cos, sin = (torch.cat([table, table], dim=-1)[positions][:, None] for table in (cos, sin))
        keys[slots], values[slots] = k * cos + turned(k) * sin, v
        return q * cos + turned(q) * sin, keys, values

    run: Any = lambda x: (rope_kv_write(*x, impl=kernel(device)), *x[5:])  # noqa: E731
    ours = Provider(run, "rotates in place", lambda x: (x[0].clone(), *x[1:]))
    theirs = Provider(eager, "transformers' apply_rotary_pos_emb, and a write to the same pool")
    found = []
    for N in [2] if tiny else [16, 128]:
        for dtype in BOTH:
            floor = 2 * 3 * N * heads * E * dtype.itemsize
            found.append(against_eager({"N": N}, dtype, partial(inputs, N, dtype), ours, theirs, bytes=floor))
    return found


def products(device: str, tiny: bool) -> list[Case]:
    """Half a layer of a decode step of Janus-Pro-1B: a product, residual sum, norm, and the product that follows.

    On a GPU only. Floor: the weights are read once.
    """
    eps, impl = 1e-6, kernel(device) if device == "cuda" else "torch"

    def ours(x: Any, silu: bool) -> Outputs:
        given, weight, residual, norm, following, arrived = x
        normed, squares = decode_linear_add(given, weight, residual, norm, arrived, impl=impl)
        return decode_linear(normed, following, squares, eps=eps, silu=silu, impl=impl), residual

    def separate(x: Any, silu: bool, impl: Any) -> Outputs:
        given, weight, residual, norm, following, _ = x
        out = F.linear(rms_norm(F.linear(given, weight), norm, eps, residual, impl=impl), following)
        return silu_mul(out, impl=impl) if silu else out, residual

    def case(what: str, R: int, K: int, D: int, N: int, dtype: torch.dtype) -> Case:
        shapes, silu = ((R, K), (D, K), (R, D), (D,), (N, D)), what == "o, gate and up"

        def inputs() -> Any:
            arrived = torch.zeros(-(-D // BLOCK_OUTPUTS), dtype=torch.int32, device=device)
            return *(normal(shape, dtype, device, seed=i) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)), arrived

        def provider(run: Any, note: str) -> Provider:
            return Provider(partial(run, silu=silu), note, lambda x: (*x[:2], x[2].clone(), *x[3:]))  # adds in place

        both = provider(ours, ""), provider(partial(separate, impl="torch"), "cuBLAS and plain PyTorch")
        more = {"separate": provider(partial(separate, impl=impl), "cuBLAS, rms_norm and silu_mul")}
        return against_eager({"what": what, "R": R}, dtype, inputs, *both, more, bytes=(K + N) * D * dtype.itemsize)

    if tiny:
        return [case("o, gate and up", 3, 64, 64, 256, torch.float32)]
    shapes = [("o, gate and up", 2048, 11264), ("down, q, k and v", 5632, 6144)] if device == "cuda" else []
    return [case(what, R, K, 2048, N, torch.bfloat16) for what, K, N in shapes for R in (16, 32, 64)]


def updates(device: str, tiny: bool) -> list[Case]:
    """An AdamW update of a bfloat16 parameter of Janus-Pro-1B with a float32 master, the gradient's norm clipped.

    On a GPU only. Floor: 28 bytes for each weight.
    """
    options: Any = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    (beta1, beta2), step = options["betas"], 10

    def ours(x: Any, impl: Any) -> Outputs:
        *tensors, scale = x
        adamw(*tensors, step=step, scale=scale, impl=impl, **options)
        return tensors

    def eager(x: Any) -> Outputs:
        _, master, grad, exp_avg, exp_avg_sq, scale = x
        g = grad.to(master.dtype) * scale
        exp_avg, exp_avg_sq = beta1 * exp_avg + (1 - beta1) * g, beta2 * exp_avg_sq + (1 - beta2) * g * g
        change = exp_avg / (1 - beta1**step) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + options["eps"])
        master = master * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * change
        return master.to(grad.dtype), master, grad, exp_avg, exp_avg_sq

    def fresh(x: Any) -> Any:
        return tuple(tensor.clone() for tensor in x)

    def case(N: int, D: int) -> Case:
        def inputs() -> Any:
            master, grad, exp_avg, noise = normal((4, N, D), torch.float32, device).unbind()
            weight, grad = master.bfloat16(), grad.bfloat16()
            return weight, master, grad, exp_avg, noise.square(), torch.full((), 0.5, device=device)

        best = kernel(device) if device == "cuda" else "torch"
        both = Provider(partial(ours, impl=best), "in place", fresh), Provider(eager, "not in place")
        note = "a float32 gradient, PyTorch's fused AdamW, and a rounded copy"
        more = {"fused AdamW": Provider(partial(ours, impl="torch"), note, fresh)}
        return against_eager({"N": N, "D": D}, torch.bfloat16, inputs, *both, more, bytes=28 * N * D)

    shapes = [(5632, 2048), (102400, 2048)] if device == "cuda" else []
    return [case(3, 64)] if tiny else [case(*shape) for shape in shapes]


def advantages(device: str, tiny: bool) -> list[Case]:
    """128 samples in groups of 8, three rewards.

    Only two kilobytes move, so there is no floor. On a CPU ours is plain PyTorch.
    """
    (S, G), eps = (16, 4) if tiny else (128, 8), 1e-4
    impl = kernel(device) if device == "cuda" else "torch"

    def eager(x: Any) -> Outputs:
        groups = x[0].sum(1).view(-1, G)
        return (((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).flatten(),)

    ours = Provider(lambda x: (group_advantages(x[0], G, eps=eps, impl=impl),))
    theirs = Provider(eager, "no missing rewards, no checks")
    given = lambda: (normal((S, 3), torch.float32, device),)  # noqa: E731
    return [against_eager({"S": S, "G": G, "R": 3}, torch.float32, given, ours, theirs)]


def attention(device: str, tiny: bool) -> list[Case]:
    """One query a sequence over keys and values in a pool. Lengths differ, and half of the sequences share a prefix.

    Floor: the keys and values of every sequence are read once. A layer of Janus-Pro-1B (16 heads of 128) with R
    sequences of up to 736 keys and a prefix of 160; a layer of the toy model (4 heads of 32) with 128 sequences of
    about 70 keys. The padded cache is as wide as the longest sequence. It is made before the clock starts, as a static
    cache of transformers would be.
    """

    def inputs(H: int, E: int, total: Tensor, prefix: Tensor, dtype: torch.dtype) -> Any:
        """q, keys, values, the four columns that describe the sequences; slots and mask of the padded ones [R, L]."""
        length = total - prefix
        start = prefix.amax() + length.cumsum(0) - length
        q = normal((len(total), 3 * H, E), dtype, device)[:, :H]
        keys, values = normal((2, int(prefix.amax() + length.sum()), H, E), dtype, device, seed=1)
        j = torch.arange(int(total.max()))
        slots, inside = j + torch.where(j < prefix[:, None], 0, (start - prefix)[:, None]), j < total[:, None]
        rows = (torch.zeros_like(start), prefix, start, length, slots.where(inside, 0), inside)
        return q, keys, values, *(x.to(device) for x in rows)

    def padded(x: Any) -> Any:
        """Gather q, keys and values [R, H, L, E], and the mask."""
        q, keys, values, *_, slots, inside = x
        return q, keys[slots].transpose(1, 2), values[slots].transpose(1, 2), inside

    def static_cache(x: Any) -> Any:
        return tuple(each.contiguous() for each in padded(x))

    def attend(given: Any) -> Outputs:
        q, keys, values, inside = given
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=inside[:, None, None])
        return (out.reshape(len(q), -1),)

    ours = Provider(lambda x: (decode_attention(*x[:7], impl=kernel(device)),))
    gather = Provider(lambda x: attend(padded(x)), "a gather into padded rows, and SDPA with a mask")
    more = {"padded cache": Provider(attend, "SDPA with a mask, no gather", static_cache)}

    def case(H: int, E: int, total: Tensor, longest: int, dtype: torch.dtype) -> Case:
        R = len(total)
        prefix = torch.where(torch.arange(R) < R // 2, longest, 0)
        labels, given = {"R": R, "H": H, "E": E, "keys": int(total.max())}, partial(inputs, H, E, total, prefix, dtype)
        shared = int(prefix.sum()) - longest  # read once for all of its rows
        floor = (int(total.sum()) - shared) * 2 * H * E * dtype.itemsize
        return against_eager(labels, dtype, given, ours, gather, more, bytes=floor)

    def lengths(R: int, shortest: int, longest: int) -> Tensor:
        """The number of keys of each sequence, prefix included. One sequence has the longest length."""
        total = shortest + random(longest + 1 - shortest, (R,), "cpu")
        total[R // 2] = longest
        return total

    if tiny:
        return [case(2, 16, lengths(4, 9, 20), 8, torch.float32)]
    shapes = [(4, 32, lengths(128, 60, 80), 35), *((16, 128, lengths(R, 161, 736), 160) for R in (2, 16, 64, 128))]
    return [case(*shape, dtype) for dtype in DTYPES[device] for shape in shapes]


def draws(device: str, tiny: bool) -> list[Case]:
    """Draw one token a sequence from guided logits, from all tokens or from the 50 likeliest, with its log-probs.

    Floor: every logit is read once. Image tokens [16, 16384] with guidance 5; text [16, 102400] without guidance, and
    truncated, on a CPU [2, 102400]. Checked: the log-probs, and that ours draws the tokens of its reference in PyTorch.
    """

    def guided(cond: Tensor, uncond: Tensor | None) -> Tensor:
        return cond if uncond is None else uncond + GUIDANCE * (cond - uncond)

    def logprobs(cond: Tensor, mixed: Tensor, token: Tensor) -> list[Tensor]:
        return [z.log_softmax(-1).gather(-1, token[:, None])[:, 0] for z in (cond, mixed)]

    def eager(x: Any, top_k: int) -> Outputs:
        cond, uncond = x[0].float(), None if x[1] is None else x[1].float()
        mixed = kept = guided(cond, uncond)
        if top_k:
            kept = mixed.masked_fill(mixed < mixed.topk(top_k).values[:, -1:], -torch.inf)
        token = torch.multinomial(kept.softmax(-1), 1)[:, 0]
        return token, *logprobs(cond, mixed, token)

    def ours(x: Any, top_k: int, impl: Any) -> Outputs:
        cond, uncond, offset = x
        return cfg_sample(cond, uncond, guidance=GUIDANCE, top_k=top_k, seed=SEED, offset=offset, impl=impl)

    def truth(x: Any, top_k: int) -> Callable[[Outputs], float]:
        cond, uncond = x[0].double(), None if x[1] is None else x[1].double()
        expected = ours(x, top_k, "torch")[0]

        def error_of(outputs: Outputs) -> float:
            token, *reported = outputs
            assert token is not None and expected is not None
            if isinstance(outputs, Draw):
                assert torch.equal(token, expected), "other tokens than those of the reference"
            return relative_error(reported, logprobs(cond, guided(cond, uncond), token))

        return error_of

    def inputs(B: int, V: int, guidance: bool, dtype: torch.dtype) -> Any:
        both, cond, uncond = normal((3, B, V), torch.float32, device)
        logits = [(2 * both + 0.3 * own).to(dtype) for own in (cond, uncond)]
        return logits[0], logits[1] if guidance else None, torch.arange(B, device=device)

    def case(B: int, V: int, guidance: bool, top_k: int, dtype: torch.dtype) -> Case:
        case = against_eager(
            {"B": B, "V": V} | ({"guidance": GUIDANCE} if guidance else {"top_k": top_k}),
            dtype,
            partial(inputs, B, V, guidance, dtype),
            Provider(partial(ours, top_k=top_k, impl=kernel(device))),
            Provider(partial(eager, top_k=top_k), "softmax and torch.multinomial"),
            bytes=(1 + guidance) * B * V * dtype.itemsize,
        )
        return replace(case, truth=partial(truth, top_k=top_k), tolerance=1e-4)  # all compute in float32

    text = (2, 384) if tiny else (16 if device == "cuda" else 2, 102400)
    shapes = [(4, 384, True, 0), (4, 384, False, 0)] if tiny else [(16, 16384, True, 0), (16, 102400, False, 0)]
    return [case(*shape, dtype) for shape in (*shapes, (*text, False, 50)) for dtype in DTYPES[device]]


# op -> its cases on a device, all or a few small ones
OPS: dict[str, Callable[[str, bool], list[Case]]] = {
    "decode_attention": attention,
    "decode_linear": products,
    "rms_norm": norms,
    "silu_mul": gates,
    "rope_kv_write": rotations,
    "group_advantages": advantages,
    "token_logprobs": of_logits,
    "linear_logprobs": of_hidden,
    "grpo_loss": loss,
    "cfg_sample": draws,
    "adamw": updates,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("op", choices=OPS)
    chosen, sys.argv[1:] = parser.parse_known_args()
    what, _, how = (inspect.getdoc(OPS[chosen.op]) or "").partition("\n")
    doc = f"{chosen.op}: {what}\npython -m bicot.bench.kernels {chosen.op}\n{how}"
    raise SystemExit(main(doc, OPS[chosen.op]))
