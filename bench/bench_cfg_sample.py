"""cfg_sample: one token a row from guided logits, from all, or from the 50 likeliest, and its log-probs.

python -m bicot.bench.bench_cfg_sample [--device cpu|cuda] [--output FILE.json]
Floor: every logit is read once. Image rows [16, 16384] with guidance 5; text rows [16, 102400] and, truncated,
[2, 102400] without. Checked: the log-probs, that the token survives the truncation, that ours is the first to come in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cfg_sample import Draw, cfg_sample, exponential, philox
from ..kernels.dispatch import Impl
from .harness import Case, Outputs, Provider, compiled, kernel, main, relative_error, short

GUIDANCE, SEED = 5.0, 7
# rows, vocabulary, guidance, top-k
SHAPES = [(16, 16384, True, 0), (16, 102400, False, 0), (2, 102400, False, 50)]
TINY = [(4, 384, True, 0), (4, 384, False, 0), (2, 384, False, 50)]
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


class Inputs(NamedTuple):
    cond: Tensor
    uncond: Tensor | None
    offset: Tensor
    top_k: int


def inputs(B: int, V: int, guidance: bool, top_k: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    both, cond, uncond = torch.randn(3, B, V, generator=generator, device=device)
    logits = [(2 * both + 0.3 * own).to(dtype) for own in (cond, uncond)]
    return Inputs(logits[0], logits[1] if guidance else None, torch.arange(B, device=device), top_k)


def guided(cond: Tensor, uncond: Tensor | None) -> Tensor:
    return cond if uncond is None else uncond + GUIDANCE * (cond - uncond)


def logprobs(cond: Tensor, mixed: Tensor, token: Tensor) -> list[Tensor]:
    return [z.log_softmax(-1).gather(-1, token[:, None])[:, 0] for z in (cond, mixed)]


def eager(x: Inputs) -> Outputs:
    cond = x.cond.float()
    mixed = kept = guided(cond, None if x.uncond is None else x.uncond.float())
    if x.top_k:
        kept = mixed.masked_fill(mixed < mixed.topk(x.top_k).values[:, -1:], -torch.inf)
    token = torch.multinomial(kept.softmax(-1), 1)[:, 0]
    return token, *logprobs(cond, mixed, token)


def ours(x: Inputs, *, impl: Impl) -> Outputs:
    return cfg_sample(x.cond, x.uncond, guidance=GUIDANCE, top_k=x.top_k, seed=SEED, offset=x.offset, impl=impl)


def truth(x: Inputs) -> Callable[[Outputs], float]:
    cond = x.cond.double()
    mixed = guided(cond, None if x.uncond is None else x.uncond.double())
    order = mixed.sort(dim=-1, descending=True, stable=True).indices[:, : x.top_k or None]
    probs = torch.zeros_like(mixed).scatter_(-1, order, mixed.gather(-1, order).softmax(-1))
    least, v = mixed.gather(-1, order[:, -1:]), torch.arange(probs.shape[1], device=probs.device)
    words = torch.stack(philox(SEED, x.offset[:, None], v // 256 * 64 + v % 64))
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


def case(B: int, V: int, guidance: bool, top_k: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)
    labels = {"B": B, "V": V} | ({"guidance": GUIDANCE} if guidance else {"top_k": top_k}) | {"dtype": short(dtype)}
    return Case(
        labels,
        torch.float32,  # what all compute in
        partial(inputs, B, V, guidance, top_k, dtype, device),
        truth,
        {
            "ours": Provider(partial(ours, impl=impl), f'impl="{impl}"'),
            "eager": Provider(eager, "softmax and torch.multinomial"),
            "torch.compile": Provider(compiled(eager), "of eager"),
            "ours in PyTorch": Provider(partial(ours, impl="torch"), 'impl="torch"; the tokens of the kernel'),
        },
        bytes=(2 if guidance else 1) * B * V * dtype.itemsize,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    return [case(*shape, dtype, device) for shape in (TINY if tiny else SHAPES) for dtype in DTYPES[device]]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
