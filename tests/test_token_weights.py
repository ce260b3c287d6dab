"""Weights of single tokens, settings of one stream and the corrected KL, against a plain formula and in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stepping import FORMAT, config, double_policy, frozen_rollout, move, our_step, plain_logprobs
from tiny import ROOT, tiny_policy
from torch import Tensor
from training import ACCUMULATION, SMALL, assert_resumes, assert_same_weights, metrics, run, weights

from bicot.grpo.config import STREAMS, Config
from bicot.grpo.step import reference_logprobs, split
from bicot.grpo.token_weights import Tokens, TokenWeights
from bicot.kernels.token_stream import TokenStream
from bicot.model.chunk import RolloutChunk
from bicot.model.policy import Policy

WEIGHTS = """
import torch

def by_place(tokens):
    place = (1 + tokens.positions) * (2 if tokens.name == "text" else 1)
    return place * tokens.advantages.abs() * tokens.logprobs.exp()
def ones(tokens):
    return torch.ones_like(tokens.positions)
def changed(tokens):
    assert tokens.ref_logprobs is None or tokens.name == "text"
    return 1 + (tokens.logprobs - tokens.ref_logprobs) ** 2 if tokens.name == "text" else tokens.sample % 2 == 0
def short(tokens):
    return tokens.entropies[1:]
def listed(tokens):
    return tokens.entropies.tolist()
def infinite(tokens):
    return tokens.entropies / 0
def two(tokens, others):
    return tokens.entropies
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_weights.py").write_text(WEIGHTS)
    monkeypatch.syspath_prepend(tmp_path)


Weigh = Callable[[str, Tensor, Tensor, Tensor, int], Tensor]  # name, log-probs, reference's, advantage, sample


def plain(policy: Policy, rollout: RolloutChunk, A: Tensor, cfg: Config, weigh: Weigh | None = None) -> list[Tensor]:
    """Loss and gradient norm by (1/N) Σ w·[β·k3 - ratio·A], token by token of each stream."""
    reference, loss, count = double_policy(0), torch.zeros((), dtype=torch.float64), 0
    for s in range(len(rollout)):
        T = len(rollout.plans.tolist()[s])
        logp = plain_logprobs(policy.model, rollout, s, None)
        with torch.no_grad():
            ref = plain_logprobs(reference.model, rollout, s, None)
        for name, part in (("text", slice(0, T)), ("image", slice(T, None))):
            gap, ratio = ref[part] - logp[part], (logp[part] - logp[part].detach()).exp()
            k3 = gap.exp() - gap - 1
            kl = k3 * ratio if cfg.use_bias_correction_kl else k3
            beta = cfg.beta[name] if isinstance(cfg.beta, dict) else cfg.beta
            w = weigh(name, logp[part].detach(), ref[part], A[s], s) if weigh else 1.0
            loss = loss + (w * (beta * kl - ratio * A[s])).sum()
        count += len(logp)
    grads = torch.autograd.grad(loss / count, policy.trainable_parameters(), allow_unused=True)
    return [loss.detach() / count, torch.nn.utils.get_total_norm([g for g in grads if g is not None])]


def compared(cfg: Config, weigh: Weigh | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A step, equal to the plain formula -> the metrics of ours, and loss and gradient norm of the plain one."""
    policy = move(double_policy(0))
    rollout = frozen_rollout(policy, cfg)
    A = torch.linspace(-1, 1.3, len(rollout), dtype=torch.float64)
    expected = plain(policy, rollout, A, cfg, weigh)
    metrics = our_step(policy, rollout, A, cfg)
    found = [metrics[key].double() for key in ("loss", "grad_norm")]
    torch.testing.assert_close(found, [e.double() for e in expected], atol=1e-6, rtol=1e-6)
    return metrics, expected


def differ(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [abs(x / y - 1) > 1e-3 for x, y in zip(a, b, strict=True)]


def test_beta_of_a_stream() -> None:
    _, both = compared(config(beta=20.0))
    for beta in ({"text": 20.0, "image": 0.0}, {"text": 0.0, "image": 20.0}, {"text": 50.0, "image": 20.0}):
        metrics, own = compared(config(beta=beta))
        assert differ(own, both) == [True, True]
        assert {key for key in metrics if key.endswith("/kl")} == {f"{name}/kl" for name in STREAMS if beta[name]}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("policy_logits", ["conditional", "guided"])
def test_a_stream_without_kl_has_no_reference_pass(
    policy_logits: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(policy_logits=policy_logits, beta={"text": 0.0, "image": 0.0, name: 0.5})
    policy = double_policy(0)
    rollout, encoder = frozen_rollout(policy, cfg), policy.prompt_encoder(FORMAT)
    both = reference_logprobs(policy, split(rollout, cfg), encoder, config(policy_logits=policy_logits, beta=0.5))
    blocks: list[int] = []
    lay_out = Policy.lay_out
    monkeypatch.setattr(Policy, "lay_out", lambda self, rows: (blocks.append(len(rows)), lay_out(self, rows))[1])
    alone = reference_logprobs(policy, split(rollout, cfg), encoder, cfg)
    assert set(blocks) == {2 if name == "image" and policy_logits == "guided" else 1}
    for one, other in zip(alone, both, strict=True):
        assert list(one) == [name] and list(other) == list(STREAMS)
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-12)


def test_the_corrected_kl_has_another_gradient_and_the_same_value() -> None:
    """On policy the ratio is 1, but its derivative is not 0."""
    _, uncorrected = compared(config(beta=0.5))
    _, corrected = compared(config(beta=0.5, use_bias_correction_kl=True))
    assert differ(corrected, uncorrected) == [False, True]


def test_clip_range_and_entropy_bonus_of_a_stream() -> None:
    policy = double_policy(0)
    cfg = config(beta=0.0, entropy_coef={"text": 0.5, "image": 0.0})
    rollout = frozen_rollout(policy, cfg)
    metrics = our_step(policy, rollout, torch.zeros(len(rollout), dtype=torch.float64), cfg)
    text, image = len(rollout.plans.values), rollout.image_tokens.numel()
    expected = -0.5 * metrics["text/entropy"] * text / (text + image)
    torch.testing.assert_close(metrics["loss"], expected.to(metrics["loss"]), atol=1e-6, rtol=1e-6)

    wide = {"text": 1e-6, "image": 1e6}
    for setting, side, advantage in (("epsilon", "low", -1.0), ("epsilon_high", "high", 1.0)):
        cfg = config(beta=0.0, num_iterations=2, learning_rate=0.05, **{setting: wide})
        A = torch.full((len(rollout),), advantage, dtype=torch.float64)
        metrics = our_step(double_policy(0), rollout, A, cfg)
        assert metrics[f"text/clip_ratio/{side}"] > 0 and metrics[f"image/clip_ratio/{side}"] == 0


def test_token_weights_equal_the_plain_formula() -> None:
    def by_place(name: str, logp: Tensor, ref: Tensor, A: Tensor, s: int) -> Tensor:
        return (1 + torch.arange(len(logp))) * A.abs() * logp.exp() * (2 if name == "text" else 1)

    def changed(name: str, logp: Tensor, ref: Tensor, A: Tensor, s: int) -> Tensor:
        sample = s % config().micro_batch
        return 1 + (logp - ref) ** 2 if name == "text" else torch.full_like(logp, sample % 2 == 0)

    _, equal = compared(config())
    _, placed = compared(config(token_weights="my_weights:by_place"), by_place)
    _, moved = compared(config(beta={"text": 0.1, "image": 0.0}, token_weights="my_weights:changed"), changed)
    assert differ(placed, equal) == differ(moved, equal) == [True, True]
    compared(config(token_weights="my_weights:ones"))


def test_without_token_weights_nothing_is_computed_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    stats = TokenStream.stats
    monkeypatch.setattr(TokenStream, "stats", lambda self: (calls.append(torch.is_grad_enabled()), stats(self))[1])
    for name, count in ((None, 0), ("my_weights:ones", 2 * 2 * 2)):  # streams, micro-batches, iterations
        policy = tiny_policy()
        cfg = config(beta=0.0, num_iterations=2, token_weights=name)
        rollout = frozen_rollout(policy, cfg)
        our_step(policy, rollout, torch.linspace(-1, 1, len(rollout)), cfg)
        assert calls == [False] * count


def stream(N: int) -> TokenStream:
    return TokenStream(torch.zeros(N, dtype=torch.int64), torch.arange(N), logits=torch.randn(N, 5), name="text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_weights", "token_weights 'my_weights' must be package.module:name"),
        ("my_weights:none", "token_weights 'my_weights:none' cannot be imported: .* no attribute 'none'"),
        ("my_weights:two", "token_weights 'my_weights:two' must be a function of one argument, the tokens: missing"),
        ("my_weights:number", "token_weights 'my_weights:number' must be a function of one argument"),
    ],
)
def test_names_of_no_function_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWeights(name)


@pytest.mark.parametrize(
    ("name", "found"),
    [("short", r"a tensor \[2\] on cpu"), ("listed", "list"), ("infinite", "weights that are not finite")],
)
def test_weights_of_another_shape_or_not_finite(name: str, found: str) -> None:
    weigh = TokenWeights(f"my_weights:{name}")
    message = f"token_weights 'my_weights:{name}' returned {found} for the text tokens; it must return a tensor .3. of"
    with pytest.raises(ValueError, match=message):
        weigh(stream(3), torch.ones(3))
    assert weigh(stream(0), torch.ones(3)).shape == (0,), "a stream without tokens is not asked"


def tokens(name: str = "text", ref: bool = True) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs, entropies = torch.randn(3, 10, generator=generator)
    sample = torch.arange(2).repeat_interleave(5)
    return Tokens(
        name=name, targets=torch.arange(10), logprobs=logprobs, entropies=entropies.abs(),
        ref_logprobs=ref_logprobs if ref else None, positions=torch.arange(5).repeat(2), sample=sample,
        advantages=torch.tensor([1.0, -1.0])[sample],
    )  # fmt: skip


def test_entropy_selective_keeps_the_top_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from bicot.examples import entropy_selective

    given = tokens()
    kept = entropy_selective.weights(given)
    assert kept.sum() == 2 and set(kept.nonzero()[:, 0].tolist()) == set(given.entropies.topk(2).indices.tolist())
    monkeypatch.setitem(entropy_selective.TOP_ENTROPY_QUANTILE, "text", 1.0)
    assert entropy_selective.weights(given).all()


def test_critical_tokens_weigh_early_and_moved_tokens_more() -> None:
    from bicot.examples import critical_tokens

    early = critical_tokens.weights(tokens(ref=False)).view(2, 5)
    assert (early.diff(dim=1) < 0).all() and torch.equal(early[0], early[1])
    given = tokens()
    moved = critical_tokens.weights(given)
    e = torch.exp(-given.positions / (0.2 * 5))
    m = (given.logprobs - given.ref_logprobs).abs()
    torch.testing.assert_close(moved, (e / e.mean() + m / m.mean()) / 2)
    torch.testing.assert_close(moved.mean(), torch.tensor(1.0))


TWO_STEPS = (*SMALL, ACCUMULATION, "1", "--max_steps", "2")


def test_the_examples_train(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run(job, tmp_path / "plain", *TWO_STEPS)
    run(job, tmp_path / "ones", *TWO_STEPS, "--token_weights", "my_weights:ones")
    plain = weights(tmp_path / "plain")
    assert_same_weights(plain, weights(tmp_path / "ones"))
    for name in ("entropy_selective", "critical_tokens"):
        run(job, tmp_path / name, *TWO_STEPS, "--token_weights", f"examples.{name}:weights")
        rows = metrics(tmp_path / name)
        assert [row["update_skipped"] for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
        assert not torch.equal(plain["lm_head.weight"], weights(tmp_path / name)["lm_head.weight"])


def test_settings_of_a_stream_train_and_resume(job: Path, tmp_path: Path) -> None:
    more = ("--beta", "{text: 0.01, image: 0.0}", "--epsilon", "{text: 0.2, image: 0.1}")
    rows = metrics(assert_resumes(job, tmp_path, *TWO_STEPS, *more, stop=1))
    assert rows[0]["text/kl"] == 0 < rows[1]["text/kl"] and all("image/kl" not in row for row in rows)
