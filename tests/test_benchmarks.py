"""Folders of pictures, read back as each benchmark's scorer reads them, and the intervals of our own scores."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, TORCHRUN, tiny_policy
from training import environment

from bicot import evaluate
from bicot.grpo.benchmarks import BENCHMARKS, fingerprint, load_picture, tile
from bicot.grpo.scores import Evaluation, bootstrap, plan_agreement
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling
from bicot.rewards.base import Example, NumeracyInfo

PROMPTS = ["a red circle", "two blue square"]
REWARD = '''
def blueness(images, examples):
    """Of circles alone."""
    import torch

    scores = images[:, 2].mean((1, 2))
    return torch.stack([x if "circle" in e.prompt else x * torch.nan for x, e in zip(scores, examples)])
'''
ROWS = [
    {"prompt": "a red circle", "task_type": "color", "nouns": ["circle"], "attr_nouns": ["red circle"]},
    {"prompt": "two blue square", "task_type": "color", "nouns": ["square"]},
    {"prompt": "a blue circle", "task_type": "color"},
    {"prompt": "two red circle", "task_type": "numeracy", "numeracy_info": [{"num": 2, "obj_name": "circle"}]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny_policy(seed=seed).save_pretrained(folder / str(seed))
        settings = RolloutSettings(PromptFormat("janus", "", "plan {}"), Sampling(6, cfg_weight=2.0))
        settings.save(folder / str(seed))
    return folder


@pytest.fixture(autouse=True)
def _bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)


def words(models: Path, prompts: Path, form: str, output: Path, *more: str) -> list[str]:
    where = ["--prompts", str(prompts), "--format", form, "--output", str(output)]
    return ["--model", str(models / "0"), *where, "--device", "cpu", *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_geneval(folder: Path) -> dict[str, list[np.ndarray]]:
    """As evaluate_images.py does: numbered folders, one JSON document, pictures with numbers for names."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.isdigit() and (folder / name).is_dir():
            with open(folder / name / "metadata.jsonl") as file:
                metadata = json.load(file)
            assert metadata["tag"] == "colors" and metadata["include"][0]["count"] == 1
            pictures = [n for n in os.listdir(folder / name / "samples") if re.match(r"\d+\.png", n)]
            found[metadata["prompt"]] = [pixels(folder / name / "samples" / n) for n in sorted(pictures)]
    return found


def test_geneval_and_dpg_show_the_same_samples(models: Path, tmp_path: Path) -> None:
    rows = [{"tag": "colors", "include": [{"class": "a", "count": 1}], "prompt": prompt} for prompt in PROMPTS]
    evaluate.main(words(models, lines(tmp_path / "g.jsonl", rows), "geneval", tmp_path / "geneval"))
    found = read_geneval(tmp_path / "geneval")
    assert list(found) == PROMPTS and [len(pictures) for pictures in found.values()] == [4, 4]
    assert sorted(os.listdir(tmp_path / "geneval")) == [".lock", "00000", "00001", "settings.json"]
    assert sorted(os.listdir(tmp_path / "geneval" / "00001" / "samples")) == [f"000{i}.png" for i in range(4)]
    assert len({picture.tobytes() for pictures in found.values() for picture in pictures}) == 8

    rows[0]["tag"] = "counting"
    with pytest.raises(ValueError, match="another evaluation .prompts: "):  # its folder would hold the old line
        evaluate.main(words(models, lines(tmp_path / "g.jsonl", rows), "geneval", tmp_path / "geneval"))

    (tmp_path / "prompts").mkdir()
    for name, prompt in zip(("coco12", "diff3"), PROMPTS, strict=True):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"{prompt}\n")
    evaluate.main(words(models, tmp_path / "prompts", "dpg", tmp_path / "dpg"))
    resolution = next(iter(found.values()))[0].shape[0]
    questions = dict(zip(("coco12", "diff3"), PROMPTS, strict=True))  # of dpg_bench.csv, by item_id
    for name in os.listdir(tmp_path / "dpg" / "images"):  # compute_dpg_bench.py takes every file there
        image = Image.open(tmp_path / "dpg" / "images" / name)
        assert image.size == (2 * resolution, 2 * resolution) and image.mode == "RGB"
        corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
        crops = [np.asarray(image.crop((x, y, x + resolution, y + resolution))) for x, y in corners]
        np.testing.assert_array_equal(crops, found[questions.pop(name.split(".")[0])])
    assert not questions


def test_t2i_compbench(models: Path, tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_bytes(b"a red circle\r\na blue square and a red circle.\r\n")  # as published
    evaluate.main(words(models, tmp_path / "color_val.txt", "t2i_compbench", tmp_path / "out"))
    names = os.listdir(tmp_path / "out" / "samples")
    by_last = sorted(names, key=lambda name: int(name.split("_")[-1].split(".")[0]))  # BLIP_vqa.py
    assert by_last == sorted(names, key=lambda name: int(name.split("_")[1].split(".")[0]))  # generate_dataset.py
    prompts = [name.split("_")[0] for name in by_last]
    assert prompts == ["a red circle"] * 10 + ["a blue square and a red circle."] * 10  # 3_in_1.py: ten of each
    assert [int(name.split(".png")[0].split("_")[1]) for name in by_last] == list(range(20))  # numeracy_eval.py
    assert by_last[3] == "a red circle_000003.png"


def test_wise(models: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for file, ids in (("culture", (1, 2)), ("science", (701,))):
        entries = [
            {"Prompt": f"a red circle w{i}", "Explanation": "w", "Category": "w", "Subcategory": "w", "prompt_id": i}
            for i in ids
        ]
        (tmp_path / "data" / f"{file}.json").write_text(json.dumps(entries))
    evaluate.main(words(models, tmp_path / "data", "wise", tmp_path / "out", "--plan", "off"))
    for file in ("culture", "science"):  # gpt_eval.py: a JSON file at a time, one folder of pictures
        entries = {entry["prompt_id"]: entry for entry in json.loads((tmp_path / "data" / f"{file}.json").read_text())}
        assert all((tmp_path / "out" / f"{number}.png").exists() for number in entries)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"1.png", "2.png", "701.png"}
    assert load_picture(tmp_path / "out" / "1.png")[1] == [""], "no plan"


def test_an_evaluation_resumes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red circle\ntwo blue square\na blue circle\n")
    command = words(models, tmp_path / "p.txt", "t2i_compbench", tmp_path / "out", "--num_generations", "2")
    evaluate.main(command)
    files = sorted((tmp_path / "out" / "samples").iterdir())
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    gone = [file for file in files if file.name.endswith(("0.png", "1.png", "5.png"))]  # all of a prompt, half of one
    for file in gone:
        file.unlink()
    (tmp_path / "out" / "samples" / ".a red circle_000000.part.png").write_bytes(b"torn")  # of a killed process
    capsys.readouterr()
    evaluate.main(command)
    assert "6 pictures of 3 prompts, 3 of them drawn now" in capsys.readouterr().out
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out/samples").iterdir()}
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert {name for name in after if after[name] != before[name]} == {file.name for file in gone}

    for more, what in (
        (("--seed", "3"), "seed: 0 in settings.json, 3 now"),
        (("--top_k", "2"), "top_k: 50 in settings.json"),
    ):
        with pytest.raises(ValueError, match=f"has pictures of another evaluation .{what}.*; choose another --output"):
            evaluate.main([*command, *more])
    with pytest.raises(ValueError, match="another evaluation .weights: "):
        evaluate.main([*command, "--model", str(models / "1")])
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json is missing"):
        evaluate.main(command)
    assert {file.name for file in (tmp_path / "out" / "samples").iterdir()} == before.keys()


def test_prompts_that_do_not_fit_or_have_no_reward(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(tmp_path / "p.jsonl", [{"prompt": "a", "task_type": "b"}, {"prompt": "a " * 120, "task_type": "b"}])
    command = words(models, tmp_path / "p.jsonl", "bicot", tmp_path / "out")
    for more in ((), ("--max_completion_length", "30"), ("--plan", "off")):
        with pytest.raises(ValueError, match="p.jsonl:2: prompt too long"):
            evaluate.main([*command, *more])
    assert not (tmp_path / "out").exists()
    lines(tmp_path / "p.jsonl", [{"prompt": "a", "task_type": "b"}])
    evaluate.main(command)
    assert "no reward applies to any prompt" in capsys.readouterr().out


LONG = "w" * 239


@pytest.mark.parametrize(
    ("form", "name", "text", "what"),
    [
        ("geneval", "p.jsonl", '{"prompt": "a", "tag": "b"}\n{"prompt": "a"}\n', "p.jsonl:2: the key 'tag' is missing"),
        ("geneval", "p.jsonl", "[1]\n", "p.jsonl:1: expected a JSON object, got list"),
        ("geneval", "p.jsonl", "a red circle\n", "p.jsonl:1: not JSON: Expecting value"),
        ("geneval", "p.jsonl", '{"prompt": " ", "tag": "b"}', "p.jsonl:1: 'prompt' must be text, got ' '"),
        ("geneval", "p.jsonl", "\n", "no prompts in .*p.jsonl"),
        ("t2i_compbench", "p.txt", "a\na/b\n", "p.txt:2: '/' cannot be in a prompt that is read from a file name"),
        ("t2i_compbench", "p.txt", "a_b\n", "p.txt:1: '_' cannot be in a prompt"),
        ("t2i_compbench", "p.txt", f"a\n{LONG}\n", "p.txt:2: the name of its picture would be 1 bytes too"),
        ("wise", "p.json", '[{"Prompt": "a"}]', "p.json, entry 1: the key 'Explanation' is missing"),
        ("wise", "p.json", "{}", "p.json: expected a JSON list, got dict"),
        ("dpg", "a.b.txt", "a", "a.b.txt: the scorer reads the name up to the first dot"),
        ("dpg", "p.txt", " ", "p.txt: the file is empty"),
        ("bicot", "p.jsonl", '{"prompt": "a", "task_type": "b"}\n{"prompt": "a"}', "p.jsonl:2: task_type must be"),
    ],
)
def test_refuses_prompts(form: str, name: str, text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=what):
        BENCHMARKS[form].pictures(BENCHMARKS[form].load([tmp_path / name]), BENCHMARKS[form].num_generations)


def test_refuses_files_and_numbers(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"Prompt": "a", "Explanation": "w", "Subcategory": "w", "prompt_id": 7}
    for name in ("data", "rewrite"):
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
    wise, both = BENCHMARKS["wise"], [tmp_path / "data.json", tmp_path / "rewrite.json"]
    with pytest.raises(ValueError, match="rewrite.json, entry 1: 7.png is the picture of .*data.json, entry 1 too"):
        wise.pictures(wise.load(both), 1)
    with pytest.raises(ValueError, match="--num_generations 2: the scorer reads 1 of a prompt at most"):
        wise.pictures(wise.load(both[:1]), 2)
    with pytest.raises(FileNotFoundError, match="no prompts at .*none.json: give a file or a folder"):
        wise.load([tmp_path / "none.json"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.txt: byte 4 is not UTF-8; save it as UTF-8"):
        BENCHMARKS["dpg"].load([tmp_path / "latin.txt"])
    for more in (("--rewards.names", "scene"), ("--num_generations", "0")):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(words(models, both[0], "wise", tmp_path / "out", *more))
    said = capsys.readouterr().err
    assert "rewards and --compare are for --format bicot" in said and "--num_generations 0 must be at least 1" in said
    assert not (tmp_path / "out").exists()


def test_three_pictures_are_two_columns() -> None:
    images = [np.full((2, 3, 3), i + 1, np.uint8) for i in range(3)]
    assert tile(images)[:, :, 0].tolist() == [[1] * 3 + [2] * 3] * 2 + [[3] * 3 + [0] * 3] * 2
    np.testing.assert_array_equal(tile(images[:1]), images[0])


def test_own_scores_and_the_difference_of_two_checkpoints(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_blueness.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    prompts = lines(tmp_path / "p.jsonl", ROWS)
    more = ("--num_generations", "3", "--rewards.names", "my_blueness:blueness")
    first = words(models, prompts, "bicot", tmp_path / "a", *more)
    evaluate.main(first)
    values = {
        i: [pixels(tmp_path / f"a/images/{i:05}_{g:02}.png")[..., 2].mean() / 255 for g in range(3)] for i in (0, 2, 3)
    }
    results = json.loads((tmp_path / "a" / "scores.json").read_text())
    rows = {(row["reward"], row["task_type"]): row for row in results["rows"]}
    assert rows["blueness", "color"]["prompts"] == 2 and rows["blueness", "all"]["prompts"] == 3
    assert rows["blueness", "color"]["mean"] == pytest.approx(np.mean([values[0], values[2]]), abs=1e-6)
    assert rows["blueness", "all"]["mean"] == pytest.approx(np.mean(list(values.values())), abs=1e-6)
    assert rows["blueness", "numeracy"]["low"] is None, "one prompt has no interval"
    recall = rows["plan_recall", "all"]
    assert recall["prompts"] == 3 and 0 <= recall["low"] <= recall["mean"] <= recall["high"] <= 1
    assert (tmp_path / "a" / "scores.png").stat().st_size > 5000
    assert re.search(r"blueness +color +2 +0\.\d+ +0\.\d+ to 0\.\d+", capsys.readouterr().out)

    second = words(models, prompts, "bicot", tmp_path / "b", *more, "--compare", str(tmp_path / "a"))
    evaluate.main([*second, "--model", str(models / "1")])
    said = capsys.readouterr().out
    differences = json.loads((tmp_path / "b" / "scores.json").read_text())["differences"]
    theirs, ours = Evaluation.load(tmp_path / "a"), Evaluation.load(tmp_path / "b")
    change = ours.means["blueness"] - theirs.means["blueness"]
    found = next(row for row in differences if (row["reward"], row["task_type"]) == ("blueness", "all"))
    assert found["mean"] == pytest.approx(np.nanmean(change)) and found["prompts"] == 3 and found["mean"] != 0
    assert (found["low"], found["high"]) == bootstrap(change[~np.isnan(change)])
    assert found["excludes_zero"] == (found["low"] > 0 or found["high"] < 0)
    assert "/b minus " in said and ("excludes 0" in said or "includes 0" in said)
    assert all(row.mean == row.low == row.high == 0 for row in ours.minus(ours) if row.prompts > 1)

    lines(prompts, ROWS[::-1])
    with pytest.raises(ValueError, match="--compare .*/a: it has other prompts, from prompt 1 on"):
        evaluate.main(words(models, prompts, "bicot", tmp_path / "c", *more, "--compare", str(tmp_path / "a")))
    with pytest.raises(ValueError, match=r"/none has no scores.json: evaluate it with --format bicot first"):
        evaluate.main(words(models, prompts, "bicot", tmp_path / "c", "--compare", str(tmp_path / "none")))
    assert not (tmp_path / "c").exists()

    lines(prompts, ROWS)
    two = words(models, prompts, "bicot", tmp_path / "two", *more)
    command = [*TORCHRUN, str(ROOT / "evaluate.py"), *two]
    subprocess.run(command, check=True, env=environment(tmp_path), timeout=300)
    for name in ("samples.jsonl", "scores.json", *(f"images/{i:05}_{g:02}.png" for i in range(4) for g in range(3))):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_the_fingerprint_of_adapters_is_also_that_of_their_base(tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    before = fingerprint(str(tmp_path / "adapter"))
    assert fingerprint(str(tmp_path / "adapter")) == before
    (tmp_path / "base" / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(str(tmp_path / "adapter")) != before


def test_plan_precision_and_recall() -> None:
    example = Example("three red bottles", "numeracy", nouns=("bottle",), numeracy_info=(NumeracyInfo(3, "bottle"),))
    for plan, precision, recall in (
        ("three bottles", 1.0, 1.0),
        ("two bottles", 0.5, 0.5),
        ("a bottle", 1.0, 0.5),
        ("nothing", math.nan, 0.0),
    ):
        found = plan_agreement(Example(**{**vars(example), "plan": plan}))
        assert list(found.values()) == pytest.approx([precision, recall], nan_ok=True), plan
    assert all(math.isnan(x) for x in plan_agreement(Example("a", "b", plan="a bottle")).values())


def test_the_bootstrap_interval() -> None:
    """Of few values, all resamples there are; of many, the normal approximation; of pairs, the noise of their sum."""
    few = np.array([0.0, 0.21, 0.48, 0.77, 1.0])
    every = np.mean(list(itertools.product(few, repeat=5)), 1)
    for level in (0.5, 0.8):
        ends = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
        assert bootstrap(few, level, 40_000) == pytest.approx(tuple(ends), abs=0.015)
    generator = np.random.default_rng(7)
    prompts, first, second = (generator.normal(*law, 800) for law in ((0, 5), (0, 1), (0.15, 1)))
    change = (prompts + second) - (prompts + first)
    half = 1.959964 * change.std() / math.sqrt(800)
    expected = (change.mean() - half, change.mean() + half)
    assert bootstrap(change) == pytest.approx(expected, abs=0.05 * half) and expected[0] > 0
    assert bootstrap(change) == bootstrap(change)
    assert bootstrap(prompts + second)[0] < 0, "prompts differ more than checkpoints: unpaired, it would include 0"
    assert all(math.isnan(end) for end in bootstrap(few[:1]))
