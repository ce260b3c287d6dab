"""The subclass of TRL's GRPOTrainer in examples/ trains as GRPOTrainer does: the same losses, metrics and weights.

Both trainers run `train()` from the same checkpoint and seed, so TRL samples the same completions for both. SGD without
gradient clipping hands on the gradient as it is: Adam would divide rounding errors by themselves, and clipping would
hide a wrong normaliser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("trl")

# Relative, in norm, of the update and of each logged value. float32: the two sum in another order, measured up to 2e-6.
# bfloat16: one rounding, 2**-8 = 4e-3, of the logits and of their gradient; TRL rounds them at other places.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
OURS = {"clip_ratio/low_mean": "clip_ratio/low", "clip_ratio/high_mean": "clip_ratio/high"}
VOCABULARY = 24  # so small that a random model ends some completions early
PROMPTS = ["a red circle", "a blue square and two", "of", "User : a"]
MULTISTEP: dict[str, Any] = dict(
    gradient_accumulation_steps=2, per_device_train_batch_size=4, num_iterations=2, max_steps=2
)
KL: dict[str, Any] = dict(beta=0.1)


class Run(NamedTuple):
    """One training: every weight's change, and what was logged at each step."""

    update: Tensor
    logs: list[dict[str, float]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL pings its makers otherwise
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of rollout_func


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of two layers, their logits far from flat; the second one's head is its embedding."""
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)),
        "tied_llama": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    }
    for (name, model), scale in zip(models.items(), (12, 5), strict=True):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(tmp_path_factory.getbasetemp() / name)
    return {name: tmp_path_factory.getbasetemp() / name for name in models}


def bicot_trainer() -> type:
    from bicot.examples.trl_grpo import BicotGRPOTrainer

    return BicotGRPOTrainer


def plain_trainer() -> type:
    from trl import GRPOTrainer

    return GRPOTrainer


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(token % 3 for token in ids) / 10 for ids in completion_ids]


def masked_rollout(prompts: list[str], trainer: Any) -> dict[str, list[list[int]]]:
    """Completions whose second quarter comes from a tool, as an environment's turn in between would."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4 + i % 5 for i in range(len(prompts))]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths],
        "logprobs": [[0.0] * n for n in lengths],
        "env_mask": [[not n // 4 <= i < n // 2 for i in range(n)] for n in lengths],
    }


def train(trainer_class: type, checkpoints: dict[str, Path], output: Path, settings: dict[str, Any]) -> Run:
    from datasets import Dataset
    from trl import GRPOConfig

    defaults = dict(
        max_steps=1, max_completion_length=16, per_device_train_batch_size=8, num_generations=4, optim="sgd",
        lr_scheduler_type="constant", learning_rate=0.01, max_grad_norm=1e9, bf16=False,
    )  # fmt: skip
    unlogged = dict(use_cpu=True, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    settings = defaults | settings
    rollout_func, name = settings.pop("rollout_func", None), settings.pop("model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name])  # the reference model is this checkpoint too ...
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # ... so the policy moves off it, for a KL that is not 0
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = trainer_class(
        model,
        reward,
        args=GRPOConfig(str(output), **settings, **unlogged),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(VOCABULARY),
        rollout_func=rollout_func,
    )
    trainer.train()
    after = [parameter.detach() for parameter in model.parameters()]
    trainer.evaluate()
    update = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    return Run(update, [entry for entry in trainer.state.log_history if "train_runtime" not in entry])


CLIPPED: dict[str, Any] = dict(epsilon=0.1, epsilon_high=0.28, **MULTISTEP, **KL)
TRUNCATED: dict[str, Any] = dict(mask_truncated_completions=True, **MULTISTEP)
CASES: dict[str, dict[str, Any]] = {
    "defaults": dict(num_generations=8, bf16=None),  # loss_type, beta, bfloat16 and all else that `train` does not set
    "float32": {},
    "bfloat16": dict(bf16=True, **MULTISTEP | dict(num_iterations=1, max_steps=1), **KL),
    "grpo": dict(loss_type="grpo", **CLIPPED),
    "dr_grpo": dict(loss_type="dr_grpo", **CLIPPED),
    "bnpo": dict(loss_type="bnpo", **CLIPPED),
    "dapo": dict(loss_type="dapo", **CLIPPED),
    "cispo": dict(loss_type="cispo", **CLIPPED | dict(epsilon_high=1.1)),
    "two_sided": dict(delta=1.5, temperature=0.7, **MULTISTEP),
    "steps_per_generation": dict(steps_per_generation=4, **MULTISTEP | dict(num_iterations=1)),
    "truncated_grpo": dict(loss_type="grpo", **TRUNCATED),
    "truncated_bnpo": dict(loss_type="bnpo", **TRUNCATED),
    "truncated_dapo": dict(loss_type="dapo", **TRUNCATED),
    "tool_mask": dict(loss_type="grpo", rollout_func=masked_rollout, **MULTISTEP),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence", **MULTISTEP, **KL),
    "plain_kl": dict(use_bias_correction_kl=False, **MULTISTEP, **KL),
    "tied_llama": dict(model="tied_llama", **MULTISTEP, **KL),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_like_trl(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = CASES[case]
    exact = settings.get("bf16", False) is False
    tolerance = TOLERANCE["float32" if exact else "bfloat16"]
    theirs, ours = (train(trainer(), checkpoints, tmp_path, settings) for trainer in (plain_trainer, bicot_trainer))
    assert (ours.update - theirs.update).norm() <= tolerance * theirs.update.norm()
    assert len(ours.logs) == len(theirs.logs) == settings.get("max_steps", 1) + 1  # the last one is the evaluation
    for our, their in zip(ours.logs, theirs.logs, strict=True):
        # TRL's clip ratios are then means over sequences, ours over tokens
        clips = () if "importance_sampling_level" in settings else OURS
        names = {"loss", "grad_norm", "kl", "entropy", *clips, *(["eval_loss", "eval_kl"] if exact else [])}
        for name in names & their.keys():
            assert our[OURS.get(name, name)] == pytest.approx(their[name], rel=tolerance, abs=tolerance), name

    # what the case is about has happened
    first, last = ours.logs[0], ours.logs[-2]
    assert ours.update.norm() > 5e-3 and first["loss"] != 0
    assert first["completions/min_length"] < first["completions/max_length"]
    assert (first.get("kl", 0) > 1e-3) == ("beta" in settings)
    if "epsilon_high" in settings:
        assert last["clip_ratio/high"] > 0 and last.get("clip_ratio/low", 1) > 0
    if settings.get("max_steps") == 2:
        assert last["ratio_max"] > settings.get("delta", 1.01)  # completions of an older policy
    if "mask_truncated_completions" in settings:
        assert 0 < first["completions/clipped_ratio"] < 1
