"""Token streams for the tests of grpo_loss, and the loss as a sum over tokens, in scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from bicot.kernels.grpo_loss import KLEstimator, LossType, TokenStream

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
KL_ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)

# Five samples; the last has no token, the one before it no text. Ratios below, within and above [0.8, 1.28], each with
# both signs of the advantage, token by token and (gspo) as a sample's geometric mean: 0.65, 1.60, 1.39, 0.68.
ADVANTAGES = [1.0, -1.0, 0.5, -0.7, 0.3]
SAMPLES = [[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 3, 3, 3]]
RATIOS = [[0.5, 0.9, 1.5, 1.5, 2.5, 1.1], [0.6, 1.1, 2.5, 0.9, 0.5, 0.7, 0.9]]
SAMPLING_RATIOS = [0.5, 4.0, 1.0, 1.2, 0.8, 3.5, 0.9]  # two above the bound of 3
OPTIONS: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28, "max_completion_length": 11}
KINDS = {
    "normal": lambda x: 2 * x,
    "tied": torch.zeros_like,
    "peaked": lambda x: x + 30 * (torch.arange(x.shape[1]) == x.shape[1] // 2),
    "negative": lambda x: x - 100,
    "offset": lambda x: x + 1e4,
}
PER_TOKEN = ("targets", "sample", "ref_logprob", "old_logprob", "sampling_logprob")
FLOATING = ("logits", "hidden", "weight", "bias", "ref_logprob", "old_logprob", "sampling_logprob", "token_weight")


def options_for(loss_type: LossType) -> dict[str, Any]:
    return {**OPTIONS, "loss_type": loss_type, "epsilon_high": 1.3 if loss_type == "cispo" else 0.28}


def token_stats(stream: TokenStream, n: int) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of token n."""
    if stream.logits is not None:
        z = stream.logits[n].double()
    else:
        z = stream.weight.double() @ stream.hidden[n].double()
        z = z if stream.bias is None else z + stream.bias.double()
    z = z / stream.temperature
    logp = z - z.exp().sum().log()
    return logp[stream.targets[n]], -(logp.exp() * logp).sum()


def oracle(
    streams: list[TokenStream],
    advantages: list[float],
    *,
    loss_type: LossType = "dapo",
    importance_sampling_level: str = "token",
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = False,
    delta: float | None = None,
    importance_sampling_clip_max: float = 3.0,
    max_completion_length: int = 1,
    num_tokens: int | None = None,
    num_samples: int | None = None,
    **coefficients: float,
) -> Tensor:
    """The loss as a sum over tokens in float64."""
    given = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.2, "entropy_coef": 0.0} | coefficients
    tokens = []
    for stream in streams:
        own = given | {name: value for name in given if (value := getattr(stream, name)) is not None}
        for n, sample in enumerate(stream.sample.tolist()):
            lp, entropy = token_stats(stream, n)
            old = lp.detach() if stream.old_logprob is None else stream.old_logprob[n].double()
            ref = None if stream.ref_logprob is None else stream.ref_logprob[n].double()
            sampler = None if stream.sampling_logprob is None else stream.sampling_logprob[n].double()
            weight = 1.0 if stream.token_weight is None else stream.token_weight[n].item()
            tokens.append((sample, lp, entropy, old, ref, sampler, weight, own))
    lengths = [sum(sample == s for sample, *_ in tokens) for s in range(len(advantages))]
    N, S = num_tokens or len(tokens), num_samples or len(advantages)

    loss = torch.zeros((), dtype=torch.float64)
    for sample, lp, entropy, old, ref, sampler, weight, own in tokens:
        A, low, high = advantages[sample], 1 - own["epsilon"], 1 + own["epsilon_high"]
        ratio = (lp - old).exp()
        if loss_type == "gspo" or importance_sampling_level == "sequence":
            logs = [other[1] - other[3] for other in tokens if other[0] == sample]
            ratio = (sum(logs) / len(logs)).exp()
        if loss_type == "cispo":
            objective = min(ratio.item(), own["epsilon_high"]) * A * lp
        else:
            bounded = ratio if delta is None or ratio <= delta else delta
            clipped = ratio if low <= ratio <= high else low if ratio < 1 else high
            objective = bounded * A if bounded * A <= clipped * A else clipped * A
        if sampler is not None:
            objective = objective * min(math.exp(old - sampler), importance_sampling_clip_max)
        kl: Tensor | float = 0.0
        if own["beta"]:
            gap = lp - ref
            kl = {"k1": gap, "k2": gap * gap / 2, "k3": (-gap).exp() + gap - 1}[kl_estimator]
            kl = kl * ratio if use_bias_correction_kl else kl
        each = lengths[sample] * S
        norms = {"bnpo": len(tokens), "grpo": each, "gspo": each, "dr_grpo": S * max_completion_length}
        term = (own["beta"] * kl - objective) / norms.get(loss_type, N)
        loss = loss + weight * (term - own["entropy_coef"] * entropy / N)
    return loss


def recorded(
    stream: TokenStream, logprob: Tensor, gap: Tensor, ratio: Tensor | None, sampling: Tensor | None, to: torch.dtype
) -> TokenStream:
    """With the log-probs of a reference model, of an older policy and of the sampler, that have these ratios."""
    old = logprob if ratio is None else logprob - ratio.log()
    return replace(
        stream,
        ref_logprob=(logprob + gap).to(to),
        old_logprob=None if ratio is None else old.to(to),
        sampling_logprob=None if sampling is None else (old - sampling.log()).to(to),
    )


def make(dtype: torch.dtype = torch.float64, *, old: bool = False, sampling: bool = False) -> list[TokenStream]:
    """A text and an image stream with their own heads and temperatures."""
    generator = torch.Generator().manual_seed(0)
    streams = []
    settings = zip(("text", "image"), (5, 7), (0.7, 1.3), SAMPLES, RATIOS, strict=True)
    for name, V, temperature, sample, ratios in settings:
        N, D = len(sample), 4
        stream = TokenStream(
            targets=torch.randint(0, V, (N,), generator=generator),
            sample=torch.tensor(sample),
            hidden=torch.randn(N, D, generator=generator).to(dtype).requires_grad_(),
            weight=torch.randn(V, D, generator=generator).to(dtype).requires_grad_(),
            bias=torch.randn(V, generator=generator).to(dtype).requires_grad_(),
            temperature=temperature,
            name=name,
        )
        logprob = torch.stack([token_stats(stream, n)[0].detach() for n in range(N)])
        ratio, sampled = torch.tensor(ratios).double(), torch.tensor(SAMPLING_RATIOS[:N]).double()
        gap = 0.5 * torch.randn(N, generator=generator)
        wide = torch.promote_types(dtype, torch.float32)
        streams.append(recorded(stream, logprob, gap, ratio if old else None, sampled if sampling else None, wide))
    return streams


def random_streams(
    seed: int,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    samples: int = 2,
    kind: str = "normal",
    *,
    logits: bool = True,
    bias: bool = False,
    old: bool = True,
    sampling: bool = False,
) -> list[TokenStream]:
    """Streams of `shapes` (N, V), whose ratios stay away from every bound: there rounding would decide the gradient."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.tensor([0.3, 0.6, 0.9, 1.1, 1.5, 2.5]).double()
    streams = []
    for i, (N, V) in enumerate(shapes):
        # multiples of 1/2, so that logits are exact in bfloat16 in whatever order a matrix product sums
        hidden = torch.randint(-2, 3, (N, 6), generator=generator).to(dtype) / 2
        weight = torch.randint(-3, 4, (V, 6), generator=generator).to(dtype) / 2
        source = {"hidden": hidden, "weight": weight}
        if bias:
            source["bias"] = torch.randint(-8, 9, (V,), generator=generator).to(dtype) / 4
        if logits:
            source = {"logits": KINDS[kind](torch.randn(N, V, generator=generator)).to(dtype)}
        stream = TokenStream(
            targets=torch.randint(0, V, (N,), generator=generator),
            sample=torch.randint(0, samples, (N,), generator=generator),
            temperature=(0.7, 1.3)[i % 2],
            name=f"stream{i}",
            **{name: x.requires_grad_() for name, x in source.items()},
        )
        ratio, sampled = (choice[torch.randint(0, 6, (N,), generator=generator)] for _ in range(2))
        gap = 0.5 * torch.randn(N, generator=generator)
        logprob = stream.stats("torch").logprob.detach().double()
        used = ratio if old else None, sampled if sampling else None
        streams.append(recorded(stream, logprob, gap, *used, torch.float32))
    return streams


def logits_stream(N: int, V: int, sample: list[int], dtype: torch.dtype = torch.float64, **more: Any) -> TokenStream:
    generator = torch.Generator().manual_seed(N)
    logits = (2 * torch.randn(N, V, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    return TokenStream(targets=targets, sample=torch.tensor(sample), logits=logits, **more)


def weighted(stream: TokenStream, to: torch.dtype = torch.float32) -> TokenStream:
    """With a weight for each token, 0 for every third."""
    n = torch.arange(len(stream.targets))
    return replace(stream, token_weight=((n % 3) * (0.5 + n % 2)).to(to))


def some(stream: TokenStream, tokens: Any) -> TokenStream:
    """Some tokens of a stream of hidden states."""
    given = {field: value for field in (*PER_TOKEN, "hidden") if (value := getattr(stream, field)) is not None}
    return replace(stream, **{field: value[tokens] for field, value in given.items()})


def with_logits(stream: TokenStream) -> TokenStream:
    """The same stream from the logits of its head."""
    assert stream.hidden is not None and stream.weight is not None
    logits = linear(stream.hidden, stream.weight, stream.bias)
    return replace(stream, logits=logits, hidden=None, weight=None, bias=None)


def converted(streams: list[TokenStream], to: Any) -> list[TokenStream]:
    """The same streams with new leaves, of another dtype or on another device."""
    fields = FLOATING if isinstance(to, torch.dtype) else (*FLOATING, "targets", "sample")
    moved = []
    for stream in streams:
        values = {f: value for f in fields if (value := getattr(stream, f)) is not None}
        values = {f: v.detach().to(to, copy=True).requires_grad_(v.requires_grad) for f, v in values.items()}
        moved.append(replace(stream, **values))
    return moved


def leaves(streams: list[TokenStream]) -> list[Tensor]:
    candidates = [t for s in streams for t in (s.hidden, s.weight, s.bias, s.logits)]
    return [t for t in candidates if t is not None and t.requires_grad]


def gradients(loss: Tensor, streams: list[TokenStream]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(streams)))


def advantages_of(streams: list[TokenStream]) -> Tensor:
    first = leaves(streams)[0]
    return torch.tensor(ADVANTAGES, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
