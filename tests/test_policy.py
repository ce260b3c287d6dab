"""Loading, freezing, and the shape of what a policy gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_policy
from transformers import LlamaConfig

from bicot.model.packed import Packed
from bicot.model.policy import load_policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling


def test_round_trip_through_the_hugging_face_layout(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, dtype=torch.float32)
    for (name, a), (_, b) in zip(policy.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.tokenizer.boi_token_id == policy.tokenizer.boi_token_id
    trains = {n.split(".")[1] for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trains == {"language_model", "weight"}, "the language model and lm_head.weight, nothing else"


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder .*nothing"):
        load_policy(tmp_path / "nothing")
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' checkpoint; bicot trains Janus"):
        load_policy(tmp_path)


def test_freeze_prefix_that_matches_nothing(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="begins with 'vision'"):
        load_policy(tmp_path, freeze=["vision"])


@pytest.mark.parametrize(
    ("template", "plan", "image"),
    [
        ("t2i_r1", "S\n\nUser: do p\n\nAssistant:", "User: p. a plan\n\nAssistant:"),
        ("janus", "S\n\n<|User|>: do p\n\n<|Assistant|>:", "<|User|>: p. a plan\n\n<|Assistant|>:"),
    ],
)
def test_chat_templates(template: str, plan: str, image: str) -> None:
    texts = PromptFormat(template, "S", "do {}")  # type: ignore[arg-type]
    assert texts.plan_text("p") == plan
    assert texts.image_text("p", "a plan") == image


def test_braces_in_prompts_survive() -> None:
    assert "{x} {}" in PromptFormat("t2i_r1", "", "draw {}").plan_text("{x} {}")


def test_reasoning_prompt_needs_one_placeholder() -> None:
    with pytest.raises(ValueError, match="exactly once"):
        PromptFormat("t2i_r1", "", "draw it")


def test_unconditional_row_has_the_length_and_the_ends() -> None:
    encoder = tiny_policy().prompt_encoder(PromptFormat())
    ids = encoder.image_ids("a red circle", "two blue square", room=16)
    row = encoder.unconditional_ids(len(ids))
    assert len(row) == len(ids) and (row[0], row[-1]) == (ids[0], ids[-1]) == (0, 5)
    assert set(row[1:-1]) == {2}


def test_weights_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    """transformers would go on with random values in their place."""
    tiny_policy().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    norm = "model.language_model.layers.1.input_layernorm.weight"
    for weights, message in (
        ({k: v for k, v in whole.items() if k != "lm_head.weight"}, "lacks 1 weights, such as lm_head.weight"),
        ({k: v for k, v in whole.items() if k != norm}, f"lacks 1 weights, such as {norm}"),
        (whole | {"model.extra.weight": torch.ones(2)}, "has unknown 1 weights, such as model.extra.weight"),
    ):
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path, dtype=torch.float32)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    load_policy(tmp_path, dtype=torch.float32)


def test_settings_travel_with_a_checkpoint(tmp_path: Path) -> None:
    settings = RolloutSettings(PromptFormat("janus", "s", "r {}"), Sampling(max_completion_length=7, cfg_weight=2.0))
    settings.save(tmp_path)
    assert RolloutSettings.load(tmp_path) == settings
    assert RolloutSettings.load(tmp_path / "none") == RolloutSettings()


def test_packed_rows() -> None:
    packed = Packed.of([[1, 2, 3], [], [4]])
    assert packed.tolist() == [[1, 2, 3], [], [4]] and len(packed) == 3
    assert packed[1:3].tolist() == [[], [4]] and packed[3:].tolist() == []
    assert packed.row_of().tolist() == [0, 0, 0, 2]
    assert Packed.cat([packed, packed[:1]]).tolist() == [[1, 2, 3], [], [4], [1, 2, 3]]
