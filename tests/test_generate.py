"""`generate.py`: what it draws, writes, prints and refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import TOY, tiny_policy

import bicot
import bicot.generate as program
from bicot import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling

SPATIAL = {
    "prompt": "a red circle left of a blue square",
    "spatial_info": {"obj1": "red circle", "obj2": "blue square", "locality": "left of"},
}


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the program in this process -> stdout and stderr."""
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[str, str]:
        program.main(list(words))
        return capsys.readouterr()

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_generate_from_any_checkpoint(generate: Any, tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path / "model")
    RolloutSettings(PromptFormat("janus", "", "plan {}"), Sampling(6, cfg_weight=2.0)).save(tmp_path / "model")
    where = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out" / "grid.png")]
    said, _ = generate("a red circle", "two blue square", "--num_generations", "2", *where)
    assert said.count("a red circle -> ") == 2 and said.count("two blue square -> ") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"grid-{i:03d}.png" for i in range(4)),
        "grid.png",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--num_generations", "0"), "--num_generations 0 must be at least 1"),
        (
            ("--num_gen", "2"),
            "unrecognized arguments: --num_gen 2; unknown setting 'num_gen'; did you mean 'num_generations'?",
        ),
        (("--temperature", "nan"), "--temperature nan must be a number that is at least 0"),
        (("--max_completion_length", "0"), "--max_completion_length 0 must be a number that is at least 1"),
        (("--cfg_weight", "inf"), "--cfg_weight inf must be finite"),
        (("--output", "here"), "--output here must end in .png"),
        (("--best_of", "2"), "--best_of needs rewards: give --rewards.names, or the --config of a run"),
        (("--rewards.names", "scene"), "--rewards.names needs --best_of N"),
        (("--best_of", "2", "--num_generations", "3"), "--best_of 2 must be at least the number of pictures to keep"),
    ],
)
def test_generate_refuses(
    words: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py"])  # the program's name
    with pytest.raises(SystemExit, match="2"):
        program.main(["a", *words])
    assert capsys.readouterr().err.splitlines()[-1] == f"generate.py: error: {line}"


def test_a_picture_says_how_to_draw_it_again(generate: Any) -> None:
    said, _ = generate("a red circle", "🎨 $x$ <b>", "--num_generations", "3", "--seed", "4", "--cfg_weight", "1.5")
    assert said.endswith("wrote 6 pictures, and outputs/generate/grid.png beside them\n")
    path = Path("outputs/generate/grid-004.png")
    texts = Image.open(path).text  # type: ignore[attr-defined]
    assert (texts["prompt"], texts["seed"], texts["cfg_weight"]) == ("🎨 $x$ <b>", "5", "1.5")
    assert texts["plan"] in said and texts["checkpoint"] == str(TOY) and texts["bicot"] == bicot.__version__
    settings = RolloutSettings.load(TOY)
    assert json.loads(texts["settings"])["sampling"]["top_k"] == settings.sampling.top_k == 0
    again = ["--num_generations", "1", "--seed", texts["seed"], "--cfg_weight", texts["cfg_weight"]]
    generate(texts["prompt"], *again, "--output", "a/one.png")
    generate(texts["prompt"], *again, "--plan", texts["plan"], "--output", "b/one.png")
    assert (pixels(path) == pixels("a/one-000.png")).all() and (pixels(path) == pixels("b/one-000.png")).all()


def test_json_is_alone_on_stdout(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as lines of standard input; a character that no font has is said on stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a red circle\n\n  two \u0378 circles\r\n".encode())))
    said, aside = generate("-", "--num_generations", "1", "--plan", "off", "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    files = [f"outputs/generate/grid-00{i}.png" for i in range(2)]
    assert rows == [
        {"prompt": prompt, "plan": "", "seed": 0, "file": file}
        for prompt, file in zip(["a red circle", "two \u0378 circles"], files, strict=True)
    ]
    assert all(Path(file).is_file() for file in files) and "and outputs/generate/grid.png beside them" in aside


HALF = """
import torch
class Half:
    name = "half"
    def score(self, images, examples):
        return torch.tensor([0.0, float("nan")] * len(examples))[: len(examples)]
"""


def test_best_of_keeps_the_best_of_what_is_drawn_anyway(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SPATIAL, {"prompt": "two circles", "numeracy_info": [{"num": 2, "obj_name": "circle"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--prompt_file", "rows.jsonl", "--best_of", "6", "--rewards.names", "scene,plan"]
    said, _ = generate(*words, "--reward_weights", "2,0.5", "--num_generations", "2", "--json")
    kept = [json.loads(line) for line in said.splitlines()]
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in rows for _ in range(2)]
    for best, second in (kept[:2], kept[2:]):
        assert best["scores_of_all"][best["seed"]] == best["score"] == max(best["scores_of_all"])
        assert second["score"] == sorted(best["scores_of_all"])[-2]
        assert best["score"] == pytest.approx(2 * best["scores"]["scene"] + 0.5 * best["scores"]["plan"])
    drawn = Policy.from_pretrained(TOY, device="cpu").generate(rows[1]["prompt"], n=6)[kept[2]["seed"]]
    assert (np.asarray(drawn.image) == pixels(kept[2]["file"])).all() and drawn.plan == kept[2]["plan"]

    (tmp_path / "half.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path)
    said, _ = generate("a circle", "--best_of", "2", "--rewards.names", "half:Half", "--num_generations", "2", "--json")
    assert [row["score"] for row in map(json.loads, said.splitlines())] == [0.0, None] and "NaN" not in said

    said, _ = generate(*words)
    head, *lines, last = said.splitlines()
    assert head.split() == ["seed", "score", "mean", "scene", "plan"] and len(lines) == 2
    assert lines[0].split()[5] == "grid-000.png"
    assert last == "wrote 2 pictures, and outputs/generate/grid.png beside them"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("a circle", "--rewards.names", "scene"),
            "reward 'scene' cannot score the prompt 'a circle': .* --prompt_file",
        ),
        (("--prompt_file", "rows.jsonl", "--rewards.names", "scene"), "'scene' cannot score the prompt 'a dog'"),
        (("--prompt_file", "bad.txt", "--rewards.names", "scene"), "bad.txt:2: byte 0xff at character 1 is not UTF-8"),
    ],
)
def test_prompts_that_cannot_be_scored_are_named(
    words: tuple[str, ...], error: str, generate: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(SPATIAL) + '\n{"prompt": "a dog", "nouns": ["dog"]}\n')
    (tmp_path / "bad.txt").write_bytes(b"a circle\n\xff\n")
    with pytest.raises(ValueError, match=error):
        generate(*words, "--best_of", "2")
    assert not (tmp_path / "outputs").exists()
