"""Groups without advantages are left out of the update: loss, gradients and weights stay those of all samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import G, config, double_policy, frozen_rollout, our_step, plain_logprobs
from torch import Tensor
from training import ACCUMULATION, SMALL, assert_close_weights, metrics, on_two_ranks, run, weights, write_rows

from bicot.grpo import step
from bicot.grpo.config import Config
from bicot.grpo.data import step_indices
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import skips_groups
from bicot.model.chunk import RolloutChunk
from bicot.model.policy import Policy

DULL_SECOND_AND_THIRD = torch.tensor([-1, 0.3, 0.7] + [0.0] * 6 + [0.0, 1.1, -1.1], dtype=torch.float64)
REWARD = """
class Some:
    name = "some"
    def score(self, images, examples):
        says = [example.task_type == "object" for example in examples]
        return images[:, 0].mean((1, 2)) * images.new_tensor(says)
"""


def plain_loss(policy: Policy, rollout: RolloutChunk, A: Tensor, cfg: Config) -> Tensor:
    """-Σ n_t·A_s·lp_t over all samples, whose gradient is that of every loss type where the ratio is 1."""
    lengths = [len(plan) + rollout.image_tokens.shape[1] for plan in rollout.plans.tolist()]
    longest, loss = cfg.max_completion_length + rollout.image_tokens.shape[1], torch.zeros((), dtype=torch.float64)
    for s, length in enumerate(lengths):
        logp = plain_logprobs(policy.model, rollout, s, None)
        n = {"grpo": length * len(lengths), "gspo": length * len(lengths), "dr_grpo": longest * len(lengths)}
        term = logp if cfg.loss_type == "cispo" else logp - logp.detach() + 1
        loss = loss - (A[s] * term).sum() / n.get(cfg.loss_type, sum(lengths))
    return loss


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each micro-batch that goes through the model."""
    sizes: list[int] = []
    forward = step.token_streams

    def counted(policy: Policy, part: RolloutChunk, *rest: Any) -> Any:
        sizes.append(len(part))
        return forward(policy, part, *rest)

    monkeypatch.setattr(step, "token_streams", counted)
    return sizes


def test_joined_chunks_keep_their_ids_on_the_host() -> None:
    cfg = config()
    rollout = frozen_rollout(double_policy(0), cfg)
    plain = RolloutChunk.cat([rollout[:3], rollout[9:]])
    assert "ids" not in vars(plain)
    parts = [rollout.on_host()[:3], rollout[9:]]
    assert vars(RolloutChunk.cat(parts))["ids"] == plain.ids


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_groups_without_advantages_are_left_out_and_nothing_changes(loss_type: str, forwarded: list[int]) -> None:
    cfg = config(loss_type=loss_type, beta=0.0, epsilon_high=5.0, adam_epsilon=1e-3)
    policy = double_policy(0)
    rollout, plain = frozen_rollout(policy, cfg), copy.deepcopy(policy)
    loss = plain_loss(plain, rollout, DULL_SECOND_AND_THIRD, cfg)
    loss.backward()
    parameters = plain.trainable_parameters()
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    torch.optim.AdamW(parameters, lr=cfg.learning_rate, eps=cfg.adam_epsilon, weight_decay=0.0).step()

    found = our_step(policy, rollout, DULL_SECOND_AND_THIRD, cfg)
    assert forwarded == [2 * G], "two micro-batches with a dull group each have become one without"
    assert found["samples_dropped"] == 0.5
    torch.testing.assert_close([found["loss"], found["grad_norm"]], [loss.detach(), norm], atol=1e-7, rtol=1e-6)
    for a, b in zip(policy.trainable_parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_a_step_without_advantages_moves_weights_by_momentum_alone(forwarded: list[int]) -> None:
    cfg = config(beta=0.0, weight_decay=0.1)
    policy = double_policy(0)
    rollout, optimizer = frozen_rollout(policy, cfg), MasterAdamW(policy.trainable_parameters(), cfg)
    our_step(policy, rollout, DULL_SECOND_AND_THIRD, cfg, optimizer=optimizer)
    other = [p.detach().clone().requires_grad_() for p in policy.trainable_parameters()]
    adamw = torch.optim.AdamW(other, lr=cfg.learning_rate, weight_decay=0.1)
    adamw.load_state_dict(copy.deepcopy(optimizer.adamw.state_dict()))
    for p, own in zip(other, policy.trainable_parameters(), strict=True):
        p.grad = torch.zeros_like(p) if own in optimizer.adamw.state else None
    adamw.step()

    forwarded.clear()
    found = our_step(policy, rollout, torch.zeros(12), cfg, optimizer=optimizer)
    assert found["grad_norm"] == found["loss"] == 0 and forwarded == [1] and found["samples_dropped"] == 11 / 12
    for a, b in zip(policy.trainable_parameters(), other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_groups_are_kept_where_they_affect_the_update(forwarded: list[int]) -> None:
    assert skips_groups(config(beta=0.0)) and not skips_groups(config())
    for changes in (
        {"beta": {"text": 0.0, "image": 0.1}}, {"entropy_coef": {"text": 0.0, "image": 0.1}}, {"loss_type": "bnpo"},
        {"token_weights": "my_module:fn"}, {"deepspeed": "configs/zero2.json"},
    ):  # fmt: skip
        assert not skips_groups(config(**{"beta": 0.0, **changes})), changes
    cfg = config(beta=0.0, loss_type="bnpo")
    policy = double_policy(0)
    found = our_step(policy, frozen_rollout(policy, cfg), DULL_SECOND_AND_THIRD, cfg)
    assert forwarded == [2 * G, 2 * G] and "samples_dropped" not in found


def test_a_rank_without_advantages_joins_the_update(
    job: Path, tmp_path: Path, write_module: Callable[[str, str], None]
) -> None:
    write_module("some_reward", REWARD)
    rows: list[dict[str, str]] = [{}] * 8
    for step_, on_ranks in enumerate([(True, False), (False, False), (False, True), (True, True)]):
        for index, says in zip(step_indices(8, 2, step_, seed=0), on_ranks, strict=True):
            rows[index] = {"prompt": f"a circle and w{index}", "task_type": "object" if says else "non"}
    more = [*SMALL, "--train_file", write_rows(tmp_path / "prompts.jsonl", rows), "--beta", "0"]
    more += ["--rewards.names", "some_reward:Some", "--max_steps", "4", "--per_device_train_batch_size", "1"]
    more += ["--adam_epsilon", "1e-3"]
    run(job, tmp_path / "one", *more, ACCUMULATION, "2")
    # a micro-batch for each sample, so the ranks have 4 and 1
    on_two_ranks(job, tmp_path / "two", *more, "--micro_batch_tokens", "1", modules=tmp_path)
    assert_close_weights(weights(tmp_path / "two"), weights(tmp_path / "one"))
    dropped = [[row["samples_dropped"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert dropped == [[4 / 8, 7 / 8, 4 / 8, 0], [3 / 8, 6 / 8, 3 / 8, 0]]
    norms = [[row["grad_norm"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0][1] == 0 and min(norms[0][0], norms[0][2]) > 0
