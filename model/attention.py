"""Causal attention of whole sequences, by one of several implementations.

`sdpa` takes a rectangle in which each sequence is padded to the longest. The others take the sequences end to end,
without padding. For `auto`, sequences.py times those that can run on this device, and takes the fastest.

Shapes: S sequences at M places, Hq query and Hkv key/value heads of E elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["sdpa", "varlen", "flash_attn", "xformers", "auto"]


@dataclass(frozen=True)
class Places:
    """The M places of S sequences, one sequence after the other. M is S·L with padding, and Σ lengths without.

    Args:
        shape: (S, L), where L is the length of the longest sequence.
        lengths: length of each sequence.
        offsets: [S + 1] int32, where each sequence begins if there is no padding.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    offsets: Tensor


# q [M, Hq, E], k and v [M, Hkv, E], places, and the factor of the scores (None = E^-1/2) -> [M, Hq, E]
Attend = Callable[[Tensor, Tensor, Tensor, Places, float | None], Tensor]
# the module that each implementation imports, and the command that installs it
_NEEDS = {
    "varlen": ("torch.nn.attention.varlen", "pip install 'torch>=2.11'"),
    "flash_attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "xformers": ("xformers.ops", "pip install xformers"),
}


@dataclass
class Attention:
    """The implementation of a run, which its policies share. `auto` becomes another name in their first pass."""

    name: str = "sdpa"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float | None) -> Tensor:
    q, k, v = (x.view(*places.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = places.offsets, places.shape[1]
    each = (q, _for_each_query(k, q), _for_each_query(v, q), starts, starts, longest, longest)
    out = varlen_attn(*each, scale=scale, window_size=(-1, 0))  # causal: no key after the query
    assert isinstance(out, Tensor)
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    starts, longest = places.offsets, places.shape[1]
    each = (q, k, v, starts, starts, longest, longest)
    return flash_attn_varlen_func(*each, softmax_scale=scale, causal=True, deterministic=True)


def _xformers(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    each = (x[None] for x in (q, _for_each_query(k, q), _for_each_query(v, q)))
    return memory_efficient_attention(*each, attn_bias=_mask(places.lengths, q.device), scale=scale)[0]


@lru_cache(maxsize=2)
def _mask(lengths: tuple[int, ...], device: torch.device) -> object:
    """The mask of a pass, shared by all layers. It is copied to the device without waiting."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return BlockDiagonalCausalMask.from_seqlens(lengths, device=device)


def _for_each_query(x: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values for their query heads: [M, Hkv, E] -> [M, Hq, E]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


IMPLEMENTATIONS: dict[str, Attend] = {
    "sdpa": _sdpa, "varlen": _varlen, "flash_attn": _flash_attn, "xformers": _xformers,
}  # fmt: skip


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Check that the implementation, or `auto`, can run with this device and dtype.

    Raises:
        ValueError: it is not installed, or cannot run with them.
    """
    if name in _NEEDS and (why := _missing(name, device, dtype)):
        raise ValueError(f"attn_implementation={name} {why}")
    return Attention(name)


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The implementations that can run with this device and dtype; `sdpa` always can."""
    return [name for name in IMPLEMENTATIONS if name not in _NEEDS or not _missing(name, device, dtype)]


def _missing(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the implementation cannot run; "" if it can."""
    module, install = _NEEDS[name]
    try:
        import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library built for another torch or CUDA
        return f"is not installed ({error}): {install}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer, not {device}: take sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs dtype=bfloat16, not {str(dtype).removeprefix('torch.')}: take sdpa"
    return ""
