"""The adaptive entropy bonus follows its formula, in a run and after a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from stepping import config
from training import SMALL, assert_resumes, metrics, run

from bicot.grpo.entropy import EntropyTarget

ADAPTIVE = (*SMALL, "--entropy_coef", "0.02", "--entropy_coef_delta", "0.01", "--entropy_coef_max", "0.045")


def test_coefficients_follow_the_formula() -> None:
    cfg = config(
        entropy_coef={"text": 0.1, "image": 0.0}, entropy_target={"text": 2.0, "image": 1.0},
        entropy_coef_delta=0.25, entropy_coef_min=0.05, entropy_coef_max=0.5,
    )  # fmt: skip
    controller = EntropyTarget(cfg)
    assert controller.applied(controller.config).entropy_coef == {"text": 0.0, "image": 0.0}
    had = []
    for text, image in ((1.9, 1.1), (2.0, 0.9), (2.1, 0.9), (1.0, 0.9), (3.0, 3.0)):
        had.append(tuple(controller.look({"text/entropy": text, "image/entropy": image}).values()))
        coefs = controller.applied(controller.config).entropy_coef
        assert isinstance(coefs, dict) and all(0 <= coef <= 0.5 for coef in coefs.values())
    # 0.1 +0.25 +0.25→0.5 -0.25 (not applied) +0.25;  0 -0.25→0.05 (not applied) +0.25 +0.25→0.5 …
    assert had == [(0.0, 0.0), (0.35, 0.0), (0.5, 0.3), (0.0, 0.5), (0.5, 0.5)]
    before = dict(controller.state)
    assert controller.look({}) == {"text/entropy_coef": 0.0, "image/entropy_coef": 0.0} and controller.state == before
    off = EntropyTarget(config(entropy_coef=0.1))
    assert off.applied(off.config) is off.config and off.look({"text/entropy": 0.0}) == {} and off.state == {}


def test_a_run_adapts_and_resumes(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path / "off", *SMALL)
    levels = {name: metrics(tmp_path / "off")[0][f"{name}/entropy"] for name in ("text", "image")}
    targets = {"text": levels["text"] + 1, "image": levels["image"] * 0.5}  # one above, one below
    given = "{" + ", ".join(f"{name}: {level}" for name, level in targets.items()) + "}"
    rows = metrics(assert_resumes(job, tmp_path, *ADAPTIVE, "--entropy_target", given, stop=3))
    for name, level in targets.items():
        coef, last = 0.02, math.inf
        for row in rows:
            assert row[f"{name}/entropy_coef"] == pytest.approx(coef if last <= level else 0.0)
            last = row[f"{name}/entropy"]
            coef = min(coef + 0.01, 0.045) if last <= level else max(coef - 0.01, 0.0)
    assert [row["text/entropy_coef"] for row in rows] == pytest.approx([0, 0.03, 0.04, 0.045, 0.045, 0.045])
    assert not any(row["image/entropy_coef"] for row in rows)


def test_the_bonus_raises_the_entropy(job: Path, tmp_path: Path) -> None:
    strong = (*SMALL, "--entropy_coef_delta", "5", "--entropy_coef_max", "10")
    for name, target in (("off", "null"), ("on", "100")):
        run(job, tmp_path / name, *strong, "--entropy_target", target)
    off, on = (metrics(tmp_path / name) for name in ("off", "on"))
    assert on[1]["entropy"] == off[1]["entropy"], "the first step has no bonus yet"
    assert on[-1]["text/entropy"] > off[-1]["text/entropy"] and on[-1]["image/entropy"] > off[-1]["image/entropy"]
