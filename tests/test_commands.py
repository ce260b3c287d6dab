"""Every command of the README and of the other pages can be typed in, and a test runs the like with smaller sizes.

train.py, generate.py and evaluate.py parse the words of their commands; for other commands, the module or the script
exists. A command that no test can run says in its comment that it needs GPUs or downloads.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from test_docs import PAGES
from tiny import ROOT

from bicot import evaluate, generate
from bicot.grpo.cli import parse

# how a command begins -> the test that runs it
RUN_BY = {
    "make train": "test_trainer.py::test_a_run_leaves_everything",
    "make test": "../.ci/run",
    "make bench": "test_bench.py::test_gpu_script_walks_to_its_end",
    "bash bench/gpu.sh": "test_bench.py::test_gpu_script_walks_to_its_end",
    "python train.py": "test_trainer.py::test_a_run_leaves_everything",
    "python train.py --resume": "test_resume.py::test_resumed_equals_uninterrupted_bit_for_bit",
    "python train.py --profile": "test_profile.py::test_training_settings_are_profiled_instead_of_trained",
    "python train.py --config FILE --dry_run": "test_plan.py",
    "python train.py --view": "test_view.py::test_the_view_of_a_job_ends_with_it",
    "python train.py --rewards.names my_rewards": "test_docs.py::test_reward_example_is_a_reward",
    "torchrun --nproc-per-node 2 train.py": "test_distributed.py::test_one_ctrl_c_finishes_the_step_and_saves",
    "NNODES=2 MASTER_ADDR=FIRST bash examples": "test_multinode.py::test_two_machines_train_as_two_ranks_of_one",
    "python generate.py": "test_generate.py::test_generate_from_any_checkpoint",
    "python generate.py --prompt_file prompts.txt --json": "test_generate.py::test_json_is_alone_on_stdout",
    "python generate.py --prompt_file toy": "test_generate.py::test_best_of_keeps_the_best_of_what_is_drawn_anyway",
    "python evaluate.py": "test_benchmarks.py::test_geneval_and_dpg_show_the_same_samples",
    "python evaluate.py --prompts held": "test_benchmarks.py::test_own_scores_and_the_difference_of_two_checkpoints",
    "python -m bicot.view": "test_view.py::test_the_command",
    "python -m bicot.rewards.check": "test_published_rewards.py::test_check_shows_what_works",
    "python -m bicot.bench.kernels grpo_loss": "test_bench.py",
    "python -m bicot.bench.step_profile": "test_profile.py::test_the_phases_cover_a_toy_step",
    "python -m bicot.bench.bench_step": "test_baseline.py::test_the_walk_and_its_section",
    "python -m bicot.bench.compare": "test_compare.py::test_the_command",
    "pip install -e .": "../Makefile",
}
NEEDS = re.compile(r"GPU|download", re.IGNORECASE)
PUBLISHED = re.compile(r"janus-pro|\b(hps|git|grounding|orm)\b|nproc-per-node 8")  # published weights, or eight GPUs
COMMAND = re.compile(r"^    ((?:\w+=\S+ )*(?:python|torchrun|make|bash|pytest|pip|hf|bicot-\w+) .*)$", re.MULTILINE)
COMMANDS = [
    (page, *(part.strip() for part in re.split(r" +# |$", line, maxsplit=1)))
    for page, text in PAGES.items()
    for line in COMMAND.findall(re.sub(r" *\\\n +", " ", text))
]


@pytest.mark.parametrize(
    ("page", "command", "comment"), COMMANDS, ids=[f"{page}: {line}" for page, line, _ in COMMANDS]
)
def test_a_command_can_be_typed_in(
    page: str, command: str, comment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    monkeypatch.chdir(ROOT)
    if (program := next((i for i, word in enumerate(words) if word.endswith(".py")), None)) is not None:
        given = [str(ROOT / "configs/toy.yaml") if word == "FILE" else word for word in words[program + 1 :]]
        if words[program] == "train.py":
            parse(given)
        elif words[program] == "evaluate.py":
            evaluate.parse_args(given)
        else:
            generate.parse_args(given)
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
    elif "bash" in words:
        assert (ROOT / words[words.index("bash") + 1]).exists()
    run = any(command.startswith(beginning) for beginning in RUN_BY)
    assert (run and not PUBLISHED.search(command)) or NEEDS.search(comment), (
        "no test runs this, and it does not say that it needs GPUs or downloads"
    )


@pytest.mark.parametrize("test", RUN_BY.values())
def test_the_tests_that_run_commands_exist(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text() if name else (ROOT / "tests" / file).exists()
