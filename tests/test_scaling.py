"""The scaling bench: a resized step is the step of that size, points take turns, exponents are fitted, ranks meet."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from bicot.bench import scaling, step_model
from bicot.bench.models import SHAPES
from bicot.bench.scaling import Size, SizedTrainer, fit, fitted
from bicot.grpo.cli import parse_config
from bicot.grpo.distributed import Ranks
from bicot.grpo.trainer import Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))
PHASES = {"plan", "draw", "decode", "reference", "reward", "train"}


def test_fit() -> None:
    xs = [1, 2, 4, 8]
    assert fit(xs, [3 * x**1.5 for x in xs]) == (1.5, 0)
    assert fit(xs, [1.0] * 4) == (0, 0)
    # ±a on a line changes no exponent if it is orthogonal to the line, and is the residual
    off = [1, -1, -1, 1]
    assert fit(xs, [x**-0.5 * math.exp(0.1 * o) for x, o in zip(xs, off, strict=True)]) == (-0.5, 0.1)
    assert fit([2, 8], [1, 16]) == (2, None), "two points lie on a line"
    assert fit([2], [1]) == (None, None) and fit([1, 2], [0.0, 1.0]) == (None, None)


class Clock:
    """A trainer whose n-th step takes n seconds."""

    def __init__(self, graphs: bool) -> None:
        self.engine = self
        self.graphs, self.enabled, self.log, self.size = self, graphs, [], 0  # type: ignore[var-annotated]

    def resize(self, size: Any) -> None:
        self.size = size

    def take(self) -> dict[str, float]:
        self.log.append(self.size)
        return {"train": 10.0 * len(self.log), "step": float(len(self.log))}

    def described(self, size: Any) -> dict[str, Any]:
        return {"step": size}


def test_points_take_turns_and_the_first_turn_warms_up() -> None:
    clock: Any = Clock(graphs=False)
    points = scaling.measure(clock, {1: "a", 2: "b"}, 3)  # type: ignore[dict-item]
    assert clock.log == ["a", "b"] * 4
    assert points == [
        {"x": 1, "seconds": 5, "phases": {"train": 50}, "step": "a"},
        {"x": 2, "seconds": 6, "phases": {"train": 60}, "step": "b"},
    ]
    clock = Clock(graphs=True)
    points = scaling.measure(clock, {1: "a", 2: "b"}, 1)  # type: ignore[dict-item]
    assert clock.log == ["a", "b", "a", "a", "b", "b"], "a step that captures graphs is not timed"
    assert [point["seconds"] for point in points] == [4, 6]


@pytest.mark.parametrize("rows", [64, 3])
def test_a_resized_step_is_the_step_of_that_size(rows: int, tmp_path: Path) -> None:
    sized = SizedTrainer("toy", 64, scaling.config_of("cpu", str(tmp_path / "sized")), ALONE)
    sized.resize(Size(2, 1, 64, 64))
    sized.take()
    size = Size(4, 2, 64, rows)
    sized.resize(size)
    sized.take()
    chunks = sum(span.name == "draw" for span in sized.rollout.spans)
    words = ["--output_dir", str(tmp_path / "plain"), "--per_device_train_batch_size", "1", "--learning_rate", "1e-6"]
    words += ["--num_generations", "4", "--gradient_accumulation_steps", "2", "--rollout_max_rows", str(rows)]
    plain = Trainer(parse_config([*words, "--sample_steps", "0"]), ALONE)
    rollout, *_ = plain._roll_out(plain._step_examples())
    assert len(sized.rollout) == 8 and chunks == math.ceil(8 / rows) == sum(s.name == "draw" for s in rollout.spans)
    assert sized.rollout.prompts.tolist() == rollout.prompts.tolist()
    assert torch.equal(sized.rollout.image_tokens, rollout.image_tokens), "a warm-up's first update changes no weight"
    described = sized.described(size)
    assert described["plans"][2] == max(map(len, sized.rollout.plans.tolist())) and described["model"] == "toy"
    step = described["step"]
    assert step["max_rows"] == rows and step["accumulation"] == 2 and step["rows_per_image"] == 1
    assert step["itemsize"] == 4 and step["reference"] and not step["recompute"]
    assert step["prompt_tokens"] == len(rollout.prompts.values) / 8
    assert step["image_prompt_tokens"] == len(sized.rollout.image_prompts.values) / 8 - 1


def test_random_weights_draw_pictures_of_any_size(tmp_path: Path) -> None:
    trainer = SizedTrainer("tiny", 36, scaling.config_of("cpu", str(tmp_path)), ALONE)
    assert trainer.reference is not None and trainer.reference.model is not trainer.policy.model
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())
    names = [name for name, p in trainer.policy.model.named_parameters() if p.requires_grad]
    assert names and all(name.startswith(("model.language_model", "lm_head")) for name in names)
    flops = {}
    for tokens in (36, 4, 16):
        size = Size(3, 1, tokens, 8)
        trainer.resize(size)
        seconds = trainer.take()
        assert seconds.keys() == PHASES | {"step"} and sum(seconds.values()) <= 2 * seconds["step"]
        assert trainer.rollout.image_tokens.shape == (3, tokens)
        assert trainer.rollout.images.shape[2:] == (2 * math.isqrt(tokens),) * 2
        step = trainer.described(size)["step"]
        assert step["image_tokens"] == tokens
        flops[tokens] = step["vq_flops"]
    assert flops[4] < flops[16] < flops[36]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tiny", [False, True])
def test_along_a_series_only_its_axis_varies(device: str, tiny: bool) -> None:
    model, base = scaling.base_size(device, tiny)
    assert model in SHAPES
    for axis, of, sizes in scaling.all_series(device, tiny):
        around = replace(base, prompts=4) if axis == "rows" else base
        assert sizes == {x: replace(around, **{axis.replace(" ", "_"): x}) for x in sizes} and of in SHAPES
        assert list(sizes) == sorted(sizes) and len(sizes) >= (2 if tiny else 4)
        rows = around.prompts * around.generations * (2 if device == "cuda" and not tiny else 1)
        assert axis != "rows" or max(sizes) <= rows, "more rows than a step has would change nothing"


def points(*seconds: float) -> list[dict[str, Any]]:
    step = {"prompts": 2, "generations": 5}
    return [
        {"x": 2**i, "seconds": s, "phases": {"draw": s / 2, "reward": 0.0}, "step": step, "plans": [8.0, 1.0, 9]}
        for i, s in enumerate(seconds)
    ]


def test_section_and_picture(tmp_path: Path) -> None:
    ranks = [point | {"ranks": point["x"], "link_gbps": 1.5 if point["x"] > 1 else None} for point in points(1, 1.25)]
    series = [
        fitted("prompts", "toy", points(1, 2, 4)),
        fitted("ranks", "toy", ranks),
        fitted("rows", "toy", points(1)),
    ]
    assert series[0]["exponent"] == 1 and series[0]["phase_exponents"] == {"draw": 1, "reward": None}
    machine = {"cpu": "A", "isa": "B", "threads": 2, "torch": "2", "commit": "abc"}
    result = {
        "bench": "scaling",
        "about": "About.",
        "command": "run it",
        **machine,
        "series": series,
        "skipped": ["x: y"],
    }
    result |= {"ceilings": {"copy_gbps": 40.0, "gemm_tflops": {"float32": 0.2}, "launch_us": 4.0}}
    page = scaling.section(result)
    assert "## scaling on the CPU\n\n`run it` on A (B), 2 threads" in page and "Not run: x: y." in page
    assert "| prompts, toy | 1 | 1000 | 500 | 0.00 | 10.0 |\n|  | 2 | 2000 | 1000 | 0.00 | 5.00 |" in page
    assert "|  | fit | x^1.00 | x^1.00 |  | residual 0.000 |" in page
    assert "|  | 2 | 1250 | 625 | 0.00 | 16.0 |\n|  | fit | x^0.32 | x^0.32 |  |  |" in page, (
        "two ranks make twice as many"
    )
    assert "1.50 GB/s" in page
    pytest.importorskip("matplotlib")
    scaling.draw(result, tmp_path / "s.svg")
    assert (tmp_path / "s.svg").read_text().count("<path") > 20


def test_the_command_walks_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks included; what it writes is what the step model reads."""
    file = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["scaling", "--device", "cpu", "--tiny", "--threads", "1", "--output", str(file)])
    monkeypatch.setattr(scaling, "logging", MagicMock())  # other tests may look at what it would turn off
    monkeypatch.setenv("BICOT_COMMIT", "abc")
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    try:
        scaling.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["commit"] == "abc" and not result["skipped"]
    axes = {series["axis"]: series for series in result["series"]}
    assert list(axes) == ["generations", "image tokens", "rows", "ranks"]
    more = {"ranks": {"wait"}}
    assert all(p["phases"].keys() == PHASES | more.get(axis, set()) for axis in axes for p in axes[axis]["points"])
    (ranks,) = axes["ranks"]["points"]
    assert ranks["x"] == ranks["ranks"] == 2 and ranks["link_gbps"] > 0 and axes["ranks"]["exponent"] is None
    rows = step_model.validate(tmp_path)
    whole = [row for row in rows if row["what"] == "step"]
    assert len(whole) == sum(len(series["points"]) for series in axes.values()) and not any(r["missing"] for r in rows)
    assert all(row["ratio"] > 0 for row in rows)
