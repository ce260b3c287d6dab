"""What the tests of cfg_sample share: tolerances, calls on any device, and the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from oracle import KERNELS, device, moved
from torch import Tensor

from bicot.kernels.cfg_sample import Draw, cfg_sample
from bicot.kernels.dispatch import INTERPRETED

# absolute, of a log-prob: a float32 log-sum-exp of terms near 1; float64 is there for the tests of the formula
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
INF = math.inf
LEAST, MOST = 7183792349, 8209737  # counters that give token 0 the words 0 and 0xFFFFFFCC, under seed 0
INT64 = st.integers(-(2**63), 2**63 - 1)
EXAMPLES = 12 if INTERPRETED else 150
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16]  # where other tests have both
TRUNCATED, GREEDY = {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 0.0}

# every output begins as NaN; the interpreter's NumPy warns of -inf - -inf, which a masked token is
MARKS = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]
kernels = pytest.mark.parametrize("impl", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def few(count: int) -> int:
    """The interpreter takes 15 ms for a row, and 50 to truncate it."""
    return min(count, 6) if INTERPRETED else count


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Logits of deviation 2."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(impl: str, cond: Tensor, uncond: Tensor | None, **options: Any) -> Draw:
    """Call cfg_sample on the device of `impl`, by default with offsets 0, 1, ... and seed 0. Results are on the CPU."""
    options = {"seed": 0, "offset": torch.arange(len(cond))} | options
    there = {key: x.to(device(impl)) if isinstance(x, Tensor) else x for key, x in options.items()}
    logits = (x if x is None else moved(x, device(impl)) for x in (cond, uncond))
    return Draw(*(x.cpu() for x in cfg_sample(*logits, **there, impl=impl)))


def assert_alike(ours: Draw, expected: Draw, rtol: float = 1e-6, atol: float = 1e-5) -> None:
    """The tokens are equal; log-probs may differ by the order in which they were summed."""
    assert torch.equal(ours.token, expected.token)
    torch.testing.assert_close(ours[1:], expected[1:], rtol=rtol, atol=atol)


def assert_draws_what_the_reference_draws(impl: str, cond: Tensor, uncond: Tensor | None, **options: Any) -> None:
    assert_alike(sample(impl, cond, uncond, **options), sample("torch", cond, uncond, **options))


def guided(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Guided logits in the dtype of `cond`."""
    if uncond is None or guidance == 1:
        return cond
    z = uncond + guidance * (cond - uncond)
    return z.masked_fill((cond == -INF) | (uncond == -INF), -INF)


def log_probs(
    cond: Tensor, uncond: Tensor | None, token: Tensor, guidance: float = 1.0, temperature: float = 1.0, **_: Any
) -> list[Tensor]:
    """logp_cond and logp_guided in float64."""
    cond, uncond = cond.double(), None if uncond is None else uncond.double()
    scaled = [z / (temperature or 1.0) for z in (cond, guided(cond, uncond, guidance))]
    return [z.log_softmax(-1).gather(-1, token[:, None])[:, 0] for z in scaled]
