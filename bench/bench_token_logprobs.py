"""token_logprobs on the CPU: the C++ kernel against eager PyTorch and torch.compile, forward and forward + backward.

python -m bicot.bench.bench_token_logprobs [--threads 2] [--repeats 15] [--output FILE.json]
GB/s counts the floor: the logits once forward; twice, and the gradient once, with backward.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.token_logprobs import TokenStats, token_logprobs, token_logprobs_ref
from .harness import finish, hardware, quantiles_ms

SHAPES = [(4096, 16384), (512, 102400)]
DTYPES = [torch.float32, torch.bfloat16]
Provider = Callable[[Tensor, Tensor], TokenStats]


def eager(logits: Tensor, targets: Tensor) -> TokenStats:
    logp = logits.float().log_softmax(-1)
    return TokenStats(logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1))


def native(logits: Tensor, targets: Tensor) -> TokenStats:
    return token_logprobs(logits, targets, impl="native")


def forward(provider: Provider, logits: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        provider(logits, targets)


def forward_backward(provider: Provider, logits: Tensor, targets: Tensor) -> None:
    leaf = logits.detach().requires_grad_()
    stats = provider(leaf, targets)
    (stats.logprob.sum() + 0.01 * stats.entropy.sum()).backward()


def check(provider: Provider, logits: Tensor, targets: Tensor) -> None:
    """A speed is never reported for a wrong result."""
    few = slice(0, 8)
    gt = token_logprobs_ref(logits[few].double(), targets[few])
    ours = provider(logits[few], targets[few])
    torch.testing.assert_close(ours, TokenStats(gt.logprob.float(), gt.entropy.float()), atol=2e-4, rtol=2e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    providers: dict[str, Provider] = {
        "native": native,
        "eager": eager,
        "compile": torch.compile(token_logprobs_ref, dynamic=False),
    }
    machine = hardware()
    print(" | ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for N, V in SHAPES:
        generator = torch.Generator().manual_seed(0)
        logits32 = torch.randn(N, V, generator=generator) * 3
        targets = torch.randint(0, V, (N,), generator=generator)
        for dtype in DTYPES:
            logits = logits32.to(dtype)
            torch.compiler.reset()  # past its recompile limit torch.compile would silently time eager
            for provider in providers.values():
                check(provider, logits, targets)
            for step, passes in ((forward, 1), (forward_backward, 3)):
                runs = {name: partial(step, provider, logits, targets) for name, provider in providers.items()}
                times = quantiles_ms(runs, arguments.repeats)
                print(f"\n{step.__name__} [{N}, {V}] {dtype}  (ms p20 / p50 / p80)")
                for name, (p20, p50, p80) in times.items():
                    gbps = passes * logits.nbytes / p50 / 1e6
                    ratio = p50 / times["native"][1]
                    print(f"  {name:8}{p20:9.1f}{p50:9.1f}{p80:9.1f}  {gbps:7.2f} GB/s  native is {ratio:.2f}x")
                    row = {"pass": step.__name__, "N": N, "V": V, "dtype": str(dtype), "provider": name}
                    rows.append(row | {"ms": [round(t, 3) for t in (p20, p50, p80)], "gbps": round(gbps, 2)})
    finish({"bench": "token_logprobs", **machine, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
