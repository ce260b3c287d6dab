"""decode_attention: one query a row over keys and values in a pool, rows of any lengths, half of them with one prefix.

python -m bicot.bench.bench_decode_attention [--device cpu|cuda] [--output FILE.json]
Floor: the keys and values of every row are read once. A layer of Janus-Pro-1B (16 heads of 128), rows of up to 736
keys, a prefix of 160; a layer of the toy model (4 heads of 32), 128 rows of about 70 keys. The padded cache is as wide
as the longest row and is there already, as a static cache of transformers is: nobody pays for its making.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.decode_attention import decode_attention
from ..kernels.dispatch import Impl
from ..kernels.kv_pool import quantize_fp8
from .harness import Case, Outputs, Provider, Unavailable, against_eager, kernel, main, short

PREFIX, LONGEST = 160, 736
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


class Inputs(NamedTuple):
    q: Tensor  # [R, H, E]
    keys: Tensor  # [P, H, E], and the values
    values: Tensor
    rows: tuple[Tensor, Tensor, Tensor, Tensor]  # prefix_start, prefix_length, start, length
    scales: tuple[Tensor, ...]  # of a float8 pool
    slots: Tensor  # [R, longest], and which of them are a row's
    inside: Tensor


def lengths(R: int, shortest: int, longest: int) -> Tensor:
    """Keys of each row, the prefix included; at least one row is the longest."""
    total = torch.randint(shortest, longest + 1, (R,), generator=torch.Generator().manual_seed(0))
    total[R // 2] = longest
    return total


def prefix_lengths(R: int, prefix: int) -> Tensor:
    return torch.where(torch.arange(R) < R // 2, prefix, 0)


def inputs(H: int, E: int, total: Tensor, prefix: int, fp8: bool, dtype: torch.dtype, device: str) -> Inputs:
    R, generator = len(total), torch.Generator(device).manual_seed(0)
    prefix_length = prefix_lengths(R, prefix)
    length = total - prefix_length
    start = prefix + length.cumsum(0) - length
    q = torch.randn(R, 3 * H, E, generator=generator, device=device)[:, :H].to(dtype)
    keys, values = torch.randn(2, int(prefix + length.sum()), H, E, generator=generator, device=device).to(dtype)
    j = torch.arange(int(total.max()))
    slots = j + torch.where(j < prefix_length[:, None], 0, (start - prefix_length)[:, None])
    inside = j < total[:, None]
    zero = torch.zeros_like(start)
    rows = (zero.to(device), prefix_length.to(device), start.to(device), length.to(device))
    scales: tuple[Tensor, ...] = ()
    if fp8:
        (keys, key_scales), (values, value_scales) = quantize_fp8(keys), quantize_fp8(values)
        scales = (key_scales, value_scales)
    return Inputs(q, keys, values, rows, scales, slots.where(inside, 0).to(device), inside.to(device))


def padded(x: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values [R, H, longest, E]."""
    pools = [pool[x.slots].to(dtype) for pool in (x.keys, x.values)]
    if x.scales:
        pools = [pool * s[x.slots][..., None].to(dtype) for pool, s in zip(pools, x.scales, strict=True)]
    return [pool.transpose(1, 2) for pool in pools]


def attend(q: Tensor, keys: Tensor, values: Tensor, inside: Tensor) -> Outputs:
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=inside[:, None, None])
    return [out.reshape(len(q), -1)]


def eager(x: Inputs) -> Outputs:
    keys, values = padded(x, x.q.dtype)
    return attend(x.q, keys, values, x.inside)


def static_cache(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.scales:
        raise Unavailable("a static cache holds no float8")
    keys, values = padded(x, x.q.dtype)
    return x.q, keys.contiguous(), values.contiguous(), x.inside


def ours(x: Inputs, *, impl: Impl) -> Outputs:
    key_scales, value_scales = x.scales or (None, None)
    return [
        decode_attention(x.q, x.keys, x.values, *x.rows, key_scales=key_scales, value_scales=value_scales, impl=impl)
    ]


def case(H: int, E: int, total: Tensor, prefix: int, fp8: bool, dtype: torch.dtype, device: str) -> Case:
    R, impl = len(total), kernel(device)
    size = 1 if fp8 else dtype.itemsize
    shared = int(prefix_lengths(R, prefix).sum()) - (prefix if R > 1 else 0)  # read once for all of its rows
    return against_eager(
        {"R": R, "H": H, "E": E, "keys": int(total.max()), "dtype": short(dtype)} | ({"pool": "float8"} if fp8 else {}),
        dtype,
        partial(inputs, H, E, total, prefix, fp8, dtype, device),
        partial(ours, impl=impl),
        eager,
        impl,
        notes=("", "a gather into padded rows, and SDPA with a mask"),
        more={"padded cache": Provider(lambda given: attend(*given), "SDPA with a mask, no gather", static_cache)},
        floor=(int(total.sum()) - shared) * 2 * H * (E * size + (4 if fp8 else 0)),
    )


def cases(device: str, tiny: bool) -> list[Case]:
    if tiny:
        return [case(2, 16, lengths(4, 9, 20), 8, fp8, torch.float32, device) for fp8 in (False, True)]
    shapes = [(4, 32, lengths(128, 60, 80), 35)]
    shapes += [(16, 128, lengths(R, PREFIX + 1, LONGEST), PREFIX) for R in (2, 16, 64, 128)]
    exact = [case(*shape, False, dtype, device) for dtype in DTYPES[device] for shape in shapes]
    return [*exact, case(*shapes[3], True, torch.bfloat16, device)]  # R = 64


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
