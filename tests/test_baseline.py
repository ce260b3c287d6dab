"""The baseline is the same algorithm: its loss and gradients are those of bicot's update. And the bench of both."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tiny import tiny_policy
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bicot.bench import bench_step, bench_train, report
from bicot.bench.baseline_t2i_r1 import Rollout, baseline_loss, baseline_step, draw, score, write_plans
from bicot.bench.harness import Unavailable
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.metrics import Phases
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import reference_logprobs, split, update
from bicot.kernels.group_advantages import group_advantages
from bicot.model.body import Norm
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.packed import Packed
from bicot.model.policy import Policy
from bicot.model.prompts import PromptEncoder, PromptFormat
from bicot.model.settings import Sampling
from bicot.rewards.base import Example

ALONE = Ranks(0, 1, torch.device("cpu"))
FORMAT = PromptFormat("t2i_r1", "", "plan {}")
EXAMPLES = [Example(p, "object") for p in ("a red circle", "two blue square and a circle of w1 w2", "w3", "a w7 w8")]
G = 3
SETTING = bench_step.settings("cpu", True, "tiny")[0]
PHASES = {"plan", "draw", "decode", "reward", "reference", "train"}


class Recording(MasterAdamW):
    """Keeps the gradients of its last step."""

    def step(self, ranks: Ranks) -> Tensor:
        self.grads = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in self.masters]
        return super().step(ranks)


class Brightness:
    """Counts its calls."""

    name = "brightness"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.sizes.append(len(images))
        return images.mean((1, 2, 3))


def config(**changes: object) -> Config:
    base = dict(
        dtype="float32", num_generations=G, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_completion_length=9, top_k=0, cfg_weight=2.0, beta=0.03, learning_rate=1e-3, max_steps=4,
        lr_scheduler_type="constant", rewards=RewardConfig("scene"),
    )  # fmt: skip
    return Config(**{**base, **changes})  # type: ignore[arg-type]


def policies() -> tuple[Policy, Policy]:
    """A policy that has moved from its reference."""
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=0)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    reference.model.requires_grad_(False)
    return policy, reference


def encoder_of(policy: Policy) -> PromptEncoder:
    return policy.prompt_encoder(FORMAT)


def frozen(policy: Policy, lengths: Sequence[int] = (9, 1, 4, 7, 7, 2, 3, 9, 5, 6, 8, 1)) -> RolloutChunk:
    """Samples of random tokens; plans of these lengths."""
    encoder, draw_ids = encoder_of(policy), torch.Generator().manual_seed(3)
    each = [e.prompt for e in EXAMPLES for _ in range(G)]
    plans = [torch.randint(7, 61, (n,), generator=draw_ids).tolist() for n in lengths]
    texts = list(map(encoder.decode_plan, plans))
    tokens = torch.randint(37, (len(each), 16), generator=draw_ids)
    packed, unused = Packed.of(plans), torch.zeros(tokens.shape)
    return RolloutChunk(
        prompts=Packed.of([encoder.plan_ids(prompt, 9) for prompt in each]),
        plans=packed,
        plan_logprobs=packed,
        plan_texts=texts,
        truncated=torch.zeros(len(each), dtype=torch.bool),
        image_prompts=Packed.of([encoder.image_ids(*both, 16) for both in zip(each, texts, strict=True)]),
        image_tokens=tokens,
        image_logprobs=unused,
        guided_logprobs=unused,
        images=unused,
        spans=(),
    )


@pytest.mark.parametrize("beta", [0.0, 0.03])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_loss_and_gradients_are_those_of_the_update(loss_type: str, beta: float) -> None:
    cfg = config(loss_type=loss_type, beta=beta)
    policy, reference = policies()
    rollout = frozen(policy)
    rewards = torch.randn(len(rollout), 2, generator=torch.Generator().manual_seed(2))
    parts = split(rollout, cfg)
    assert len(parts) == 2

    other = copy.deepcopy(policy)
    loss = torch.zeros(())
    total = sum(Rollout.of(part).num_tokens for part in parts)
    for i, part in enumerate(parts):
        count = 2 * Rollout.of(part).num_tokens if loss_type == "bnpo" else total
        scores = rewards[i * len(part) :][: len(part)]
        one = baseline_loss(other, reference if beta else None, Rollout.of(part), scores, cfg, num_tokens=count)
        one.backward()
        loss += one.detach()

    optimizer = Recording(policy.trainable_parameters(), cfg)
    ref = reference_logprobs(reference, parts, encoder_of(policy), cfg) if beta else None
    metrics = update(policy, optimizer, parts, group_advantages(rewards, G), ref, encoder_of(policy), cfg, ALONE)
    torch.testing.assert_close(loss, metrics["loss"], atol=1e-6, rtol=1e-5)
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    largest = max(grad.abs().max() for grad in optimizer.grads)
    assert largest > 1e-3
    for name, ours, p in zip(names, optimizer.grads, other.trainable_parameters(), strict=True):
        theirs = torch.zeros_like(ours) if p.grad is None else p.grad
        torch.testing.assert_close(
            theirs, ours, atol=2e-6 * largest.item(), rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    if beta:
        no_kl = baseline_loss(other, None, Rollout.of(parts[0]), rewards[: len(parts[0])], config(beta=0.0))
        with_kl = baseline_loss(other, reference, Rollout.of(parts[0]), rewards[: len(parts[0])], cfg)
        assert (no_kl - with_kl).abs() > 1e-4, "the KL must take part"


def test_the_default_normaliser_is_the_micro_batch() -> None:
    cfg = config(beta=0.0)
    policy, _ = policies()
    part = Rollout.of(frozen(policy)[: 2 * G])
    rewards = torch.linspace(0, 1, 2 * G)[:, None] ** 2
    alone, counted = (baseline_loss(policy, None, part, rewards, cfg, num_tokens=n) for n in (None, 100))
    torch.testing.assert_close(alone * part.num_tokens, counted * 100)


def test_it_refuses_what_was_not_published() -> None:
    policy, _ = policies()
    cfg = config(beta=0.0)
    part = Rollout.of(frozen(policy)[:G])
    rewards = torch.rand(G, 1)
    for changes in ({"temperature": 0.7}, {"policy_logits": "guided"}, {"num_iterations": 2}, {"loss_type": "grpo"}):
        with pytest.raises(ValueError, match="not the published algorithm"):
            baseline_loss(policy, None, part, rewards, config(beta=0.0, **changes))
    with pytest.raises(ValueError, match="missing rewards"):
        baseline_loss(policy, None, part, rewards.fill_(torch.nan), cfg)


def sharpened(policy: Policy) -> Policy:
    """All but greedy, at any seed."""
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1e4)
        policy.model.model.generation_head.vision_head.weight.mul_(1e4)
    return policy


def test_its_draws_are_those_of_the_engine() -> None:
    policy = sharpened(policies()[0])
    encoder, prompts = encoder_of(policy), [e.prompt for e in EXAMPLES]

    def ours(w: float) -> RolloutChunk:
        engine = RolloutEngine(policy, encoder)
        return RolloutChunk.cat(list(engine.generate(prompts, 1, Sampling(9, top_k=0, cfg_weight=w), seed=1)))

    first = ours(1.0)
    with torch.no_grad():  # EOS and a token of the first plan change places
        eos, token = policy.tokenizer.eos_token_id, first.plans.tolist()[0][4]
        policy.model.lm_head.weight[[eos, token]] = policy.model.lm_head.weight[[token, eos]]
    for w in (1.0, 3.0, 20.0):
        cfg, drawn = config(cfg_weight=w), ours(w)
        plans = write_plans(policy, [encoder.plan_ids(prompt, 9) for prompt in prompts], cfg)
        assert plans == drawn.plans.tolist() and plans[0][-1] == eos and {len(plan) for plan in plans} > {9}
        assert torch.equal(draw(policy, drawn.image_prompts.tolist(), encoder, cfg), drawn.image_tokens)
    assert not torch.equal(first.image_tokens, drawn.image_tokens), "guidance must take part"


def test_top_k_is_that_of_the_settings() -> None:
    policy, _ = policies()
    prompts = [encoder_of(policy).plan_ids(EXAMPLES[0].prompt, 9)] * 8
    torch.manual_seed(0)
    assert len({tuple(plan) for plan in write_plans(policy, prompts, config(top_k=1))}) == 1
    assert len({tuple(plan) for plan in write_plans(policy, prompts, config(top_k=0))}) > 4


def test_one_picture_at_a_time() -> None:
    reward = Brightness()
    images = torch.rand(3, 3, 4, 4)
    scores = score([reward, Brightness()], images, EXAMPLES[:3])
    assert reward.sizes == [1, 1, 1]
    torch.testing.assert_close(scores, images.mean((1, 2, 3))[:, None].expand(3, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_a_step_ends_where_ours_does(loss_type: str, checkpointing: bool) -> None:
    """Its own samples and scores, put through the update: the same weights."""
    cfg = config(gradient_checkpointing=checkpointing, loss_type=loss_type, max_grad_norm=1e-3)
    (policy, reference), (other, _) = policies(), policies()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    training = []
    policy.decoder.register_forward_hook(lambda *_: training.append((torch.is_grad_enabled(), policy.model.training)))
    optimizer, phases, reward = Recording(policy.trainable_parameters(), cfg), Phases([], policy.device), Brightness()
    arguments = (policy, reference, optimizer, encoder_of(policy), [reward], EXAMPLES, cfg)
    parts = baseline_step(*arguments, seed=3, phases=phases)
    assert phases.seconds.keys() == PHASES and min(phases.seconds.values()) > 0
    assert [len(part.plans) for part in parts] == [2 * G, 2 * G] and len(reward.sizes) == 4 * G
    assert all(plan.count(1) <= 1 and 0 < len(plan) <= 9 for part in parts for plan in part.plans)
    assert set(training) == {(False, False), (True, checkpointing)} and not policy.model.training
    assert optimizer.schedule.last_epoch == 1

    template, chunks = frozen(policy)[: 2 * G], []
    for part in parts:
        lists = {key: Packed.of(getattr(part, key)) for key in ("prompts", "plans", "image_prompts")}
        chunks.append(replace(template, **lists, image_tokens=part.image_tokens))
    scores = torch.cat([Brightness().score(part.images, EXAMPLES[: 2 * G]) for part in parts])[:, None]
    ours = Recording(other.trainable_parameters(), cfg)
    ref = reference_logprobs(reference, chunks, encoder_of(other), cfg)
    update(other, ours, chunks, group_advantages(scores, G), ref, encoder_of(other), cfg, ALONE)
    largest = max(grad.abs().max().item() for grad in ours.grads)
    for grad, expected in zip(optimizer.grads, ours.grads, strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-5 * largest, rtol=1e-3)
    for (name, p), q, old in zip(
        policy.model.named_parameters(), other.model.parameters(), policies()[0].model.parameters(), strict=True
    ):
        assert torch.equal(p, old) != p.requires_grad and torch.equal(q, old) != q.requires_grad, name


def test_bfloat16_weights_train_through_their_masters() -> None:
    cfg = config(dtype="bfloat16", learning_rate=0.05)
    policy, reference = policies()
    for each in (policy, reference):
        each.model.bfloat16()
    before = policy.model.lm_head.weight.detach().clone()
    arguments = (policy, reference, MasterAdamW(policy.trainable_parameters(), cfg), encoder_of(policy))
    baseline_step(*arguments, [Brightness()], EXAMPLES, cfg, seed=3, phases=Phases([], policy.device))
    assert not torch.equal(policy.model.lm_head.weight, before)


@pytest.fixture
def contest(tmp_path: Path) -> bench_step.Contest:
    return bench_step.Contest(SETTING, ALONE, str(tmp_path / "run"))


def test_both_start_from_one_policy_and_train_it(contest: bench_step.Contest) -> None:
    weights = contest.policy.model.lm_head.weight
    assert contest.reference and not any(p.requires_grad for p in contest.reference.model.parameters())
    trained = {name.split(".")[1] for name, p in contest.policy.model.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "weight"}, "the body, and lm_head.weight"
    for run in (contest.baseline, contest.ours):
        before, phases = weights.detach().clone(), Phases([], contest.ranks.device)
        assert run(1, phases) == 4.0, "plans run to their limit"
        assert not torch.equal(weights, before) and phases.seconds.keys() == PHASES


def run_main(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(bench_step, "settings", lambda *_: [SETTING])
    monkeypatch.setattr(bench_step, "logging", MagicMock())  # other tests may wait for a warning
    monkeypatch.setattr(sys, "argv", ["step", "--device", "cpu", "--tiny", *options])
    return bench_step.main()


def test_another_algorithm_is_not_timed(
    contest: bench_step.Contest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contest.check(0) < 1e-4
    wrong = lambda *arguments, **options: 1.01 * baseline_loss(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(bench_step, "baseline_loss", wrong)
    assert run_main(monkeypatch) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["rows"] and "differ by 0.01, beyond" in result["failed"][0]["reason"]


def test_the_walk_and_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "step.json"
    assert run_main(monkeypatch, "--repeats", "2", "--output", str(file)) == 0
    result = json.loads(file.read_text())
    ours, baseline = result["rows"]
    assert (ours["provider"], baseline["provider"]) == ("ours", "baseline") and ours["case"] == baseline["case"]
    assert (ours["images"], baseline["images"]) == (4, 2) and "one micro-batch" in baseline["note"]
    for row in (ours, baseline):
        assert row["steps"] == 2 and row["seconds"] == sorted(row["seconds"])
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"][1], rel=0.01)
        assert row["phases"].keys() == PHASES | {"rest"}
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"][1], rel=0.01)
        assert row["peak_mib"] is None and row["joules_per_image"] is None
    page = report.step(result)
    for theirs, own in (
        (baseline["phases"]["draw"], ours["phases"]["draw"]),
        (baseline["seconds"][1], ours["seconds"][1]),
    ):
        assert f"{report.number(2 * theirs / own)}×" in page, "how many times longer an image takes"


def test_a_step_is_written_when_it_has_been_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "step.json", []

    def stopped(*_: object) -> float:
        seen.append(json.loads(file.read_text()))
        raise RuntimeError("out of time")

    monkeypatch.setattr(bench_step.Contest, "baseline", stopped)
    assert run_main(monkeypatch, "--output", str(file)) == 1
    (row,) = seen[0]["rows"]
    assert row["provider"] == "ours" and row["steps"] == 1 and row["error"] < 1e-4
    result = json.loads(file.read_text())
    assert result["rows"] == [row] and result["failed"][0]["provider"] == "baseline"


def test_steps_along_a_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--vary", "num_generations", "2", "4", "--repeats", "1") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["case"]["num_generations"], row["images"], row["provider"]) for row in rows] == [
        (2, 4, "ours"), (4, 8, "ours"),
    ]  # fmt: skip
    for wrong in (["num_generation", "2"], ["num_generations", "many"]):
        with pytest.raises(SystemExit):
            run_main(monkeypatch, "--vary", *wrong)
        assert f"--vary {' '.join(wrong)}" in capsys.readouterr().err


def test_ours_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--ours-alone", "--repeats", "1") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,), (entry,) = result["rows"], result["skipped"]
    assert row["provider"] == "ours" and row["steps"] == 1 and row["seconds"] == [row["seconds"][0]] * 3
    assert entry["provider"] == "baseline" and "--ours-alone" in result["command"]
    assert "| 1 × 4 |" in report.step(result)


def test_settings_that_are_asked_for() -> None:
    published, large = bench_step.settings("cuda", False)
    assert (published.model, large.model) == ("Janus-Pro-1B", "Janus-Pro-7B") and published.image_tokens == 576
    assert published.images == {"ours": 16, "baseline": 8}, "of the baseline one micro-batch"
    assert [each.images for each in bench_step.settings("cpu", False)] == [{"ours": 64, "baseline": 64}] * 2
    (small,) = bench_step.settings("cuda", False, "Janus-Pro-1B", 144)
    assert small.image_tokens == 144 and small.images == {"ours": 16, "baseline": 8}


def test_training_variants_and_peers_agree_and_recompute() -> None:
    seen = []
    for case in bench_train.cases("cpu", True):
        x = case.inputs()
        error_of = case.truth(x)
        for name in ("ours", "eager"):
            decoder, calls, norms = x.contest.policy.decoder, [], set()
            hooks = [
                decoder.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)),
                decoder.norm.register_forward_pre_hook(lambda norm, _, norms=norms: norms.add(type(norm))),
            ]
            assert case.check(case.providers[name], x, error_of) < 1e-5, "and no update changes the weights"
            for hook in hooks:
                hook.remove()
            assert case.labels["phase"] == "reference" or norms == {Norm if name == "ours" else LlamaRMSNorm}
            if case.labels["phase"] == "update":
                with pytest.raises(AssertionError, match="beyond"):
                    case.check(
                        case.providers[name], x._replace(rewards=x.rewards * (torch.arange(4) < 2).view(4, 1)), error_of
                    )
                recomputed = "recomputed" in case.labels["activations"]
                seen.append((name, case.labels["micro-batches"], recomputed, len(calls)))
        with pytest.raises(Unavailable, match="a GPU"):
            case.providers["Liger"].run(x)
    assert [s for s in seen if s[0] == "ours"] == [
        ("ours", 1, False, 1), ("ours", 2, False, 2), ("ours", 1, True, 2), ("ours", 2, True, 4)
    ]  # fmt: skip
    assert [s[3] for s in seen if s[0] == "eager"] == [2, 4, 4, 8], "text and image apart"


def test_section() -> None:
    case = {"model": "M", "guidance": 5.0}
    rows = [
        {
            "case": case, "provider": name, "seconds": [1.0 * k, 2.0 * k, 3.0 * k], "images_per_s": 8 / k, "steps": 3,
            "images": 16 // k, "note": "a part" if k == 4 else "", "error": 0.0,
            "phases": dict.fromkeys((*bench_step.PHASES, "rest"), 0.25 * k) | {"reward": k - 1.0}, "plan_tokens": 9.5,
            "peak_mib": 1000 * k, "joules_per_image": 30.0 * k,
        }
        for name, k in (("ours", 1), ("baseline", 4))
    ]  # fmt: skip
    machine = {"gpu": "H", "gpu_state": "1 GHz", "torch": "2", "triton": "3", "commit": "abc", "device": "cuda"}
    result = {
        "bench": "step", "about": "About.", "command": "run it", **machine, "rows": rows,
        "skipped": [{"case": {"model": "L"}, "provider": "both", "reason": "out of memory"}], "failed": [],
    }  # fmt: skip
    page = report.step(result)
    assert "## step on H\n\n`run it` on H (1 GHz), triton 3" in page
    assert "| M, guidance 5.0 | ours | 3 × 16 | 2.00 [1.00 to 3.00] | 8.00 | 1000 | 30.0 | 9.5 |  |" in page
    assert "|  | baseline | 3 × 4 | 8.00 [4.00 to 12.0] | 2.00 | 4000 | 120 | 9.5 | 16.0× |" in page
    assert "| M, guidance 5.0 | ours | 15.6 | 15.6 | 15.6 | 0.00 | 15.6 |" in page
    assert "|  | baseline | 250 (16.0×) | 250 (16.0×) | 250 (16.0×) | 750 | 250 (16.0×) |" in page
    assert page.endswith("- baseline: a part\n- L, both: not run: out of memory\n")
