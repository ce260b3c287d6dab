"""The plans of Janus-Pro on the GPUs that people have, and what the plan counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config
from bicot.grpo.dry_run import advice, changes, dry_run
from bicot.grpo.plan import GIB, IMAGE_PROMPT, PLAN_PROMPT, load_model, pinned, plan_of, recomputing, settled

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32},
}
H100, H200, A100_40 = 79.0, 139.0, 39.4  # GiB that a card of 80, 141 and 40 GB has


def write_original(folder: Path, size: str) -> Path:
    """The config.json of Janus-Pro as DeepSeek publishes it, and nothing else."""
    width = SIZES[size]["hidden_size"]
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    picture = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1}
    raw = {
        "model_type": "multi_modality",
        "language_config": SIZES[size] | {"vocab_size": 102400, "max_position_embeddings": 16384},
        "vision_config": {"params": picture},
        "aligner_config": {"params": mlp | {"input_dim": 1024}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"params": mlp | {"input_dim": 8}},
        "gen_head_config": {"params": {"image_token_embed": width, "image_token_size": 16384, "n_embed": width}},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {size: load_model(str(write_original(tmp_path_factory.mktemp(size), size))) for size in SIZES}


def pictures(count: int) -> tuple[str, str]:
    """Micro-batches of grounding; "auto" would differ between plans."""
    return "--rewards.options.grounding", f"{{micro_batch: {count}}}"


def config_of(size: str, *words: str) -> Config:
    return parse_config(["--config", str(ROOT / "configs" / f"janus-pro-{size}.yaml"), *words])


GOALS = [
    ("1b", 1, H100, "", "selective"),
    ("1b", 1, A100_40, "--optim adamw_8bit", True),
    ("7b", 8, H100, "--deepspeed configs/zero2.json --rollout_kv_release true", True),
    ("7b", 1, H200, "--optim adamw_8bit", True),
    ("7b", 1, H100, "--optim adamw_8bit --reference_device cpu --rollout_kv_release true", True),
    ("7b", 1, H100, "--lora_r 32", True),
]


@pytest.mark.parametrize(("size", "gpus", "gib", "words", "recompute"), GOALS)
def test_published_settings_fit(
    models: dict[str, Any], size: str, gpus: int, gib: float, words: str, recompute: bool | str
) -> None:
    """8 samples of a prompt, two prompts a step, plans of 1024 tokens, with a tenth of the GPU to spare."""
    config = config_of(size, *words.split())
    assert config.gradient_checkpointing == "auto"
    chosen = settled(config, models[size], gpus, int(gib * GIB))
    assert chosen.gradient_checkpointing == recompute
    assert plan_of(chosen, models[size], gpus, int(gib * GIB)).peak <= 0.9 * gib * GIB


def test_advice_says_what_fits_together(models: dict[str, Any]) -> None:
    config, size = config_of("7b"), int(H100 * GIB)
    alone = advice(config, models["7b"], 1, size).splitlines()
    assert len(alone) == len(dict(changes(config))) + 1
    together = alone[-1]
    assert together.startswith("together: ") and "--optim adamw_8bit" in together and "--lora_r" not in together
    several = advice(config, models["7b"], 8, size)
    assert "--deepspeed configs/zero2.json" in several and "together: " in several
    assert "together" not in advice(config, models["7b"], 1, 16 * GIB), "nothing makes it fit"


def test_both_layouts_and_adapters_have_a_plan(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["1b"]
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "hf")}))
    for path in (tmp_path / "hf", tmp_path):
        other = load_model(str(path))
        assert [p.shape for p in other.parameters()] == [p.shape for p in model.parameters()]


def test_sharded_and_offloaded_tensors_are_counted(models: dict[str, Any]) -> None:
    config, model, size = config_of("7b", "--gradient_checkpointing", "true"), models["7b"], int(H100 * GIB)
    weights = 2 * sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(tuple(config.freeze)))
    plain = plan_of(config, model, 8, size)
    assert plain.rows["weights"] == (weights,) * 3 and not plain.host

    zero3 = plan_of(replace(config, deepspeed=str(ROOT / "configs" / "zero3.json")), model, 8, size)
    assert zero3.rows["weights"] == (weights // 8,) * 3 and zero3.rows["gathered weights"] == (2_000_000_000,) * 3
    copies = zero3.rows["engine"][0] - plain.rows["engine"][0]
    assert 0.9 * weights < copies < weights, "rollouts read whole copies of the decoder and its heads"

    offloaded = plan_of(replace(config, deepspeed=str(ROOT / "configs" / "zero2_offload.json")), model, 8, size)
    assert offloaded.rows["float32 masters"] == offloaded.rows["optimizer moments"] == (0, 0, 0)
    assert list(offloaded.host.values()) == [pytest.approx(16 * trained / 8, abs=8)]
    assert f"{16 * trained / GIB:.1f} GiB for 8 GPUs of one machine" in offloaded.table()

    lent = plan_of(replace(config, reference_device="cpu"), model, 8, size)
    assert lent.rows["reference model"] == (0, weights, 0)
    sizes = [2 * p.numel() for p in model.parameters()]
    assert list(lent.host.values()) == [sum(map(pinned, sizes))] and sum(sizes) <= sum(map(pinned, sizes))
    assert [pinned(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


def test_every_other_setting_is_counted(models: dict[str, Any]) -> None:
    words = ("--gradient_checkpointing", "true", "--micro_batch_tokens", "null")
    config, model, size = config_of("1b", *words, *pictures(12)), models["1b"], int(H100 * GIB)

    def rows(**changed: Any) -> dict[str, tuple[int, int, int]]:
        return plan_of(replace(config, **changed), model, 1, size).rows

    plain = rows()
    alone = rows(beta=0.0)
    assert alone["reference model"] == (0, 0, 0) and alone["activations"][1] == 0
    assert rows(num_iterations=4) == plain
    given_back = rows(rollout_kv_release=True)["KV cache"]
    assert given_back[0] > 0 and given_back[1:] == (0, 0)
    guided = rows(policy_logits="guided")["activations"][2] / plain["activations"][2]
    assert 1.2 < guided < 1.3, "575 tokens more beside a plan twice and a picture"
    lora = rows(lora_r=32)
    adapters = lora["weights"][0] - plain["weights"][0]
    assert lora["reference model"] == (0, 0, 0) and lora["float32 masters"] == (2 * adapters,) * 3
    assert lora["gradients"][2] < plain["gradients"][2] / 20
    waits = rows(lora_r=32, lora_dropout=0.1)
    assert lora["rewards"][2] == lora["rewards"][1] > waits["rewards"][2], "the first forward pass is beside them"
    without_kl = rows(beta=0.0)
    assert without_kl["rewards"][2] < without_kl["rewards"][1], "it waits for the scores of groups that teach nothing"
    two, one = (sum(row[2] for row in rows(gradient_accumulation_steps=n).values()) for n in (2, 1))
    assert two > one, "between micro-batches gradients are kept"


def test_micro_batches_of_tokens_are_counted(models: dict[str, Any]) -> None:
    config, model = config_of("1b", "--gradient_checkpointing", "true", *pictures(4)), models["1b"]
    prompt = PLAN_PROMPT + IMAGE_PROMPT + 8 * (2 * 1024 + 576 - 2)

    def peaks(gib: float = H100, **changed: Any) -> dict[str, int]:
        return plan_of(replace(config, **changed), model, 1, int(gib * GIB)).peaks

    by_prompts, whole = peaks(), peaks(gradient_accumulation_steps=1, per_device_train_batch_size=2)
    steps = [peaks(micro_batch_tokens=n) for n in (1, 2000, prompt // 2, prompt, 2 * prompt - 1, 2 * prompt, 10**6)]
    updates = [step["update"] for step in steps]
    assert updates[:5] == sorted(updates[:5]) and updates[0] < updates[3], "up to where one micro-batch is all"
    assert by_prompts["update"] <= updates[3] < 1.05 * by_prompts["update"], "short plans are padded more"
    assert steps[5] == steps[6] == whole
    assert steps[3]["reference"] == whole["reference"], "both prompts pass at once"
    assert steps[0]["reference"] < by_prompts["reference"]
    assert all(step["reference"] <= step["update"] for step in steps)

    auto = replace(config, micro_batch_tokens="auto")
    for gib, least, most in ((H200, 2 * prompt, 2 * prompt), (57.5, 4000, prompt), (10.0, 100, 100)):
        tokens = settled(auto, model, 1, int(gib * GIB)).micro_batch_tokens
        assert isinstance(tokens, int) and least <= tokens <= most
        room = 0.9 * gib * GIB
        assert (max(peaks(gib, micro_batch_tokens=tokens).values()) <= room) == (gib > 10)
        assert gib == H200 or max(peaks(gib, micro_batch_tokens=tokens + 100).values()) > room
    both = settled(replace(auto, gradient_checkpointing="auto"), model, 1, int(H100 * GIB))
    assert both.gradient_checkpointing == "selective" and isinstance(both.micro_batch_tokens, int)


@pytest.mark.parametrize(
    ("size", "gpus", "words", "expected"),
    [
        ("1b", 1, "", {128: False, 192: "selective", 1024: "selective"}),
        ("7b", 8, "--deepspeed configs/zero2.json --rollout_kv_release true", {128: "selective", 1024: True}),
    ],
)
def test_a_step_with_short_plans_recomputes_less(
    models: dict[str, Any], size: str, gpus: int, words: str, expected: dict[int, bool | str]
) -> None:
    given = models[size], gpus, int(H100 * GIB)
    config = settled(config_of(size, *words.split()), *given)
    assert {longest: recomputing(config, *given, longest) for longest in expected} == expected
    order = (False, "selective", True)
    found = [order.index(recomputing(config, *given, longest)) for longest in range(64, 1025, 64)]
    assert found == sorted(found) and order[found[-1]] == config.gradient_checkpointing


def test_rewards_score_as_many_pictures_at_a_time_as_fit(models: dict[str, Any]) -> None:
    config, model = config_of("1b"), models["1b"]
    assert config.rewards.options["grounding"] == {"micro_batch": "auto"}
    few = replace(
        config, rewards=replace(config.rewards, options=config.rewards.options | {"grounding": {"micro_batch": 1}})
    )
    for gib, pictures in ((H100, 16), (H200, 16), (30.0, 16)):
        size = int(gib * GIB)
        chosen, least = settled(config, model, 1, size), settled(few, model, 1, size)
        assert chosen.rewards.options == config.rewards.options | {"grounding": {"micro_batch": pictures}}
        assert chosen.gradient_checkpointing == least.gradient_checkpointing, "recomputing takes longer"
        plans = [plan_of(replace(x, micro_batch_tokens=100), model, 1, size) for x in (chosen, least)]
        assert plans[0].rows["rewards"][0] - plans[1].rows["rewards"][0] >= 0.4 * (pictures - 1) * GIB
        assert gib < 40 or plans[0].peak <= 0.9 * size
    assert config.rewards.options["grounding"] == {"micro_batch": "auto"}

    small = settled(config_of("1b", "--optim", "adamw_8bit"), model, 1, int(A100_40 * GIB))
    assert small.rewards.options["grounding"] == {"micro_batch": 8}

    words = "--deepspeed configs/zero2.json --rollout_kv_release true --rewards.names hps,git,grounding,orm"
    sharded, size = config_of("7b", *words.split()), int(H100 * GIB)
    chosen = settled(sharded, models["7b"], 8, size)
    plan = plan_of(chosen, models["7b"], 8, size)
    assert 0.9 * size < plan.peak == plan.peaks["update"] < size, "rewards are not at work then"
    assert chosen.rewards.options["grounding"] == {"micro_batch": 16} and plan.peaks["rollout"] <= plan.peak


def test_dry_run_says_what_auto_is(models: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("1b", "--model_name_or_path", str(write_original(tmp_path, "1b")))
    said = dry_run(replace(config, micro_batch_tokens=None), 1, H100)
    assert "selective, grounding's micro_batch auto: 16; memory plan: peak" in said and "it fits 79 GiB" in said
    assert "gradient_checkpointing auto: true" in dry_run(config, 1, 60.0)
    said = dry_run(config, 1, H100)
    assert "gradient_checkpointing auto: selective, micro_batch_tokens auto: " in said
    assert "grounding's micro_batch auto: 16; memory" in said
    said = dry_run(replace(config, deepspeed=str(ROOT / "configs" / "zero2.json")), 2, H100)
    assert "micro_batch_tokens auto: null, grounding" in said, "DeepSpeed excludes it"
