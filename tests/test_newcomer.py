"""What newcomers type wrong: one line names the thing and the fix, and no file is written.

The programs run in this process, since another imports everything for 4 seconds; test_trainer.py has real ones.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from training import SMALL, run, run_program, words
from transformers import LlamaConfig

from bicot.grpo.checkpoint import list_checkpoints

GONE = {"werkzeug": r'the live view needs werkzeug; pip install -e "\.\[view\]"'}
GONE |= {"peft": "LoRA adapters need peft: pip install 'bicot.peft.'"}
GONE |= {"deepspeed": "pip install 'bicot.deepspeed.'"}
GONE |= {"torchao": "optim=adamw_8bit needs torchao: pip install 'bicot.torchao.'"}
GONE |= {name: f"report_to: {name} is not installed; pip install {name}" for name in ("wandb", "trackio")}
GONE["torch.utils.tensorboard"] = "report_to: tensorboard is not installed; pip install tensorboard"


@pytest.fixture(scope="module")
def wrong(job: Path) -> Path:
    """A folder of things that are not what they seem."""
    folder = job / "wrong"
    weights = (job / "model" / "model.safetensors").read_bytes()

    def model(name: str, **files: bytes | None) -> Path:
        shutil.copytree(job / "model", folder / name)
        for file, content in files.items():
            path = folder / name / file.replace("__", ".")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        return folder / name

    model("half", model__safetensors=weights[: len(weights) // 2])
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    model("shard", model__safetensors=None)
    (folder / "shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    model("interrupted", model__safetensors=None, model__safetensors__incomplete=weights[:100])
    model("no_config", config__json=b"")
    model("torn_config", config__json=b'{"model_type": "jan')
    model("list_config", config__json=b"[]")
    model("no_tokenizer", tokenizer__json=None, tokenizer_config__json=None)
    model("torn_tokenizer", tokenizer__json=b'{"a')
    model("torn_settings", bicot__json=b'{"prompts": {}')
    model("other_settings", bicot__json=b'{"prompts": {"x": 1}, "sampling": {}}')
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder / "llama")
    huge = json.loads((job / "model" / "config.json").read_text())
    huge["text_config"] |= {"hidden_size": 32768, "intermediate_size": 131072, "num_hidden_layers": 64}
    model("huge", model__safetensors=None, config__json=json.dumps(huge).encode())
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "zero").write_text("")
    good = '{"prompt": "a", "task_type": "x"}\n'
    (folder / "torn.jsonl").write_text(good + '{"prompt": "a"\n')
    (folder / "odd.jsonl").write_text(good + '{"prompt": 3, "task_type": "x"}\n')
    (folder / "two.txt").write_text("plan {} {}")
    (folder / "latin.txt").write_bytes("für {}".encode("latin-1"))
    (folder / "torn.json").write_text("{")
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    return folder


# what is typed after a command line that is right; W is the folder above
TRAIN = {
    "a model folder that is not there": (
        "--model_name_or_path W/none",
        "'W/none' is neither a folder with a model's",
    ),
    "a file as model": ("--model_name_or_path W/file", "'W/file' is neither a folder"),
    "an empty folder as model": ("--model_name_or_path W/empty", "'W/empty' has no config.json of a model"),
    "weights that were half copied": ("--model_name_or_path W/half", "model.safetensors cannot be read, download it"),
    "an index that names a missing shard": ("--model_name_or_path W/shard", "download it again: .*-00001-of-00002"),
    "an interrupted download": ("--model_name_or_path W/interrupted", "download it again: .*no file named model.safe"),
    "a config.json of no bytes": ("--model_name_or_path W/no_config", "config.json is not JSON, copy or download it"),
    "a torn config.json": ("--model_name_or_path W/torn_config", "config.json is not JSON, copy or download it"),
    "a config.json that is a list": ("--model_name_or_path W/list_config", "has no config.json of a model"),
    "a model without a tokenizer": ("--model_name_or_path W/no_tokenizer", "tokenizer cannot be read, copy tokenizer"),
    "a torn tokenizer.json": ("--model_name_or_path W/torn_tokenizer", "tokenizer cannot be read, copy tokenizer.json"),
    "another architecture": ("--model_name_or_path W/llama", "is a 'llama' checkpoint; bicot trains Janus"),
    "a torn adapter_config.json": ("--model_name_or_path W/lora", "names no base_model_name_or_path, copy it again"),
    "a model larger than the machine": (
        "--model_name_or_path W/huge",
        "GiB per GPU .* this machine, which has no GPU, has",
    ),
    "a torn bicot.json": (
        "--model_name_or_path W/torn_settings",
        "bicot.json has no valid settings.*; delete it for the def",
    ),
    "another bicot.json": ("--model_name_or_path W/other_settings", "bicot.json has no valid settings"),
    "no prompt file": ("--train_file W/none", "W/none is not there; give a prompt file in T2I-R1's JSONL schema"),
    "a folder as prompt file": ("--train_file W/empty", "W/empty is a folder; give a prompt file"),
    "a prompt file of no bytes": ("--train_file W/zero", "W/zero has no prompts"),
    "a torn row": ("--train_file W/torn.jsonl", "W/torn.jsonl:2: .*; fix it, or leave such lines out with --skip_bad"),
    "an odd held-out row": ("--eval_file W/odd.jsonl", "W/odd.jsonl:2: prompt must be a non-empty string, got 3"),
    "no held-out file": ("--eval_file W/none", "W/none is not there; give a prompt file"),
    "no instruction": (
        "--reasoning_prompt_path W/none",
        "reasoning_prompt_path='W/none' is not a text file in UTF-8: .*No",
    ),
    "an instruction in Latin-1": (
        "--reasoning_prompt_path W/latin.txt",
        "'W/latin.txt' is not a text file in UTF-8: 'utf",
    ),
    "two places for the prompt": ("--reasoning_prompt_path W/two.txt", "placeholder {} exactly once"),
    "no checkpoint to go on from": ("--resume W/empty", "resume='W/empty': no trainer_state.pt there; give a checkp"),
    "no rollouts to replay": ("--replay W/none", "replay='W/none': step-000001-rank-0.safetensors is missing"),
    "no DeepSpeed file": ("--deepspeed W/none", "deepspeed='W/none' is not a JSON file: .*No such file"),
    "a torn DeepSpeed file": ("--deepspeed W/torn.json", "deepspeed='W/torn.json' is not a JSON file"),
    "a preset in another case": (
        "--config configs/janus-pro-1B.yaml",
        r"no such file; did you mean .*janus-pro-1b\.yaml\?",
    ),
    "a preset by its name": ("--config janus-pro-7b", r"no such file; did you mean .*configs/janus-pro-7b\.yaml\?"),
    "a settings file that is not there": ("--config W/none.yaml", r"--config W/none.yaml: no such file \("),
    "a folder as settings file": ("--config W/empty", "--config W/empty: a folder, not a file"),
    "a setting with a typing error": (
        "--learning_rat 1",
        "unknown setting 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "a setting of transformers": ("--bf16 true", "unknown setting 'bf16'"),
    "a word too many": ("now", "unrecognized arguments: now"),
    "a word for a number": ("--max_steps ten", "max_steps: expected int. Got value: ten"),
    "a word for one of two types": ("--beta low", "beta: expected one of float, dict.str, float.. Got value: low"),
    "a dtype by its short name": ("--dtype bf16", "dtype: expected Literal.'bfloat16', 'float32'.. Got value: bf16"),
    "an unknown schedule": ("--lr_scheduler_type linaer", "lr_scheduler_type='linaer' must be one of linear, cosine"),
    "no value": ("--learning_rate", "argument --learning_rate: expected one argument"),
    "an unknown reward": (
        "--rewards.names hpsv2",
        "unknown reward 'hpsv2'; did you mean 'hps'.; built in are",
    ),
    "a reward that is not installed": ("--rewards.names my:Own", "reward 'my:Own' cannot be imported: No module named"),
    "a file as output folder": ("--output_dir W/file", r"output_dir: nothing can be written into W/file \("),
    "an output folder in a file": (
        "--output_dir W/file/x",
        r"output_dir: nothing can .*/x \(Not a directory\); give an",
    ),
    "a read-only output folder": ("--output_dir /proc/x", "output_dir: nothing can be written into /proc/x"),
    "an output folder that is a device": ("--output_dir /dev/full", "nothing can be written into /dev/full"),
    "a file for rollouts": ("--save_rollouts W/file", "save_rollouts: nothing can be written into W/file"),
    "a profile that is no .json": ("--profile W/file", "profile='W/file' must be a .json file to write"),
    "a read-only profile": ("--profile /proc/x.json", "profile: nothing can be written into /proc"),
    "a function of token weights that is not there": ("--token_weights my:own", "token_weights 'my:own' cannot be imp"),
    "no hub in sight": (
        "--push_to_hub true",
        "push_to_hub: .* does not let this run write to 'out'.*log in with `hf auth",
    ),
    "a hub name alone": ("--hub_model_id me/it", "hub_model_id='me/it' needs push_to_hub=true"),
    "LoRA without peft": ("--lora_r 4", GONE["peft"]),
    "ZeRO without deepspeed": ("--deepspeed W/zero3.json", GONE["deepspeed"]),
    "8 bits without torchao": ("--optim adamw_8bit", GONE["torchao"]),
    "a view without werkzeug": ("--view", GONE["werkzeug"]),
    "a view on a port that does not exist": ("--view 70000", "the live view's port 70000 must be 0 .any free one"),
    "a memory plan of no model": ("--dry_run --model_name_or_path W/none", "'W/none' is neither a folder"),
    "plans without room for a picture": (
        "--max_completion_length 110",
        r"train\.jsonl:1: prompt too long: .* lower max_completion_length: 'a red circ",
    ),
    "attention of a GPU": (
        "--attn_implementation varlen --dtype bfloat16 --model_name_or_path W/none",
        "attn_implementation=varlen needs an NVIDIA GPU",
    ),
    "wandb without it": ("--report_to wandb", GONE["wandb"]),
    "trackio without it": ("--report_to trackio", GONE["trackio"]),
    "tensorboard without it": ("--report_to tensorboard", GONE["torch.utils.tensorboard"]),
}
GENERATE = {
    "a model that was half copied": ("--model W/half", "model.safetensors cannot be read, download it again"),
    "a torn bicot.json": ("--model W/torn_settings", "bicot.json has no valid settings"),
    "a GPU where there is none": ("--device cuda:7", r"--device cuda:7: torch sees \d GPUs here; leave --device out"),
    "a device by another name": ("--device gpu", "--device gpu is no device; give cpu, cuda, or cuda:1 for the second"),
    "an option with a typing error": ("--modell W/half", "unknown setting 'modell'; did you mean 'model'?"),
    "a word for a number": ("--seed x", "argument --seed: invalid int value: 'x'"),
    "no instruction": ("--reasoning_prompt_path W/none", "reasoning_prompt_path='W/none' is not a text file"),
    "pictures into a file": ("--output W/file/x.png", "--output: nothing can be written into W/file"),
    "pictures into a read-only folder": ("--output /proc/x.png", "--output: nothing can be written into /proc"),
    "no prompt file": ("--prompt_file W/none", "no prompt file at W/none"),
    "a folder as prompt file": ("--prompt_file W/empty", "no prompt file at W/empty"),
}


def said_by(script: str, given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str, str]:
    """The exit code and what stands on stderr, of `python script given`."""
    with pytest.raises(SystemExit) as end:
        run_program(script, given)
    code = end.value.code
    return code, capsys.readouterr().err + (f"{code}\n" if isinstance(code, str) else "")  # which Python prints


@pytest.fixture
def one_line(
    wrong: Path, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Runs a program, and looks at what it said and left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def check(script: str, given: list[str], more: str, message: str) -> None:
        for name in GONE:
            if message == GONE[name]:
                monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        before = {(path, path.stat().st_mtime_ns) for path in job.rglob("*") if path.is_file()}
        code, text = said_by(script, [*given, *more.replace("W/", f"{wrong}/").split()], capsys)
        assert text.count("\n") == 1, text
        line = text.rstrip("\n")
        assert code not in (0, None) and re.search(message.replace("W/", f"{wrong}/"), line), line
        assert list(tmp_path.iterdir()) == [], "something was written"
        assert before == {(path, path.stat().st_mtime_ns) for path in job.rglob("*") if path.is_file()}

    return check


@pytest.mark.parametrize("case", TRAIN)
def test_train(case: str, job: Path, tmp_path: Path, one_line: Callable[..., None]) -> None:
    one_line("train.py", words(job, tmp_path / "out", *SMALL), *TRAIN[case])


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case: str, one_line: Callable[..., None]) -> None:
    one_line("generate.py", ["a red circle", "--max_completion_length", "4"], *GENERATE[case])


def test_debug_shows_where_an_error_came_from(job: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trainer_state.pt there"):
        run_program("train.py", words(job, tmp_path / "out", "--resume", "nowhere", "--debug"))


def test_a_full_disk_keeps_the_checkpoints_before(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may not become as large as the weights."""
    output, more = tmp_path / "out", [*SMALL, "--save_steps", "1", "--max_steps", "1"]
    run(job, output, *more)
    whole = list_checkpoints(output)
    size = (whole[0] / "model.safetensors").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    given = words(job, output, *more, "--max_steps", "2", "--resume", "auto")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
        _, text = said_by("train.py", given, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert re.search(r"error: .*checkpoint-000002 cannot be written \(.*too large.*\); make room, and continue", text)
    assert list_checkpoints(output) == whole and not list(output.glob(".checkpoint-*"))
    assert run(job, output, *more, "--max_steps", "2", "--resume", "auto")["steps"] == 2
