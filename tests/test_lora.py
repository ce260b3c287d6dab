"""Runs that train LoRA adapters: what they train and save, that they resume, and that adapters can be merged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy
from training import LORA, assert_resumes, metrics, run, weights, words

from bicot import generate
from bicot.grpo.cli import parse_config
from bicot.grpo.distributed import Ranks
from bicot.grpo.trainer import Trainer
from bicot.model.adapters import add_lora
from bicot.model.merge_lora import main as merge_lora
from bicot.model.merge_lora import merge
from bicot.model.policy import load_policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling

peft = pytest.importorskip("peft")


def test_a_lora_run_resumes_and_is_merged(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*LORA, "--lora_dropout", "0.1", "--max_steps", "4")
    whole = assert_resumes(job, tmp_path, *more)
    last = whole / "checkpoint-000004"
    assert metrics(whole)[-1]["kl"] > 0 and not (last / "model.safetensors").exists()
    names = weights(whole)
    assert len(names) == 2 * (2 * 3 + 1) and all("lora_" in name for name in names)  # of the language model alone

    for rank in ("8", "0"):
        message = f"checkpoint-000004 was trained with lora_r 4, which cannot become {rank} within a run"
        with pytest.raises(ValueError, match=message):
            run(job, whole, *more, "--resume", "auto", "--lora_r", rank)
    with pytest.raises(ValueError, match=r"is a LoRA adapter; merge it .*bicot\.model\.merge_lora .*checkpoint-000004"):
        run(job, tmp_path / "new", *more, "--model_name_or_path", str(last))

    monkeypatch.setattr(sys, "argv", ["merge_lora", str(last), str(tmp_path / "merged")])
    merge_lora()
    assert f"wrote {tmp_path / 'merged'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="merged exists; give a new folder"):
        merge_lora()
    ids = torch.tensor([[0, 8, 9, 10, 11]])
    adapted, merged, base = (
        load_policy(path, dtype=torch.float32).model(input_ids=ids).logits
        for path in (last, tmp_path / "merged", job / "model")
    )
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - base).abs().max() > 1e-2
    assert (tmp_path / "merged" / "bicot.json").read_text() == (last / "bicot.json").read_text()
    drawing = ["a red circle", "--model", str(last), "--num_generations", "1", "--output", str(tmp_path / "grid.png")]
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    generate.main(drawing)
    assert (tmp_path / "grid.png").is_file()


def test_adapters_of_peft_alone_are_merged_with_the_settings_of_their_base(tmp_path: Path) -> None:
    policy = tiny_policy()
    settings = RolloutSettings(PromptFormat(reasoning_prompt="plan {}"), Sampling(cfg_weight=2.0))
    policy.save_pretrained(tmp_path / "base", settings=settings)
    policy = load_policy(tmp_path / "base")
    peft.get_peft_model(policy.model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert load_policy(tmp_path / "merged").settings == settings


def test_adapters_of_a_weight_that_two_layers_share_are_not_merged(tmp_path: Path) -> None:
    tiny_policy(tied=True).save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base")
    peft.get_peft_model(policy.model, peft.LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapts lm_head or embed_tokens, which share one weight"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_card_survives_saving_adapters(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.adapters = add_lora(policy.model, 4, 8, 0.0, ["q_proj"], [])
    policy.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("my model")
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my model"


def test_adapters_alone_train_and_need_no_reference_model(job: Path, tmp_path: Path) -> None:
    trainer = Trainer(parse_config(words(job, tmp_path, *LORA)), Ranks(0, 1, torch.device("cpu")))
    assert trainer.reference is trainer.policy
    sizes = [parameter.numel() for parameter in trainer.optimizer.parameters]
    assert sum(sizes) == 2 * 4 * (32 + 32 + 2 * (32 + 48)) + 4 * (32 + 61)
    with pytest.raises(ValueError, match="lora_target_modules: no layer outside freeze is named 'vision_head'"):
        run(job, tmp_path, *LORA, "--lora_target_modules", "q_proj,vision_head")
