"""The published rewards together, loaded by name from small checkpoints: schedules, published prompts, the check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from tiny import PUBLISHED_PROMPTS, ROOT
from tiny_git import make_git
from tiny_grounding import make_grounding
from tiny_hps import make_hps
from tiny_orm import make_orm
from torch import Tensor
from training import SMALL, run, write_rows

from bicot.grpo.data import PromptFile
from bicot.rewards.base import Example, NumeracyInfo, Reward, SpatialInfo
from bicot.rewards.check import EXAMPLES as CHECKED
from bicot.rewards.check import main as check_main
from bicot.rewards.config import RewardConfig, load_reward
from bicot.rewards.ensemble import RewardHandle
from bicot.rewards.worker import RewardError

NAMES = ["hps", "git", "grounding", "orm"]
Options = dict[str, dict[str, Any]]
DOWNLOADS = {
    "hps": "hf download xswu/HPSv2 HPS_v2.1_compressed.pt",
    "git": "hf download microsoft/git-large-vqav2",
    "grounding": "hf download IDEA-Research/grounding-dino-tiny",
    "orm": "hf download CaraJ/ORM-T2I-R1",
}
EXAMPLES = [
    *[Example("a red cat and a dog", "color", ("cat", "dog"), ("red cat", "dog"))] * 3,
    *[Example("a dog left of a cat", "spatial", ("dog", "cat"), spatial_info=SpatialInfo("dog", "cat", "left of"))] * 3,
    *[Example("two cats", "numeracy", ("cat",), numeracy_info=(NumeracyInfo(2, "cat"),))] * 2,
    Example("it rains", "non"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("rewards")
    hps = make_hps(folder / "hps")
    return {
        "hps": {"path": str(hps), "tokenizer": str(hps.parent / "tokenizer")},
        "git": {"path": str(make_git(folder / "git"))},
        "grounding": {"path": str(make_grounding(folder / "grounding"))},
        "orm": {"path": str(make_orm(folder / "orm")), "dtype": "float32"},
    }


def pictures(count: int, size: int = 48) -> Tensor:
    generator = torch.manual_seed(3)
    tint, noise = (torch.rand(count, 3, *edges, generator=generator) for edges in ((1, 1), (size, size)))
    return tint * (0.5 + 0.5 * noise)


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_chunks_micro_batches_and_schedules_change_nothing(options: Options, schedule: Any) -> None:
    images = pictures(len(EXAMPLES))
    alone = RewardConfig(NAMES, options={name: {**options[name], "micro_batch": 1} for name in NAMES}).build()
    expected = alone.submit(images, EXAMPLES).result()
    applies = ~expected.isnan()
    assert applies.tolist() == [[True] * 4] * 3 + [[True, False, True, True]] * 5 + [[True, False, False, True]]
    for column in expected.unbind(1):
        assert column[~column.isnan()].std() > 1e-3

    config = RewardConfig(
        NAMES,
        options={name: {**options[name], "micro_batch": 4, "offload": name == "orm"} for name in NAMES},
        schedule=schedule,
    )
    ensemble = config.build()
    handles = [ensemble.submit(images[a:b], EXAMPLES[a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(RewardHandle.cat(handles).result(), expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_reward_whose_model_is_frozen(options: Options, name: str) -> None:
    reward: Any = load_reward(name, **options[name])
    assert isinstance(reward, Reward) and reward.name == name and isinstance(reward.model, torch.nn.Module)
    assert not reward.model.training and not any(p.requires_grad for p in reward.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_score_that_is_no_number_is_an_error(options: Options, name: str) -> None:
    """Not a reward that does not apply."""
    ensemble = RewardConfig([name], options=options).build()
    model: Any = ensemble.workers[0].reward.model  # type: ignore[attr-defined]
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    with pytest.raises(RewardError, match=f"reward {name!r} failed on 'a red cat and a dog': its score is nan"):
        ensemble.submit(pictures(1), EXAMPLES[:1]).result()


@pytest.mark.skipif(not PUBLISHED_PROMPTS.exists(), reason="the published prompts are not here")
def test_every_published_prompt_has_a_score_that_depends_on_the_picture(options: Options) -> None:
    """HPS and GIT on every row, the ORM, which sees every row alike, on one in 40; layouts are in test_layout.py."""
    examples = PromptFile(PUBLISHED_PROMPTS).examples
    ensemble = RewardConfig(["hps", "git"], options=options | {"hps": {**options["hps"], "micro_batch": 256}}).build()
    one, two = (image.expand(len(examples), -1, -1, -1) for image in pictures(2, 28))
    first, second = (ensemble.submit(images, examples).result() for images in (one, two))
    assert first.isfinite().any(1).all()
    assert (first[:, 1].isnan() == torch.tensor([e.task_type in ("spatial", "numeracy") for e in examples])).all()
    applies = first.isfinite()
    assert applies.equal(second.isfinite()) and ((first - second).abs()[applies] > 1e-6).all()

    orm = RewardConfig(["orm"], options=options).build()
    some = examples[::40]
    first, second = (orm.submit(images[: len(some)], some).result() for images in (one, two))
    assert ((first - second).abs() > 1e-6).all()


@pytest.mark.skipif(not PUBLISHED_PROMPTS.exists(), reason="the published prompts are not here")
def test_of_the_published_prompts_the_spoiled_ones_are_left_out(options: Options, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in PUBLISHED_PROMPTS.read_text(encoding="utf-8").splitlines()]
    relation = {"obj1": "cat", "obj2": "dog", "locality": "in front of"}
    spoiled = [{"spatial_info": relation}, {"nouns": [f"thing {i}" for i in range(60)]}, {"nouns": ["cat", "\u200b"]}]
    bad = [{"prompt": "p", "task_type": "object", **more} for more in spoiled]
    (tmp_path / "all.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, [*rows, *bad])), encoding="utf-8")
    ensemble = RewardConfig(NAMES, options=options).build()
    detector: Any = ensemble.workers[NAMES.index("grounding")].reward
    detector.model.config.max_text_len = 256  # as published; the tiny vocabulary reads letter by letter
    file = PromptFile(tmp_path / "all.jsonl", skip_bad=True)
    file.check(ensemble.check)
    assert file.examples == PromptFile(PUBLISHED_PROMPTS).examples
    first, *listed = file.said()
    assert first.endswith(": 3 of 7226 lines are left out:")
    for line, words in zip(
        listed,
        (
            "7224: reward 'grounding': 'p': unknown locality 'in front of'",
            "7225: reward 'grounding': the nouns make",
            "7226: reward 'git': the tokenizer has no token for the noun",
        ),
        strict=True,
    ):
        assert f"all.jsonl:{words}" in line


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_a_run_is_trained_by_them(options: Options, schedule: str, job: Path, tmp_path: Path) -> None:
    rows = [{"prompt": e.prompt, "task_type": e.task_type, "nouns": e.nouns} for e in EXAMPLES]
    rows[3] |= {"spatial_info": {"obj1": "dog", "obj2": "cat", "locality": "left of"}}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": {"options": options, "schedule": schedule}}))
    changes = dict(
        train_file=write_rows(tmp_path / "train.jsonl", (rows[0], rows[3])), per_device_train_batch_size=1,
        max_completion_length=6, rollout_max_rows=6, max_steps=2,
    )  # fmt: skip
    names = ("--rewards.names", ",".join(NAMES[:3]), "--rewards.monitor", NAMES[3])
    run(job, tmp_path / "out", *SMALL, "--config", str(tmp_path / "rewards.yaml"), *names, **changes)
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        for name, missing in zip(NAMES, (0, 0.5, 0, 0), strict=True):  # git is not asked about the spatial prompt
            assert step[f"rewards/{name}/missing"] == missing and step[f"rewards/{name}/skipped"] == 0
            assert 0 <= step[f"rewards/{name}/mean"] <= 1 or name == "hps"
            worked, hidden = (step[f"rewards/{name}/milliseconds{what}"] for what in ("", "_hidden"))
            assert 0 <= hidden <= worked and worked > 0 and (schedule == "threads" or hidden < 1e-3)
        assert step["rewards/hps/std"] > 0 and step["grad_norm"] > 0
    assert "hidden" in (tmp_path / "out" / "report.html").read_text()


def check(config: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bicot.rewards.check", str(config), "--device", "cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=config.parent)
    assert "requesting" not in done.stderr, "it downloads nothing"
    return done


def test_check_shows_what_works(options: Options, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"seed": 1, "rewards": {"names": NAMES, "options": options}}))
    done = check(tmp_path / "my.yaml", "--pictures", "6")
    assert done.returncode == 0, done.stderr
    header, *rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    assert header == ["reward", "weights", "dtype", "device", "load s", "ms/picture", *(e.task_type for e in CHECKED)]
    assert [row[0] for row in rows] == NAMES
    for name, _, dtype, device, load, ms, *scores in rows:
        assert (dtype, device) == ("float32", "cpu") and float(load) > 0 and float(ms) > 0
        missing = [score == "–" for score in scores]
        assert missing == ([False, True, True, False] if name == "git" else [False] * 4)


def test_check_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(images, examples):\n    raise KeyError('no such noun')\n")
    names = [*NAMES, "scene", "mine:broken"]
    rewards = {"names": names, "options": {name: {"path": "/nowhere"} for name in NAMES}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"rewards": rewards}))
    done = check(tmp_path / "my.yaml")
    assert done.returncode == 1 and [line.split()[0] for line in done.stdout.splitlines()] == ["reward", "scene"]
    for name in NAMES:
        assert f"{name} does not work: MissingCheckpoint: reward {name!r} cannot load '/nowhere'" in done.stderr
        assert f"    {DOWNLOADS[name]}\n" in done.stderr
    assert "mine:broken does not work: RewardError: reward 'broken' failed on 'a red apple" in done.stderr
    assert "no such noun" in done.stderr and not list(tmp_path.glob("*.png")), "it leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n", "my.yaml names no rewards"),
        ("[scene]\n", "my.yaml names no rewards"),
        ("rewards: [scene]\n", "my.yaml names no rewards"),
        ("rewards: {names: scene\n", "my.yaml is not YAML: "),
        ("rewards: {names: [scene], optoins: {}}\n", "rewards has no setting 'optoins'"),
        ("rewards: {names: [scene], options: {hsp: {}}}\n", "did you mean 'hps'?"),
        (None, "No such file"),
    ],
)
def test_check_of_a_bad_file(
    tmp_path: Path, text: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the check does, and for the time of this test
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / "my.yaml"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="^2$"):
        check_main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_rewards_of_the_published_configurations(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without their weights, the check of a shipped file gives the commands that bring them."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["check", str(ROOT / "configs" / f"janus-pro-{size}.yaml"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="^True$"):
        check_main()
    said = capsys.readouterr().err
    for name in ("hps", "git", "grounding"):
        assert f"    {DOWNLOADS[name]}\n" in said
