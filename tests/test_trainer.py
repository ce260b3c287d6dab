"""Whole runs: what they leave, that each setting takes part, bad prompts and rewards, signals."""

from __future__ import annotations

import gc
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, wait_until
from training import SMALL, assert_same_weights, environment, metrics, run, steps_of, weights, words, write_rows

from bicot.grpo.rollout_files import load_rollout, path_of
from bicot.grpo.trainer import Trainer
from bicot.grpo.view import Run
from bicot.model.policy import load_policy
from bicot.rewards.worker import RewardError

WriteModule = Callable[[str, str], None]


def test_a_run_leaves_everything(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(job, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {
        "heldout_reward_before", "heldout_reward_after", "steps", "seconds", "images_per_second", "seed",
    }  # fmt: skip
    assert summary["steps"] == 6 and summary["images_per_second"] > 0
    table = capsys.readouterr().out
    assert "before" in table and "after" in table and "color" in table and "all" in table
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    expected = {"reward", "reward_std", "kl", "entropy", "text/kl", "grad_norm", "plan_entropy"}
    expected |= {f"rewards/redness/{what}" for what in ("mean", "std", "missing", "skipped")}
    assert expected <= set(metrics(tmp_path)[0])
    assert any(key.startswith("reward_by_task/") for key in metrics(tmp_path)[0])
    kept = [path.name for path in sorted(tmp_path.glob("checkpoint-*"))]
    assert kept == ["checkpoint-000004", "checkpoint-000006"], "save_total_limit is 2"
    assert (tmp_path / "before_after.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "src='http" not in page and "href=" not in page, "the page is self-contained"
    assert page.count("<img") >= 6
    assert "<p>Finished after step 6 of 6." in Run(tmp_path).page("")
    before, after = load_file(job / "model" / "model.safetensors"), weights(tmp_path)
    loaded = load_policy(tmp_path / "checkpoint-000006", dtype=torch.float32)
    assert torch.equal(loaded.model.lm_head.weight, after["lm_head.weight"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("model.language_model", "lm_head")) for name in moved)


def test_evaluation_has_its_own_guidance(job: Path, tmp_path: Path) -> None:
    """The guidance of evaluations changes held-out samples, and no training."""
    for name, given in {"1": ["1"], "2": ["2"], "1 and 2": ["1", "--eval_cfg_weight", "2"]}.items():
        run(job, tmp_path / name, "--max_steps", "1", "--sample_steps", "0", "--cfg_weight", *given)

    def drawn(name: str) -> list[bytes]:
        return [(tmp_path / name / "samples" / f"heldout-before.{end}").read_bytes() for end in ("jsonl", "npz")]

    assert drawn("1 and 2") == drawn("2") != drawn("1")
    assert metrics(tmp_path / "1 and 2") == metrics(tmp_path / "1") != metrics(tmp_path / "2")
    assert_same_weights(weights(tmp_path / "1 and 2"), weights(tmp_path / "1"))


@pytest.mark.parametrize(
    "more",
    [
        ("--beta", "0", "--loss_type", "grpo", "--scale_rewards", "none", "--chat_template", "janus"),
        ("--loss_type", "gspo", "--num_iterations", "2", "--importance_sampling_correction", "true"),
        ("--loss_type", "cispo", "--epsilon_high", "5", "--kl_estimator", "k1", "--entropy_coef", "0.01"),
        ("--loss_type", "dr_grpo", "--kl_estimator", "k2", "--policy_logits", "guided", "--delta", "2"),
        ("--loss_type", "bnpo", "--scale_rewards", "batch", "--gradient_checkpointing", "true", "--top_k", "5"),
        ("--multi_objective_aggregation", "normalize_then_sum", "--top_p", "0.9"),
    ],
)
def test_settings_of_the_loss_and_of_sampling_train(more: tuple[str, ...], job: Path, tmp_path: Path) -> None:
    run(job, tmp_path, *SMALL, "--max_steps", "1", *more)
    (row,) = metrics(tmp_path)
    assert row["grad_norm"] > 0 and ("kl" in row) == ("--beta" not in more)


@pytest.mark.parametrize("lora", [(), ("--lora_r", "2", "--lora_dropout", "0.5")])
def test_settings_that_save_memory_change_no_bit(job: Path, tmp_path: Path, lora: tuple[str, ...]) -> None:
    """Of the weights; "auto" recomputes nothing on a CPU."""
    settings = [("--gradient_checkpointing", how) for how in ("false", "true", "selective", "auto")]
    settings += [("--rollout_kv_release", "true")] + [("--reference_device", "cpu")] * (not lora)
    for i, more in enumerate(settings):
        run(job, tmp_path / str(i), *SMALL, *lora, "--max_steps", "2", *more)
        assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / str(i)))


@pytest.mark.parametrize("lora", [(), ("--lora_r", "2", "--lora_dropout", "0.5")])
def test_each_step_may_recompute_another_way(
    job: Path, tmp_path: Path, lora: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `gradient_checkpointing: auto` does on a GPU."""
    run(job, tmp_path / "0", *SMALL, *lora, "--max_steps", "5")
    longest, ways = list[int](), iter([True, "selective", False, True, False])

    def recomputing(plan: int) -> bool | str:
        longest.append(plan)
        return next(ways)

    monkeypatch.setattr(Trainer, "_settle", lambda _, config: (config, recomputing))
    run(job, tmp_path / "1", *SMALL, *lora, "--max_steps", "5", "--save_rollouts", str(tmp_path / "kept"))
    assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / "1"))
    kept = [load_rollout(path_of(tmp_path / "kept", step, 0), torch.device("cpu")).rollout for step in range(1, 6)]
    assert longest == [max(map(len, rollout.plans.tolist())) for rollout in kept]


# rewards


def test_a_step_in_which_no_reward_applies_changes_nothing(
    job: Path, tmp_path: Path, write_module: WriteModule
) -> None:
    write_module("never", "def never(images, examples):\n    return images.mean((1, 2, 3)) * float('nan')\n")
    run(job, tmp_path / "out", "--rewards.names", "never:never", "--max_steps", "2")
    assert [row["update_skipped"] for row in metrics(tmp_path / "out")] == [1, 1]
    assert_same_weights(weights(tmp_path / "out"), load_file(job / "model" / "model.safetensors"))
    rows = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert steps_of(tmp_path / "out") == [1, 2] and "NaN" not in rows and '"reward"' not in rows
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["heldout_reward_after"] is None


def test_equal_rewards_have_no_spread(job: Path, tmp_path: Path, write_module: WriteModule) -> None:
    """The standard deviation of eight times 0.35 in float32 is not 0."""
    write_module("even", "def even(images, examples):\n    return images.new_full((len(images),), 0.35)\n")
    more = (*SMALL, "--max_steps", "1", "--num_generations", "8", "--beta", "0")
    run(job, tmp_path / "out", "--rewards.names", "even:even", *more)
    (row,) = metrics(tmp_path / "out")
    assert row["frac_reward_zero_std"] == 1.0 and row["reward_std"] == row["rewards/even/std"] == 0.0
    assert not json.loads((tmp_path / "out" / "run.json").read_text())["alarms"]


def test_collections_in_a_step_do_not_scan_what_was_imported(
    job: Path, tmp_path: Path, write_module: WriteModule
) -> None:
    lines = ["import gc", "counts = []", "def scan(images, examples):", "    counts.append(len(gc.get_objects()))"]
    write_module("scan", "\n".join([*lines, "    return images.mean((1, 2, 3))\n"]))
    before = len(gc.get_objects())
    run(job, tmp_path / "out", *SMALL, "--rewards.names", "scan:scan", "--max_steps", "2")
    assert len(sys.modules["scan"].counts) == 2 and max(sys.modules["scan"].counts) < before / 4
    assert len(gc.get_objects()) > before / 2 and gc.get_freeze_count() == 0


def test_a_reward_that_fails_ends_the_run_and_saves_its_picture(
    job: Path, tmp_path: Path, write_module: WriteModule
) -> None:
    write_module(
        "colour_blind",
        "def colour_blind(images, examples):\n"
        "    if any('red' in example.prompt for example in examples):\n"
        "        raise KeyError('red')\n"
        "    return images.mean((1, 2, 3))\n",
    )
    more = ["--rewards.names", "colour_blind:colour_blind", "--eval_file", "null", "--max_steps", "2"]
    message = "reward 'colour_blind' failed on 'a red circle and w.' .*failed-colour_blind"
    with pytest.raises(RewardError, match=message):
        run(job, tmp_path / "stops", *more)
    assert (tmp_path / "stops" / "failed-colour_blind.png").exists()
    run(job, tmp_path / "skips", *more, "--rewards.on_reward_error", "skip")
    for row in metrics(tmp_path / "skips"):
        assert row["rewards/colour_blind/skipped"] == 16 * row["rewards/colour_blind/missing"] > 0


def test_a_reward_that_fails_late_loses_no_step(
    job: Path, tmp_path: Path, write_module: WriteModule, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["calls = []", "def fails_late(images, examples):", "    calls.append(len(images))"]
    lines += ["    if len(calls) > 3 and calls[-1] == calls[0]:", "        raise KeyError('a step')"]
    write_module("fails_late", "\n".join([*lines, "    return images.mean((1, 2, 3))\n"]))
    more = (*SMALL, "--rewards.names", "fails_late:fails_late", "--save_steps", "100")
    with pytest.raises(RewardError, match="reward 'fails_late' failed on "):
        run(job, tmp_path / "out", *more)
    assert steps_of(tmp_path / "out") == [1, 2, 3] and "checkpoint-000003; continue with" in capsys.readouterr().out
    run(job, tmp_path / "out", *SMALL, "--resume", "auto", "--stop_after", "4")
    assert steps_of(tmp_path / "out") == [1, 2, 3, 4]


# pictures and prompts


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such glyph")

    with monkeypatch.context() as patch:
        patch.setattr("bicot.grpo.trainer.draw_grid", broken)
        run(job, tmp_path, "--max_steps", "2")
    assert "step 2: no grid of samples: RuntimeError: no such glyph" in capsys.readouterr().out
    assert len(metrics(tmp_path)) == 2
    for name in ("before_after.png", "report.html"):
        (tmp_path / "again" / name).mkdir(parents=True)  # neither can be written
    (tmp_path / "again" / "samples" / "step-000002.jsonl").mkdir(parents=True)
    assert run(job, tmp_path / "again", "--max_steps", "2")["steps"] == 2
    said = capsys.readouterr().out.splitlines()
    for line in ("step 2: no grid of samples", "no before_after.png", "no report.html"):
        assert sum(each.startswith(f"{line}: IsADirectoryError: ") for each in said) == 1
    assert said[-1].endswith(f"checkpoint and metrics are in {tmp_path / 'again'}")
    assert (tmp_path / "again" / "checkpoint-000002" / "manifest.json").is_file()
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["steps"] == 2


def test_prompts_that_no_reward_scores_are_said_at_start(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing would be trained on them."""
    rows = [{"prompt": "a red circle", "task_type": "object", "nouns": nouns} for nouns in (["red circle"], [])]
    more = ("--rewards.names", "scene", "--max_steps", "1", *SMALL, "--train_file")
    run(job, tmp_path / "some", *more, write_rows(tmp_path / "some.jsonl", rows))
    assert "some.jsonl: no reward applies to 1 of 2 prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none.jsonl: no reward applies to 2 of 2 prompts"):
        run(job, tmp_path / "none", *more, write_rows(tmp_path / "none.jsonl", rows[1:] * 2))
    assert not (tmp_path / "none").exists()


CHOOSY = """
class Choosy:
    name = "choosy"
    def check(self, example):
        if "pentagon" in example.prompt:
            raise ValueError("sees no pentagons")
    def score(self, images, examples):
        assert not any("pentagon" in example.prompt for example in examples)
        return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("file", ["train_file", "eval_file"])
def test_prompts_that_cannot_be_used_are_found_at_start(
    file: str, job: Path, tmp_path: Path, write_module: WriteModule, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is touched, and those that a reward cannot score before the policy is loaded; or left out."""
    write_module("choosy", CHOOSY)
    good, pentagon, long = (
        json.dumps({"prompt": prompt, "task_type": "object"})
        for prompt in ("a red circle", "a red pentagon", "w1 " * 105)
    )
    prompts = tmp_path / "prompts.jsonl"
    more = ["--rewards.names", "choosy:Choosy", "--max_steps", "1", "--sample_steps", "0", f"--{file}", str(prompts)]
    for bad, message, rest in (
        ("{", "Expecting property name", ("--rewards.names", "no.such:Reward")),
        (pentagon, "reward 'choosy': sees no pentagons", ("--model_name_or_path", "no/such/model")),
        (long, "prompt too long", ()),
    ):
        prompts.write_text("\n".join((good, bad, good)))
        with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: {message}.*; fix it, or .* --skip_bad_prompts true"):
            run(job, tmp_path / "out", *more, *rest)
    assert not (tmp_path / "out").exists()
    prompts.write_text("\n".join((long, good, pentagon, "{", good)))
    run(job, tmp_path / "out", *more, "--skip_bad_prompts", "true")
    first, *listed = capsys.readouterr().out.splitlines()[:4]
    assert first == f"{prompts}: 3 of 5 lines are left out:"
    for line, start in zip(listed, ("1: prompt too long", "3: reward 'choosy'", "4: Expecting"), strict=True):
        assert line.startswith(f"  {prompts}:{start}")


# processes; test_newcomer.py has the other errors of one line


@pytest.mark.parametrize(
    ("script", "more", "line"),
    [
        ("train.py", ("--resume", "nowhere"), "error: resume='nowhere': no trainer_state.pt there"),
        ("generate.py", ("a", "--model", "nowhere/at-all"), "error: 'nowhere/at-all' is neither"),
    ],
)
def test_an_error_is_one_line(script: str, more: tuple[str, ...], line: str, job: Path, tmp_path: Path) -> None:
    given = words(job, tmp_path / "out", *more) if script == "train.py" else list(more)
    command = [sys.executable, str(ROOT / script), *given]
    variables = environment(job) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr
    assert "(--debug shows where)" in done.stderr and not (tmp_path / "out").exists()


def test_sigterm_finishes_the_step_and_saves(job: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *words(job, tmp_path, *SMALL, "--max_steps", "100000")]
    process = subprocess.Popen(command, env=environment(job), stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path)) >= 3, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
    last = steps_of(tmp_path)[-1]
    assert (tmp_path / f"checkpoint-{last:06d}" / "trainer_state.pt").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == last
    line, advice = said.splitlines()[-1].split("; continue with: ")
    assert line == f"stopped by SIGTERM after step {last} of 100000"
    again = [*shlex.split(advice), "--max_steps", str(last + 1)]
    subprocess.run(again, check=True, env=environment(job), timeout=120)
    assert steps_of(tmp_path) == list(range(1, last + 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_says_how_to_go_on(number: signal.Signals, job: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('asked').touch()\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / "train.py"), *words(job, tmp_path / "out", "--rewards.names", "slow:Slow")]
    process = subprocess.Popen(command, env=environment(job), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_until((tmp_path / "asked").exists, process)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    advice = shlex.join([*command, "--resume", "auto"])
    assert said[-1] == f"stopped by {number.name}; continue with: {advice}" and "Traceback" not in "".join(said)
    assert process.returncode == 128 + number
