"""Settings: files, command line, and errors that name the fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from bicot.grpo.cli import build_parser, parse_config
from bicot.grpo.config import Config, RewardConfig


def test_default_is_the_toy() -> None:
    config = parse_config([])
    assert config.dtype == "float32" and config.rewards.names == ["scene"]
    assert Path(config.model_name_or_path).resolve() == ROOT / "toy" / "assets"
    assert Path(config.train_file).is_file() and Path(str(config.eval_file)).is_file()


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_published_settings(size: str) -> None:
    config = parse_config(["--config", str(ROOT / f"configs/janus-pro-{size}.yaml"), "--rewards.names", "scene"])
    published = dict(
        num_generations=8, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-6, beta=0.01,
        cfg_weight=5.0, temperature=1.0, image_temperature=1.0, top_k=50, image_top_k=0, max_grad_norm=1.0,
        dtype="bfloat16", max_steps=1600, num_iterations=1, kl_estimator="k3", chat_template="t2i_r1",
        policy_logits="conditional", scale_rewards="group", weight_decay=0.0, lr_scheduler_type="linear",
    )  # fmt: skip
    assert {key: getattr(config, key) for key in published} == published
    assert config.model_name_or_path == f"deepseek-community/Janus-Pro-{size.upper()}"


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("beta: 0.5\nseed: 3\nrewards:\n  names: [scene]\n")
    config = parse_config(["--config", str(tmp_path / "my.yaml"), "--beta", "0.1", "--epsilon_high=0.28"])
    assert (config.beta, config.seed, config.epsilon_high) == (0.1, 3, 0.28)
    assert parse_config(["--beta", "0.1", "--epsilon_high=0.28", "--config", str(tmp_path / "my.yaml")]) == config
    assert config.learning_rate == 1e-6, "a file that is not the toy's starts from the published settings"


def test_paths_are_relative_to_the_working_directory_then_to_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("{}")
    config = parse_config(["--train_file", "prompts.jsonl"])
    assert config.train_file == "prompts.jsonl"
    assert config.eval_file == str(ROOT / "toy/assets/heldout.jsonl")


def test_reward_names_take_a_list_or_words() -> None:
    for words in (["--rewards.names", "a.b:C,scene"], ["--rewards.names", "[a.b:C, scene]"]):
        assert parse_config(words).rewards.names == ["a.b:C", "scene"]
    assert parse_config(["--rewards.names", "a.b:C"]).rewards.names == ["a.b:C"]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--report_to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--report_to", "tensorboard,wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "[trackio]"], "report_to", ["trackio"]),
        (["--report_to", "[]"], "report_to", []),
        (["--freeze", "model.vision_model"], "freeze", ["model.vision_model"]),
        (["--reward_weights", "0.5"], "reward_weights", [0.5]),
        (["--reward_weights", "2"], "reward_weights", [2.0]),
        (["--reward_weights", "1,0.5", "--rewards.names", "scene,a.b:C"], "reward_weights", [1.0, 0.5]),
        (["--reward_weights", "[1, 0.5]", "--rewards.names", "scene,a.b:C"], "reward_weights", [1.0, 0.5]),
        (["--reward_weights", "null"], "reward_weights", None),
    ],
)
def test_a_list_needs_no_brackets(words: list[str], name: str, value: object, tmp_path: Path) -> None:
    assert getattr(parse_config(words), name) == value
    file = tmp_path / "my.yaml"
    file.write_text("".join(f"{word[2:]}: {text}\n" for word, text in zip(words[::2], words[1::2], strict=True)))
    rewards = [] if "--rewards.names" in words else ["--rewards.names", "scene"]
    assert getattr(parse_config([*rewards, f"--config={file}"]), name) == value


def test_streams_have_settings_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "beta:\n  text: 0.01\n  image: 0\nepsilon_high: {text: 0.28, image: 0.3}\nrewards:\n  names: [scene]\n"
    )
    config = parse_config([f"--config={tmp_path / 'my.yaml'}", "--entropy_coef", "{text: 0.0, image: 1e-3}"])
    assert config.of_stream("text") == dict(beta=0.01, epsilon=0.2, epsilon_high=0.28, entropy_coef=0.0)
    assert config.of_stream("image") == dict(beta=0.0, epsilon=0.2, epsilon_high=0.3, entropy_coef=1e-3)
    assert config.kl_streams == ("text",)
    assert parse_config([f"--config={tmp_path / 'my.yaml'}", "--beta", "0"]).kl_streams == ()
    published = Config(rewards=RewardConfig("scene"))
    assert published.kl_streams == ("text", "image") and published.token_weights is None
    assert published.of_stream("text") == dict(beta=0.01, epsilon=0.2, epsilon_high=None, entropy_coef=0.0)
    assert not published.use_bias_correction_kl


def test_reward_options_are_given_reward_by_reward() -> None:
    words = ["--config", str(ROOT / "configs/janus-pro-7b.yaml"), "--rewards.options.hps", "{path: x, micro_batch: 8}"]
    rewards = parse_config(words).rewards
    assert rewards.names == ["hps", "git", "grounding"]
    others = {"git": {"dtype": "float16"}, "grounding": {"micro_batch": "auto"}}
    assert rewards.options == {"hps": {"path": "x", "micro_batch": 8}, **others}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--betta", "1"], "unknown setting 'betta'; did you mean 'beta'?"),
        (["--rewards.nmes", "a"], "unknown setting 'rewards.nmes'; did you mean 'rewards.names'?"),
        (["--loss_type", "ppo"], "loss_type"),
        (["--beta", "high"], "beta"),
        (["--beta", "-1"], "beta=-1.0 must be 0 or more"),
        (["--num_generations", "1"], "num_generations=1 must be at least 2"),
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--top_p", "0"], "top_p=0.0 must be in (0, 1]"),
        (["--loss_type", "cispo"], "cispo clips its weights at epsilon_high"),
        (
            ["--rewards.options", "{scenes: {}}"],
            "rewards.options has 'scenes', which is no reward; did you mean 'scene'?",
        ),
        (["--rewards.options.hps.path", "x"], "give all options of one reward, as --rewards.options.hps '{path: "),
        (["--reward_weights", "[1, 2]"], "reward_weights has 2 entries for 1 rewards"),
        (["--reward_weights", "[.nan]"], "reward_weights=[nan] must be finite"),
        (["--rollout_max_rows", "0"], "rollout_max_rows=0 must be at least 1"),
        (["--rollout_kv_gib", "0"], "rollout_kv_gib=0.0 must be above 0, or null"),
        (["--rollout_kv_dtype", "int8"], "rollout_kv_dtype"),
        (["--seed", "-1"], "seed=-1 must be in [0, 2^31)"),
        (["--rewards.names", "[]"], "at least one reward"),
        (["--report_to", "tensorbord"], "report_to=['tensorbord'] must be any of tensorboard, trackio, wandb"),
        (["--reward_weights", "much"], "reward_weights='much' must be numbers"),
        (["--config", ""], "--config needs a file"),
        (["--max_grad_norm", "-1"], "max_grad_norm=-1.0 must be above 0"),
        (["--max_grad_norm", ".inf"], "max_grad_norm=inf must be finite"),
        (["--epsilon", "-1"], "epsilon=-1.0 must be above 0"),
        (["--epsilon_high", "0"], "epsilon_high=0.0 must be above 0, or null"),
        (["--adam_beta2", "1"], "adam_beta2=1.0 must be in [0, 1)"),
        (["--weight_decay", "-1"], "weight_decay=-1.0 must be 0 or more"),
        (["--cfg_weight", ".nan"], "cfg_weight=nan must be finite"),
        (["--eval_cfg_weight", ".inf"], "eval_cfg_weight=inf must be finite"),
        (["--detach_uncond", "true"], "detach_uncond needs policy_logits=guided"),
        (["--stop_after", "0"], "stop_after=0 must be at least 1, or null"),
        (["--beta", "{text: 0.1}"], "beta={'text': 0.1} must be one number, or one for each of text and image"),
        (["--beta.text", "0.1"], "beta={'text': 0.1} must be one number, or one for each of text and image"),
        (["--epsilon", "{txt: 1, image: 1}"], "must be one number, or one for each of text and image"),
        (["--beta", "{text: 1, image: -1}"], "beta.image=-1.0 must be 0 or more"),
        (["--epsilon", "{text: 0, image: 1}"], "epsilon.text=0.0 must be above 0"),
        (["--epsilon_high", "{text: .inf, image: 1}"], "epsilon_high.text=inf must be finite"),
        (["--entropy_coef", "{text: a lot, image: 1}"], "entropy_coef"),
        (["--micro_batch_tokens", "0"], "micro_batch_tokens=0 must be at least 1, auto, or null"),
        (["--micro_batch_tokens", "most"], "micro_batch_tokens"),
        (["--micro_batch_tokens", "9", "--deepspeed", "configs/zero2.json"], "does not go with deepspeed, which wants"),
        (["--micro_batch_tokens", "9", "--loss_type", "bnpo"], "does not go with loss_type=bnpo, which averages"),
        (["--micro_batch_tokens", "9", "--token_weights", "a:b"], "does not go with token_weights, whose function"),
        (["--save_total_limit", "-1"], "save_total_limit=-1 must be at least 1, or null"),
        (["--reference_device", "cpu", "--lora_r", "4"], "reference_device=cpu does not go with lora_r"),
        (["--sync_ref_model", "true", "--lora_r", "4"], "a reference model of its own: with lora_r"),
        (["--sync_ref_model", "true", "--beta", "0"], "a reference model of its own: with beta=0"),
        (["--ref_model_mixup_alpha", "0"], "ref_model_mixup_alpha=0.0 must be in (0, 1]"),
        (["--ema_decay", "0.9", "--deepspeed", "configs/zero2.json"], "ema_decay does not go with deepspeed"),
        (["--ema_decay", "1"], "ema_decay=1.0 must be in (0, 1), or null"),
        (["--entropy_target", "{text: 1.0}"], "entropy_target={'text': 1.0} must be one number, or one for each of te"),
        (["--entropy_target", "0"], "entropy_target=0.0 must be above 0, or null"),
        (["--entropy_coef_min", "2"], "entropy_coef_min=2.0 must be 0 or more, and not above entropy_coef_max=1.0"),
        (["--entropy_coef_delta", "0"], "entropy_coef_delta=0.0 must be above 0"),
        (["--dynamic_sampling", "-1"], "dynamic_sampling=-1 must be 0 to 1000"),
        (["--importance_sampling_mode", "token_mask"], "=token_mask needs importance_sampling_correction=true"),
        (["--off_policy_mask_threshold", "0"], "off_policy_mask_threshold=0.0 must be above 0, or null"),
        (["--distributed", "deepspeed"], "distributed=deepspeed needs deepspeed=a file, such as configs/zero2.json"),
        (["--distributed", "ddp", "--deepspeed", "configs/zero2.json"], "distributed=ddp needs deepspeed=null"),
        (["--optim", "adamw_8bit", "--deepspeed", "configs/zero2.json"], "adamw_8bit does not go with deepspeed"),
        (["--eval_steps", "5", "--eval_file", "null"], "eval_steps=5 needs eval_file"),
        (["--rewards.heldout", "a:B", "--eval_file", "null"], "rewards.heldout=['a:B'] needs eval_file"),
        (["--rewards.options.grounding", "{micro_batch: many}"], "grounding: micro_batch='many' must be at least 1"),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end needs eval_steps"),
        (["--replay", "a", "--save_rollouts", "b"], "replay reads rollouts"),
        (["--save_rollout_images", "true"], "save_rollout_images needs save_rollouts"),
        (["--rollout_only", "true"], "rollout_only needs save_rollouts"),
        (["--reward_weights", "0"], "reward_weights=[0.0]: all are 0"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "must be one of linear, cosine"),
        (["--config", "configs/zero2.json"], "a configuration of DeepSpeed; give it with --deepspeed"),
        (["--learning-rate", "1"], "unknown setting 'learning-rate'; did you mean 'learning_rate'?"),
    ],
)
def test_bad_settings_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bata: 1\n", "unknown setting 'bata'; did you mean 'beta'?"),
        ("rewards:\n  namess: [scene]\n", "unknown setting 'rewards.namess'; did you mean 'rewards.names'?"),
    ],
)
def test_unknown_keys_of_a_file_are_named(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_config(["--config", str(tmp_path / "my.yaml")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"# beta: 1\n", "the file is empty"),
        (b"---\n", "the file is empty"),
        (b"- beta\n", "no settings, which are lines `name: value`"),
        (b"beta\n", "no settings, which are lines `name: value`"),
        (b"beta: [1\n", "not YAML: while parsing a flow sequence"),
        (b"\xff\xfe", "not YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"beta: \x00", "not YAML: unacceptable character"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_config_file_without_settings_is_named(
    content: bytes, problem: str, joined: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        parse_config([f"--config={file}"] if joined else ["--config", str(file)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: --config {file}: {problem}")


def test_help_shows_the_defaults_that_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("max_steps: 1234\nrewards:\n  names: [a.b:C]\n")
    for words, steps, names in (
        ([], "150", "['scene']"),
        (["--config", str(tmp_path / "my.yaml")], "1234", "['a.b:C']"),
        ([f"--config={ROOT / 'configs/janus-pro-1b.yaml'}"], "1600", "['hps', 'git', 'grounding']"),
    ):
        with pytest.raises(SystemExit, match="0"):
            parse_config([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"the schedule ends there. (type: int, default: {steps})" in text
        assert f"(type: list[str] | str, default: {names})" in text


def test_help_explains_every_field() -> None:
    text = build_parser("x").format_help()
    parser_help = {action.dest: action.help for action in build_parser("x")._actions}
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text
        if field.name != "rewards":
            assert parser_help[field.name] and len(parser_help[field.name].split("(type")[0]) > 8, field.name
    for field in dataclasses.fields(RewardConfig):
        assert f"--rewards.{field.name}" in text


def test_print_config_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--beta", "0.25", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["beta"] == 0.25
    (tmp_path / "my.yaml").write_text(printed)
    assert parse_config(["--config", str(tmp_path / "my.yaml")]) == parse_config(["--beta", "0.25"])
