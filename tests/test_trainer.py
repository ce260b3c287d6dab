"""Whole runs: what they leave behind, stopping and going on, two ranks, signals."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, tiny_policy

from bicot import generate
from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.data import step_indices
from bicot.grpo.distributed import Ranks
from bicot.grpo.output import locked
from bicot.grpo.trainer import Trainer, train
from bicot.grpo.view import Run
from bicot.model.merge_lora import main as merge_lora
from bicot.model.policy import load_policy
from bicot.rewards.worker import RewardError

HAS_TORCHAO = find_spec("torchao") is not None
SMALL = ("--eval_file", "null", "--sample_steps", "0")  # no pictures but those that train
REWARD = """
class Redness:
    name = "redness"
    def score(self, images, examples):
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts and a reward module."""
    folder = tmp_path_factory.mktemp("job")
    tiny_policy(seed=5).save_pretrained(folder / "model")
    rows = [
        {"prompt": f"a {colour} {shape} and w{i}", "task_type": "color" if i % 2 else "object"}
        for i, (colour, shape) in enumerate([("red", "circle"), ("blue", "square")] * 4)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "redness.py").write_text(REWARD)
    (folder / "plan.txt").write_text("plan {}")
    return folder


def words(job: Path, output: Path, *more: str) -> list[str]:
    settings = dict(
        model_name_or_path=job / "model", train_file=job / "train.jsonl", eval_file=job / "train.jsonl",
        reasoning_prompt_path=job / "plan.txt", output_dir=output, num_generations=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_completion_length=12, max_steps=6, save_steps=2, sample_steps=2,
        learning_rate=1e-2, warmup_steps=0, cfg_weight=2.0,
    )  # fmt: skip
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*options, "--rewards.names", "redness:Redness", "--rewards.monitor", "[]", *more]


def run(job: Path, output: Path, *more: str) -> dict[str, Any]:
    return train(parse_config(words(job, output, *more)))


@pytest.fixture(autouse=True)
def reward_module(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(job)


def metrics(output: Path) -> list[dict[str, float]]:
    """The rows without their times, and without the rank that took the longest."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not re.search("seconds|per_second|slowest_rank", k)} for row in rows]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step:06d}" / "model.safetensors")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_everything(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(job, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {
        "heldout_reward_before", "heldout_reward_after", "steps", "seconds", "images_per_second", "seed",
    }  # fmt: skip
    assert summary["steps"] == 6 and summary["images_per_second"] > 0
    table = capsys.readouterr().out
    assert "before" in table and "after" in table and "color" in table and "all" in table
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    expected = {"reward", "reward_std", "kl", "entropy", "text/kl", "grad_norm", "plan_entropy"}
    expected |= {f"rewards/redness/{what}" for what in ("mean", "std", "missing", "skipped")}
    assert expected <= set(metrics(tmp_path)[0])
    assert any(key.startswith("reward_by_task/") for key in metrics(tmp_path)[0])
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == [
        f"checkpoint-{n:06d}" for n in (4, 6)
    ]  # save_total_limit 2
    assert (tmp_path / "before_after.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "src='http" not in page and "href=" not in page, "the page is self-contained"
    assert page.count("<img") >= 6
    assert "<p>Finished after step 6 of 6." in Run(tmp_path).page("")
    loaded = load_policy(tmp_path / "checkpoint-000006", dtype=torch.float32)
    assert_same_weights({"w": loaded.model.lm_head.weight.detach()}, {"w": weights(tmp_path, 6)["lm_head.weight"]})


def test_only_the_language_model_trains(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path, *SMALL, "--max_steps", "2")
    before, after = load_file(job / "model" / "model.safetensors"), weights(tmp_path, 2)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("model.language_model", "lm_head")) for name in moved)


def test_evaluation_has_its_own_guidance(job: Path, tmp_path: Path) -> None:
    """Held-out samples are those of one guidance, training is that of another."""
    for name, words in {"1": ["1"], "2": ["2"], "1 and 2": ["1", "--eval_cfg_weight", "2"]}.items():
        run(job, tmp_path / name, "--max_steps", "1", "--sample_steps", "0", "--cfg_weight", *words)

    def drawn(name: str) -> list[bytes]:
        return [(tmp_path / name / "samples" / f"heldout-before.{end}").read_bytes() for end in ("jsonl", "npz")]

    assert drawn("1 and 2") == drawn("2") != drawn("1")
    assert metrics(tmp_path / "1 and 2") == metrics(tmp_path / "1") != metrics(tmp_path / "2")
    assert_same_weights(weights(tmp_path / "1 and 2", 1), weights(tmp_path / "1", 1))


def test_resumed_equals_uninterrupted_bit_for_bit(job: Path, tmp_path: Path) -> None:
    schedule = ("--lr_scheduler_type", "linear")  # ends at max_steps, whatever stop_after says
    run(job, tmp_path / "whole", *schedule)
    run(job, tmp_path / "parts", *schedule, "--stop_after", "3")
    assert (tmp_path / "parts" / "checkpoint-000003" / "trainer_state.pt").is_file()
    run(job, tmp_path / "parts", *schedule, "--resume", "auto")
    assert_same_weights(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    rates = [row["learning_rate"] for row in metrics(tmp_path / "parts")]
    assert rates == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])
    summaries = [json.loads((tmp_path / d / "summary.json").read_text()) for d in ("whole", "parts")]
    for key in ("heldout_reward_before", "heldout_reward_after", "steps"):
        assert summaries[0][key] == summaries[1][key]


def test_settings_that_change_on_resume(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They take effect and are said, or are refused by name with both values."""
    small = (*SMALL, "--lr_scheduler_type", "linear")
    run(job, tmp_path, *small, "--stop_after", "2")
    for setting, value, words in (
        ("seed", "1", "seed 0, which cannot become 1"),
        ("num_generations", "2", "num_generations 4, which cannot become 2"),
        ("dtype", "bfloat16", "dtype 'float32', which cannot become 'bfloat16'"),
        *[("optim", "adamw_8bit", "optim 'adamw_torch_fused', which cannot become 'adamw_8bit'")] * HAS_TORCHAO,
        ("gradient_accumulation_steps", "1", "prompts_per_step 4, which cannot become 2"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-000002 was trained with {words} within a run"):
            run(job, tmp_path, *small, "--resume", "auto", f"--{setting}", value)
    capsys.readouterr()
    halves = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")  # the same four prompts
    changes = ("--learning_rate", "1e-4", "--adam_beta1", "0.5", "--beta", "0.5")
    run(job, tmp_path, *small, *halves, *changes, "--resume", "auto")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("continuing with"))
    assert "learning_rate 0.0001 instead of 0.01" in said and "beta 0.5 instead of 0.03" in said
    assert "batch" not in said and "adam_beta1 0.5 instead of 0.9" in said
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 1e-2 * 5 / 6, *(1e-4 * (6 - i) / 6 for i in range(2, 6))])
    state = torch.load(tmp_path / "checkpoint-000006" / "trainer_state.pt", weights_only=True)
    assert state["optimizer"]["adamw"]["param_groups"][0]["betas"] == (0.5, 0.999)


def test_resume_in_bfloat16_keeps_the_masters(job: Path, tmp_path: Path) -> None:
    more = (*SMALL, "--dtype", "bfloat16", "--learning_rate", "1e-4", "--max_steps", "4")
    run(job, tmp_path / "whole", *more)
    run(job, tmp_path / "parts", *more, "--stop_after", "2")
    run(job, tmp_path / "parts", *more, "--resume", str(tmp_path / "parts" / "checkpoint-000002"))
    assert_same_weights(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))


def test_rows_after_the_checkpoint_are_written_again(job: Path, tmp_path: Path) -> None:
    """A run killed between checkpoints leaves rows that the resumed run must not repeat."""
    run(job, tmp_path, *SMALL, "--stop_after", "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "reward": 9.0}) + "\n")
    run(job, tmp_path, *SMALL, "--resume", "auto", "--stop_after", "4")
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert metrics(tmp_path)[2]["reward"] < 1


def test_a_checkpoint_that_is_not_whole_is_not_resumed(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path, *SMALL, "--stop_after", "2")
    (tmp_path / ".checkpoint-000004.partial").mkdir()  # what a kill in the middle of saving leaves
    (tmp_path / "checkpoint-000005").mkdir()
    run(job, tmp_path, *SMALL, "--resume", "auto", "--stop_after", "3")
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_an_earlier_run_is_not_lost(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path, *SMALL, "--max_steps", "2")
    with pytest.raises(FileExistsError, match=r"--resume auto.*--overwrite_output_dir"):
        run(job, tmp_path, "--max_steps", "2", "--move_output_dir", "false")
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.pt there"):
        run(job, tmp_path, "--resume", str(tmp_path / "nowhere"))


def test_what_can_be_refused_is_refused_before_a_run_is_replaced(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path, "--max_steps", "2", "--sample_steps", "0")
    before = sorted(path.name for path in tmp_path.iterdir())
    more = ("--max_steps", "2", "--overwrite_output_dir", "true")
    for problem, error in (
        (("--report_to", "[trackio]"), pytest.raises(ImportError, match="trackio is not installed")),
        (("--rewards.names", "redness:Greenness"), pytest.raises(Exception, match="Greenness")),
    ):
        with error:
            run(job, tmp_path, *more, *problem)
    with locked(tmp_path), pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"):
        run(job, tmp_path, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_steps_in_which_no_reward_applies(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never.py").write_text(
        "def never(images, examples):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run(job, tmp_path / "out", "--rewards.names", "never:never", "--max_steps", "2")
    assert [row["update_skipped"] for row in metrics(tmp_path / "out")] == [1, 1]
    assert_same_weights(weights(tmp_path / "out", 2), load_file(job / "model" / "model.safetensors"))
    rows = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2] and "NaN" not in rows and '"reward"' not in rows
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["heldout_reward_after"] is None


def test_equal_rewards_have_no_spread(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their std rounds to: that of eight times 0.35 in float32 is not 0."""
    (tmp_path / "even.py").write_text(
        "import torch\ndef even(images, examples):\n    return torch.full((len(images),), 0.35)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    more = (*SMALL, "--max_steps", "1", "--num_generations", "8")
    run(job, tmp_path / "out", "--rewards.names", "even:even", *more)
    assert metrics(tmp_path / "out")[0]["frac_reward_zero_std"] == 1.0


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such glyph")

    monkeypatch.setattr("bicot.grpo.trainer.draw_grid", broken)
    run(job, tmp_path, "--max_steps", "2")
    assert "step 2: no grid of samples: RuntimeError: no such glyph" in capsys.readouterr().out
    assert len(metrics(tmp_path)) == 2
    monkeypatch.undo()
    monkeypatch.syspath_prepend(job)
    for name in ("before_after.png", "report.html"):
        (tmp_path / "again" / name).mkdir(parents=True)  # neither can be written
    (tmp_path / "again" / "samples" / "step-000002.jsonl").mkdir(parents=True)
    assert run(job, tmp_path / "again", "--max_steps", "2")["steps"] == 2
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 2: no grid of samples: IsADirectoryError: ") for line in said) == 1
    for name in ("before_after.png", "report.html"):
        assert sum(line.startswith(f"no {name}: IsADirectoryError: ") for line in said) == 1
    assert said[-1].endswith(f"checkpoint and metrics are in {tmp_path / 'again'}")
    assert (tmp_path / "again" / "checkpoint-000002" / "manifest.json").is_file()
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["steps"] == 2


def test_going_back_to_an_earlier_checkpoint(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoints behind it are neither resumed nor let push out the new ones."""
    small = (*SMALL, "--save_total_limit", "3")
    run(job, tmp_path, *small)
    second = str(tmp_path / "checkpoint-000002")
    run(job, tmp_path, *small, "--resume", second, "--stop_after", "3", "--save_total_limit", "1")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    aside = tmp_path / "after-000002-1"
    assert f"going back to step 2: checkpoint-000004, checkpoint-000006 moved to {aside}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "checkpoint-000003", tmp_path / "checkpoint-best")
    run(job, tmp_path, *small, "--resume", "auto", "--stop_after", "5", "--save_total_limit", "1")
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-000005", "checkpoint-best"}
    (tmp_path / "checkpoint-000005" / "trainer_state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-000005 is damaged: trainer_state.pt has 0 bytes"):
        run(job, tmp_path, *small, "--resume", "auto")


def test_settings_of_section_one_all_run(job: Path, tmp_path: Path) -> None:
    """Every switch goes through a real step."""
    for i, more in enumerate(
        (
            ("--beta", "0", "--loss_type", "grpo", "--scale_rewards", "none", "--chat_template", "janus"),
            ("--loss_type", "gspo", "--num_iterations", "2", "--importance_sampling_correction", "true"),
            ("--loss_type", "cispo", "--epsilon_high", "5", "--kl_estimator", "k1", "--entropy_coef", "0.01"),
            ("--loss_type", "dr_grpo", "--kl_estimator", "k2", "--policy_logits", "guided", "--delta", "2"),
            ("--loss_type", "bnpo", "--scale_rewards", "batch", "--gradient_checkpointing", "true", "--top_k", "5"),
            ("--multi_objective_aggregation", "normalize_then_sum", "--top_p", "0.9"),
        )
    ):
        run(job, tmp_path / str(i), *SMALL, "--max_steps", "1", *more)
        row = metrics(tmp_path / str(i))[0]
        assert row["grad_norm"] > 0
        assert ("kl" in row) == (i != 0)


@pytest.mark.parametrize("lora", [(), ("--lora_r", "2", "--lora_dropout", "0.5")])
def test_settings_that_save_memory_change_nothing(job: Path, tmp_path: Path, lora: tuple[str, ...]) -> None:
    """No bit of the weights; "auto" recomputes nothing on a CPU."""
    settings = [("--gradient_checkpointing", how) for how in ("false", "true", "selective", "auto")]
    settings += [("--rollout_kv_release", "true")] + [("--reference_device", "cpu")] * (not lora)
    for i, words_ in enumerate(settings):
        run(job, tmp_path / str(i), *SMALL, *lora, "--max_steps", "2", *words_)
        read = adapters if lora else weights
        assert_same_weights(read(tmp_path / "0", 2), read(tmp_path / str(i), 2))


def test_adapters_have_no_reference_to_move() -> None:
    with pytest.raises(ValueError, match="reference_device=cpu does not go with lora_r"):
        Config(reference_device="cpu", lora_r=4, rewards=RewardConfig("scene"))


def test_long_prompt_is_named_before_anything_is_spent(job: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": "w1 " * 140, "task_type": "object"}) + "\n")
    with pytest.raises(ValueError, match="prompt too long"):
        run(job, tmp_path / "out", "--train_file", str(prompts))
    assert not (tmp_path / "out").exists()


def test_attention_that_cannot_run_is_said_before_anything_is_touched(job: Path, tmp_path: Path) -> None:
    given = ("--attn_implementation", "varlen", "--dtype", "bfloat16", "--model_name_or_path", "nowhere")
    with pytest.raises(ValueError, match="attn_implementation=varlen needs an NVIDIA GPU"):
        Trainer(parse_config(words(job, tmp_path / "run", *given)), Ranks(0, 1, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["train_file", "eval_file"])
def test_prompts_that_cannot_be_used_are_found_at_start(
    file: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is touched, and those that a reward cannot score before the policy is loaded; or left out."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "choosy.py").write_text(
        "class Choosy:\n"
        "    name = 'choosy'\n"
        "    def check(self, example):\n"
        "        if 'pentagon' in example.prompt:\n"
        "            raise ValueError('sees no pentagons')\n"
        "    def score(self, images, examples):\n"
        "        assert not any('pentagon' in example.prompt for example in examples)\n"
        "        return images.mean((1, 2, 3))\n"
    )
    good, pentagon, long = (
        json.dumps({"prompt": prompt, "task_type": "object"})
        for prompt in ("a red circle", "a red pentagon", "w1 " * 105)
    )
    prompts = tmp_path / "prompts.jsonl"
    more = ["--rewards.names", "choosy:Choosy", "--max_steps", "1", "--sample_steps", "0", f"--{file}", str(prompts)]
    for bad, words, rest in (
        ("{", "Expecting property name", ("--rewards.names", "no.such:Reward")),
        (pentagon, "reward 'choosy': sees no pentagons", ("--model_name_or_path", "no/such/model")),
        (long, "prompt too long", ()),
    ):
        prompts.write_text("\n".join((good, bad, good)))
        with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: {words}.*; fix it, or .* --skip_bad_prompts true"):
            run(job, tmp_path / "out", *more, *rest)
    assert not (tmp_path / "out").exists()
    prompts.write_text("\n".join((long, good, pentagon, "{", good)))
    run(job, tmp_path / "out", *more, "--skip_bad_prompts", "true")
    first, *listed = capsys.readouterr().out.splitlines()[:4]
    assert first == f"{prompts}: 3 of 5 lines are left out:"
    for line, start in zip(listed, ("1: prompt too long", "3: reward 'choosy'", "4: Expecting"), strict=True):
        assert line.startswith(f"  {prompts}:{start}")


def test_plans_leave_room_for_the_picture(job: Path, tmp_path: Path) -> None:
    """The context has 128 positions; the longest plan fits behind its own prompt, but not in front of a picture."""
    with pytest.raises(
        ValueError, match=r"train\.jsonl:1: prompt too long: .* lower max_completion_length: 'a red circ"
    ):
        run(job, tmp_path / "out", "--max_completion_length", "110")
    assert not (tmp_path / "out").exists()


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _environment(job: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{job}", "OMP_NUM_THREADS": "1"}


def test_two_ranks_equal_one_with_twice_the_accumulation(job: Path, tmp_path: Path) -> None:
    # Adam divides by |gradient| + epsilon: at 1e-8 it would blow a gradient that is rounding noise up to a full step
    # (and hide a wrong scale of all of them)
    steps = ("--max_steps", "2", "--adam_epsilon", "1e-3")
    one = words(job, tmp_path / "one", *steps, "--gradient_accumulation_steps", "2")
    train(parse_config(one))
    two = words(job, tmp_path / "two", *steps, "--gradient_accumulation_steps", "1")
    subprocess.run([*TWO_RANKS, str(ROOT / "train.py"), *two], check=True, env=_environment(job), timeout=300)
    for name, weight in weights(tmp_path / "one", 2).items():
        torch.testing.assert_close(weights(tmp_path / "two", 2)[name], weight, atol=1e-6, rtol=0)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_two_ranks_skip_the_steps_in_which_no_reward_applies(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a reward on one of them is trained by both; a run that stops after a skipped step goes on as ever."""
    (tmp_path / "partial_reward.py").write_text(
        "class Partial:\n"
        "    name = 'partial'\n"
        "    def applies(self, example):\n"
        "        return example.task_type == 'object'\n"
        "    def score(self, images, examples):\n"
        "        return images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    applies = [(True, False), (False, False), (False, True), (False, False)]  # step by step, on the two ranks
    rows: list[str] = [""] * 8
    for step, on_ranks in enumerate(applies):
        for index, applicable in zip(step_indices(8, 2, step, seed=0), on_ranks, strict=True):
            kind = "object" if applicable else "non"
            rows[index] = json.dumps({"prompt": f"a circle and w{index}", "task_type": kind})
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    more = [
        "--train_file",
        str(tmp_path / "prompts.jsonl"),
        "--eval_file",
        "null",
        "--rewards.names",
        "partial_reward:Partial",
    ]
    more += ["--max_steps", "4", "--sample_steps", "0", "--save_steps", "1", "--save_total_limit", "null"]
    more += ["--per_device_train_batch_size", "1", "--adam_epsilon", "1e-3", "--lr_scheduler_type", "linear"]

    def two_ranks(output: str, *rest: str) -> str:
        given = words(job, tmp_path / output, *more, "--gradient_accumulation_steps", "1", *rest)
        environment = _environment(job) | {"PYTHONPATH": f"{_environment(job)['PYTHONPATH']}:{tmp_path}"}
        command = [*TWO_RANKS, str(ROOT / "train.py"), *given]
        done = subprocess.run(command, check=True, env=environment, timeout=300, stdout=subprocess.PIPE)
        return done.stdout.decode()

    said = two_ranks("whole")
    skipped = [line for line in said.splitlines() if "skipped" in line]
    assert skipped == [f"step {step}: no reward applies to any sample; the update is skipped" for step in (2, 4)]
    steps = metrics(tmp_path / "whole")
    assert [step["update_skipped"] for step in steps] == [0, 1, 0, 1]
    assert ["grad_norm" in step for step in steps] == ["reward" in step for step in steps] == [True, False, True, False]
    assert [step["learning_rate"] for step in steps] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    head = [weights(tmp_path / "whole", step)["lm_head.weight"] for step in (1, 2, 3, 4)]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(head)] == [True, False, True]

    run(job, tmp_path / "one", *more, "--gradient_accumulation_steps", "2")
    for name, weight in weights(tmp_path / "one", 4).items():
        torch.testing.assert_close(weights(tmp_path / "whole", 4)[name], weight, atol=1e-6, rtol=0)

    two_ranks("parts", "--stop_after", "2")
    two_ranks("parts", "--resume", "auto")
    assert_same_weights(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.parametrize(
    ("script", "more", "line"),
    [
        ("train.py", ("--resume", "nowhere"), "error: resume='nowhere': no trainer_state.pt there"),
        ("train.py", ("--train_file", "none.jsonl"), "error: no prompt file at none.jsonl"),
        ("train.py", ("--report_to", "[trackio]"), "error: report_to: trackio is not installed"),
        ("generate.py", ("a", "--model", "nowhere/at-all"), "error: model_name_or_path='nowhere/at-all' is neither"),
    ],
)
def test_an_error_is_one_line(
    script: str, more: tuple[str, ...], line: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(job, tmp_path / "out", *more) if script == "train.py" else list(more)
    if more[0] in ("--train_file", "--report_to"):  # in this process: another imports everything for 4 seconds
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
        monkeypatch.setattr(sys, "argv", [script, *given])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        signal.signal(signal.SIGTERM, handler)
        said = str(end.value.code)  # Python prints it, and ends with 1
        assert line in said and "(--debug shows where)" in said and not (tmp_path / "out").exists()
        return
    command = [sys.executable, str(ROOT / script), *given]
    environment = _environment(job) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr
    assert "(--debug shows where)" in done.stderr and not (tmp_path / "out").exists()
    if more[0] == "--resume":
        shown = subprocess.run([*command, "--debug"], env=environment, capture_output=True, text=True, timeout=120)
        assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_sigterm_finishes_the_step_and_saves(job: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *words(job, tmp_path, *SMALL, "--max_steps", "100000")]
    process = subprocess.Popen(command, env=_environment(job), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
    last = metrics(tmp_path)[-1]["step"]
    assert (tmp_path / f"checkpoint-{last:06d}" / "trainer_state.pt").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == last
    line, advice = said.splitlines()[-1].split("; continue with: ")
    assert line == f"stopped by SIGTERM after step {last} of 100000"
    again = [*shlex.split(advice), "--max_steps", str(last + 1)]
    subprocess.run(again, check=True, env=_environment(job), timeout=120)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, last + 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_is_said(number: signal.Signals, job: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('asked').touch()\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / "train.py"), *words(job, tmp_path / "out", "--rewards.names", "slow:Slow")]
    process = subprocess.Popen(command, env=_environment(job), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "asked").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    advice = shlex.join([*command, "--resume", "auto"])
    assert said[-1] == f"stopped by {number.name}; continue with: {advice}" and "Traceback" not in "".join(said)
    assert process.returncode == 128 + number


def test_a_reward_that_fails_ends_the_run_with_its_picture(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "colour_blind.py").write_text(
        "def colour_blind(images, examples):\n"
        "    if any('red' in example.prompt for example in examples):\n"
        "        raise KeyError('red')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    more = ["--rewards.names", "colour_blind:colour_blind", "--eval_file", "null", "--max_steps", "2"]
    with pytest.raises(
        RewardError, match="reward 'colour_blind' failed on 'a red circle and w.' .*failed-colour_blind"
    ):
        run(job, tmp_path / "stops", *more)
    assert (tmp_path / "stops" / "failed-colour_blind.png").exists()
    run(job, tmp_path / "skips", *more, "--rewards.on_reward_error", "skip")
    for row in metrics(tmp_path / "skips"):
        assert row["rewards/colour_blind/skipped"] == 16 * row["rewards/colour_blind/missing"] > 0


LORA = ("--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj,up_proj,down_proj,lm_head")
LORA += ("--eval_file", "null", "--sample_steps", "0", "--lr_scheduler_type", "linear")


def adapters(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step:06d}" / "adapter_model.safetensors")


def test_a_lora_run_goes_on_and_is_merged(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    more = (*LORA, "--lora_dropout", "0.1", "--max_steps", "4")
    run(job, tmp_path / "whole", *more)
    run(job, tmp_path / "parts", *more, "--stop_after", "2")
    run(job, tmp_path / "parts", *more, "--resume", "auto")
    last = tmp_path / "parts" / "checkpoint-000004"
    assert_same_weights(adapters(tmp_path / "whole", 4), adapters(tmp_path / "parts", 4))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert metrics(tmp_path / "parts")[-1]["kl"] > 0
    assert not (last / "model.safetensors").exists()
    names = adapters(tmp_path / "parts", 4)
    assert len(names) == 2 * (2 * 3 + 1) and all("lora_" in name for name in names)  # of the language model alone

    for changed, message in (
        (("--lora_r", "8"), "lora_r 4, which cannot become 8"),
        (("--lora_r", "0"), "lora_r 4, which cannot become 0"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-000004 was trained with {message} within a run"):
            run(job, tmp_path / "parts", *more, "--resume", "auto", *changed)
    with pytest.raises(ValueError, match=r"is a LoRA adapter; merge it .*bicot\.model\.merge_lora .*checkpoint-000004"):
        run(job, tmp_path / "new", *more, "--model_name_or_path", str(last))

    monkeypatch.setattr(sys, "argv", ["merge_lora", str(last), str(tmp_path / "merged")])
    merge_lora()
    assert f"wrote {tmp_path / 'merged'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="merged exists; give a new folder"):
        merge_lora()
    ids = torch.tensor([[0, 8, 9, 10, 11]])
    adapted, whole, base = (
        load_policy(path, dtype=torch.float32).model(input_ids=ids).logits
        for path in (last, tmp_path / "merged", job / "model")
    )
    torch.testing.assert_close(whole, adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - base).abs().max() > 1e-2
    assert (tmp_path / "merged" / "bicot.json").read_text() == (last / "bicot.json").read_text()
    drawing = ["a red circle", "--model", str(last), "--num_generations", "1", "--output", str(tmp_path / "grid.png")]
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    generate.main(drawing)
    assert (tmp_path / "grid.png").is_file()


def test_lora_trains_and_keeps_its_adapters_alone(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    trainer = Trainer(parse_config(words(job, tmp_path, *LORA)), Ranks(0, 1, torch.device("cpu")))
    assert trainer.reference is trainer.policy
    sizes = [parameter.numel() for parameter in trainer.optimizer.parameters]
    assert sum(sizes) == 2 * 4 * (32 + 32 + 2 * (32 + 48)) + 4 * (32 + 61)
    with pytest.raises(ValueError, match="lora_target_modules: no layer outside freeze is named 'vision_head'"):
        run(job, tmp_path, *LORA, "--lora_target_modules", "q_proj,vision_head")
    run(job, tmp_path / "full", "--max_steps", "2", "--stop_after", "1")
    with pytest.raises(ValueError, match="checkpoint-000001 was trained with lora_r 0, which cannot become 4"):
        run(job, tmp_path / "full", *LORA, "--resume", "auto")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA adapters need peft: pip install 'bicot\[peft\]'"):
        run(job, tmp_path / "none", *LORA)


def test_two_ranks_with_lora_equal_one(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    more = (*LORA, "--max_steps", "2", "--adam_epsilon", "1e-3")
    run(job, tmp_path / "one", *more, "--gradient_accumulation_steps", "2")
    # micro-batches of one or two samples, which cut groups, and not as many on each rank
    cut = ("--gradient_accumulation_steps", "1", "--micro_batch_tokens", "100")
    two = words(job, tmp_path / "two", *more, *cut)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(ROOT / "train.py"), *two], check=True, env=_environment(job), timeout=300)
    for name, weight in adapters(tmp_path / "one", 2).items():
        torch.testing.assert_close(adapters(tmp_path / "two", 2)[name], weight, atol=1e-6, rtol=0)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_with_adamw_8bit_equal_one(dtype: str, job: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    more = (*SMALL, "--max_steps", "3", "--optim", "adamw_8bit", "--dtype", dtype, "--adam_epsilon", "1e-3")
    run(job, tmp_path / "one", *more, "--gradient_accumulation_steps", "2")
    two = words(job, tmp_path / "two", *more, "--gradient_accumulation_steps", "1")
    subprocess.run([*TWO_RANKS, str(ROOT / "train.py"), *two], check=True, env=_environment(job), timeout=500)
    # the sum over two ranks is the sum of two micro-batches, so no moment is quantised otherwise
    assert_same_weights(weights(tmp_path / "one", 3), weights(tmp_path / "two", 3))
    moved, start = weights(tmp_path / "two", 3)["lm_head.weight"], load_file(job / "model" / "model.safetensors")
    assert not torch.equal(moved, start["lm_head.weight"].to(moved.dtype))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
