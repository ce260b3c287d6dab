"""Each kernel of ours against the formula in PyTorch, that compiled, and kernels of other libraries.

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

from ..kernels.cfg_sample import Draw, cfg_sample, exponential, philox
from ..kernels.decode_attention import decode_attention
from ..kernels.group_advantages import group_advantages
from ..kernels.kv_pool import quantize_fp8
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope_kv_write import rope_kv_write
from ..kernels.silu_mul import silu_mul
from .harness import Case, Outputs, Provider, Unavailable, against_eager, kernel, main, normal, relative_error, short
from .harness import with_gradients as gradients
from .loss_kernels import loss, of_hidden, of_logits

BOTH = (torch.bfloat16, torch.float32)
DTYPES = {"cpu": BOTH[::-1], "cuda": BOTH[:1]}
CONTEXT = 800  # positions of a rotary embedding
GUIDANCE, SEED = 5.0, 7


def random(high: int, shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator(device).manual_seed(0), device=device)


def norms(device: str, tiny: bool) -> list[Case]:
    """A norm of Janus-Pro-1B with the residual add before it, of one decode step and of training.

    Training is forward and backward, with the gradient of the weight. Floor, at the rate of a large copy: x and the
    residual read, the sum and the norm written; in training also the sum and both gradients read, and one written.
    """
    eps, impl = 1e-6, kernel(device)

    def eager(given: Any) -> Outputs:
        x, residual, weight = given
        residual = residual + x
        hidden = residual.to(torch.promote_types(x.dtype, torch.float32))
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
        return weight * hidden.to(x.dtype), residual

    def inputs(N: int, D: int, dtype: torch.dtype) -> Any:
        return *normal((2, N, D), dtype, device), torch.linspace(0.5, 1.5, D, device=device).to(dtype)

    def case(N: int, D: int, dtype: torch.dtype, training: bool) -> Case:
        in_place = lambda x: (rms_norm(x[0], x[2], eps, x[1], impl=impl), x[1])  # noqa: E731
        return against_eager(
            ({"what": "forward and backward"} if training else {}) | {"N": N, "D": D, "dtype": short(dtype)},
            dtype,
            partial(inputs, N, D, dtype),
            (lambda x: add_rms_norm(x[0], x[1], x[2], eps, impl=impl)) if training else in_place,
            eager,
            impl,
            notes=("" if training else "adds in place", "transformers"),
            fresh=None if training else lambda x: (x[0], x[1].clone(), x[2]),
            wrap=partial(gradients, trained=3) if training else torch.no_grad(),
            bytes=(8 if training else 4) * N * D * dtype.itemsize,
        )

    return decoded_and_trained(case, 2048, 1024, device, tiny)


def gates(device: str, tiny: bool) -> list[Case]:
    """The gated activation of Janus-Pro-1B, of one decode step and of training.

    Training is forward and backward. Floor, at the rate of a large copy: gate and up read, their product written; in
    training also gate, up and the product's gradient read, and theirs written.
    """
    impl = kernel(device)

    def eager(x: Any) -> Outputs:
        gate, up = x[0].chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    def case(N: int, size: int, dtype: torch.dtype, training: bool) -> Case:
        return against_eager(
            ({"what": "forward and backward"} if training else {}) | {"N": N, "I": size, "dtype": short(dtype)},
            dtype,
            lambda: (normal((N, 2 * size), dtype, device),),
            lambda x: (silu_mul(x[0], impl=impl),),
            eager,
            impl,
            notes=("", "transformers, after one projection for both"),
            wrap=partial(gradients, trained=1) if training else torch.no_grad(),
            bytes=(8 if training else 3) * N * size * dtype.itemsize,
        )

    return decoded_and_trained(case, 5632, 512, device, tiny)


def decoded_and_trained(case: Callable[..., Case], width: int, trained: int, device: str, tiny: bool) -> list[Case]:
    """Two decode steps and, forward and backward, a micro-batch: on a GPU a published one, on a CPU of `trained`."""
    width, rows = (64, (2,)) if tiny else (width, (16, 128))
    trained = 3 if tiny else 11_000 if device == "cuda" else trained
    decoded = [case(N, width, dtype, False) for N in rows for dtype in BOTH]
    return [*decoded, *(case(trained, width, dtype, True) for dtype in BOTH)]


def rotations(device: str, tiny: bool) -> list[Case]:
    """Rotate and store the tokens of one decode step of Janus-Pro-1B, 16 heads of 128.

    Floor: queries, keys and values read and written, at the rate of a large copy.
    """
    heads, E, impl = 16, 128, kernel(device)

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

    return [
        against_eager(
            {"N": N, "dtype": short(dtype)},
            dtype,
            partial(inputs, N, dtype),
            lambda x: (rope_kv_write(*x, impl=impl), *x[5:]),
            eager,
            impl,
            notes=("rotates in place", "transformers' apply_rotary_pos_emb, and a write to the same pool"),
            fresh=lambda x: (x[0].clone(), *x[1:]),
            bytes=2 * 3 * N * heads * E * dtype.itemsize,
        )
        for N in ([2] if tiny else [16, 128])
        for dtype in BOTH
    ]


def advantages(device: str, tiny: bool) -> list[Case]:
    """128 samples in groups of 8, three rewards.

    Two kilobytes move, so no floor is counted. On a CPU ours is plain PyTorch.
    """
    (S, G), eps = (16, 4) if tiny else (128, 8), 1e-4
    impl = kernel(device) if device == "cuda" else "torch"

    def eager(x: Any) -> Outputs:
        groups = x[0].sum(1).view(-1, G)
        return (((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).flatten(),)

    given = lambda: (normal((S, 3), torch.float32, device),)  # noqa: E731
    ours = lambda x: (group_advantages(x[0], G, eps=eps, impl=impl),)  # noqa: E731
    notes = ("", "no missing rewards, no checks")
    return [against_eager({"S": S, "G": G, "R": 3}, torch.float32, given, ours, eager, impl, notes=notes)]


def attention(device: str, tiny: bool) -> list[Case]:
    """One query a row over keys and values in a pool, rows of any lengths, half of them with one prefix.

    Floor: the keys and values of every row are read once. A layer of Janus-Pro-1B (16 heads of 128), rows of up to 736
    keys, a prefix of 160; a layer of the toy model (4 heads of 32), 128 rows of about 70 keys. The padded cache is as
    wide as the longest row and is there already, as a static cache of transformers is: nobody pays for its making.
    """
    impl = kernel(device)

    def inputs(H: int, E: int, total: Tensor, prefix: Tensor, dtype: torch.dtype, fp8: bool) -> Any:
        """q, keys, values, the four columns of the rows, two scales of a float8 pool, and for the padded rows [R, L]:
        their slots, and which of them are a row's."""
        length = total - prefix
        start = prefix.amax() + length.cumsum(0) - length
        q = normal((len(total), 3 * H, E), dtype, device)[:, :H]
        keys, values = normal((2, int(prefix.amax() + length.sum()), H, E), dtype, device, seed=1)
        j = torch.arange(int(total.max()))
        slots, inside = j + torch.where(j < prefix[:, None], 0, (start - prefix)[:, None]), j < total[:, None]
        pools, scales = (keys, values), (None, None)
        if fp8:
            pools, scales = zip(*map(quantize_fp8, pools), strict=True)
        rows = (torch.zeros_like(start), prefix, start, length, slots.where(inside, 0), inside)
        *columns, slots, inside = (x.to(device) for x in rows)
        return q, *pools, *columns, *scales, slots, inside

    def padded(x: Any) -> list[Tensor]:
        """Keys and values [R, H, L, E]."""
        pools = [pool[x[9]].to(x[0].dtype) for pool in x[1:3]]
        if x[7] is not None:
            pools = [pool * scale[x[9]][..., None].to(pool.dtype) for pool, scale in zip(pools, x[7:9], strict=True)]
        return [pool.transpose(1, 2) for pool in pools]

    def attend(given: Any) -> Outputs:
        q, keys, values, inside = given
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=inside[:, None, None])
        return (out.reshape(len(q), -1),)

    def static_cache(x: Any) -> Any:
        if x[7] is not None:
            raise Unavailable("a static cache holds no float8")
        return x[0], *(pool.contiguous() for pool in padded(x)), x[10]

    def case(H: int, E: int, total: Tensor, longest: int, dtype: torch.dtype, fp8: bool = False) -> Case:
        R = len(total)
        prefix = torch.where(torch.arange(R) < R // 2, longest, 0)
        shared = int(prefix.sum()) - longest  # read once for all of its rows
        labels = {"R": R, "H": H, "E": E, "keys": int(total.max()), "dtype": short(dtype)}
        return against_eager(
            labels | ({"pool": "float8"} if fp8 else {}),
            dtype,
            partial(inputs, H, E, total, prefix, dtype, fp8),
            lambda x: (decode_attention(*x[:7], key_scales=x[7], value_scales=x[8], impl=impl),),
            lambda x: attend((x[0], *padded(x), x[10])),
            impl,
            notes=("", "a gather into padded rows, and SDPA with a mask"),
            more={"padded cache": Provider(attend, "SDPA with a mask, no gather", static_cache)},
            bytes=(int(total.sum()) - shared) * 2 * H * (E + 4 if fp8 else E * dtype.itemsize),
        )

    def lengths(R: int, shortest: int, longest: int) -> Tensor:
        """Keys of each row, the prefix included; at least one row is the longest."""
        total = shortest + random(longest + 1 - shortest, (R,), "cpu")
        total[R // 2] = longest
        return total

    if tiny:
        return [case(2, 16, lengths(4, 9, 20), 8, torch.float32, fp8) for fp8 in (False, True)]
    shapes = [(4, 32, lengths(128, 60, 80), 35), *((16, 128, lengths(R, 161, 736), 160) for R in (2, 16, 64, 128))]
    exact = [case(*shape, dtype) for dtype in DTYPES[device] for shape in shapes]
    return [*exact, case(*shapes[3], torch.bfloat16, fp8=True)]  # R = 64


def draws(device: str, tiny: bool) -> list[Case]:
    """One token a row from guided logits, from all, or from the 50 likeliest, and its log-probs.

    Floor: every logit is read once. Image rows [16, 16384] with guidance 5; text rows [16, 102400] and, truncated,
    [2, 102400] without. Checked: the log-probs, that the token survives the truncation, that ours is the first to come
    in.
    """
    impl = kernel(device)

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
        mixed = guided(cond, uncond)
        order = mixed.sort(dim=-1, descending=True, stable=True).indices[:, : top_k or None]
        probs = torch.zeros_like(mixed).scatter_(-1, order, mixed.gather(-1, order).softmax(-1))
        least, v = mixed.gather(-1, order[:, -1:]), torch.arange(probs.shape[1], device=probs.device)
        words = torch.stack(philox(SEED, x[2][:, None], v // 256 * 64 + v % 64))
        noise = exponential(words.gather(0, (v // 64 % 4).expand(1, *probs.shape))[0])
        log_times = noise.double().log() - probs.log()

        def error_of(outputs: Outputs) -> float:
            token, *reported = outputs
            assert token is not None
            pick = token[:, None]
            assert not (mixed.gather(-1, pick) < least).any(), "a token that the truncation drops"
            error = relative_error(reported, logprobs(cond, mixed, token))
            if isinstance(outputs, Draw):
                error = max(error, float((log_times.gather(-1, pick)[:, 0] - log_times.amin(-1)).amax()))
            return error

        return error_of

    def inputs(B: int, V: int, guidance: bool, dtype: torch.dtype) -> Any:
        both, cond, uncond = normal((3, B, V), torch.float32, device)
        logits = [(2 * both + 0.3 * own).to(dtype) for own in (cond, uncond)]
        return logits[0], logits[1] if guidance else None, torch.arange(B, device=device)

    def case(B: int, V: int, guidance: bool, top_k: int, dtype: torch.dtype) -> Case:
        labels: dict[str, Any] = {"B": B, "V": V} | ({"guidance": GUIDANCE} if guidance else {"top_k": top_k})
        case = against_eager(
            labels | {"dtype": short(dtype)},
            torch.float32,  # what all compute in
            partial(inputs, B, V, guidance, dtype),
            partial(ours, top_k=top_k, impl=impl),
            partial(eager, top_k=top_k),
            impl,
            notes=("", "softmax and torch.multinomial"),
            more={
                "ours in PyTorch": Provider(partial(ours, top_k=top_k, impl="torch"), 'impl="torch"; the same tokens')
            },
            bytes=(1 + guidance) * B * V * dtype.itemsize,
        )
        return replace(case, truth=partial(truth, top_k=top_k))

    text = (2, 384) if tiny else (2, 102400)
    shapes = [(4, 384, True, 0), (4, 384, False, 0)] if tiny else [(16, 16384, True, 0), (16, 102400, False, 0)]
    return [case(*shape, dtype) for shape in (*shapes, (*text, False, 50)) for dtype in DTYPES[device]]


# op -> its cases on a device, all or a few small ones
OPS: dict[str, Callable[[str, bool], list[Case]]] = {
    "decode_attention": attention,
    "rms_norm": norms,
    "silu_mul": gates,
    "rope_kv_write": rotations,
    "group_advantages": advantages,
    "token_logprobs": of_logits,
    "linear_logprobs": of_hidden,
    "grpo_loss": loss,
    "cfg_sample": draws,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("op", choices=OPS)
    chosen, sys.argv[1:] = parser.parse_known_args()
    raise SystemExit(main(f"{chosen.op}: {inspect.getdoc(OPS[chosen.op])}", OPS[chosen.op], f"kernels {chosen.op}"))
