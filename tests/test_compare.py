"""The gate against regressions: ratios within a run count, absolute times do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from bicot.bench.compare import compare, main


def row(case: str, provider: str, median: float, spread: float = 0.01) -> dict[str, Any]:
    ms = [round(median * (1 + by), 4) for by in (-spread, 0, spread)]
    return {"case": {"kind": case}, "provider": provider, "ms": ms}


def result(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"bench": "b", "commit": "abc", "cpu": "A", "rows": list(rows), "skipped": [], "failed": []} | changes


OLD = result(row("x", "ours", 10), row("x", "eager", 40), row("x", "torch.compile", 20))


def said_of(lines: list[str]) -> str:
    """What is said of ours in case x."""
    return next(line for line in lines if line.startswith("x, ours: "))


@pytest.mark.parametrize(
    ("ours", "eager", "good"), [(10.5, 40, True), (11.1, 40, False), (111, 400, False), (5, 40, True)]
)
def test_only_the_ratio_counts(ours: float, eager: float, good: bool) -> None:
    lines, passed = compare(OLD, result(row("x", "ours", ours), row("x", "eager", eager)))
    assert passed == good and ("WORSE: x, ours" in lines) == (not good) and ("nothing got worse" in lines) == good
    change = ours / eager / (10 / 40) - 1
    assert said_of(lines).startswith(f"x, ours: 4.00× → {eager / ours:.2f}×, takes {change:+.1%}: ")


def test_a_slower_machine_is_not_worse() -> None:
    lines, good = compare(OLD, result(row("x", "ours", 100), row("x", "eager", 400), cpu="B"))
    assert (
        good and any(line.endswith(": cpu: A → B") for line in lines) and not any("commit:" in line for line in lines)
    )
    assert "torch.compile" not in "\n".join(lines), "a peer that is not there is no regression"


def test_noise_is_said_and_fails_all_the_same() -> None:
    lines, good = compare(OLD, result(row("x", "ours", 12, 0.3), row("x", "eager", 40, 0.3)))
    assert not good and said_of(lines).endswith(": WORSE, within noise")
    lines, good = compare(OLD, result(row("x", "ours", 12), row("x", "eager", 40)))
    assert not good and said_of(lines).endswith(": WORSE")


@pytest.mark.parametrize("gone", ["ours", "eager"])
def test_what_vanished_fails(gone: str) -> None:
    kept = [each for each in OLD["rows"] if each["provider"] != gone]
    failed = [{"case": {"kind": "x"}, "provider": gone, "reason": "wrong by 2"}]
    lines, good = compare(OLD, result(*kept, failed=failed))
    assert not good and f"VANISHED: x, {gone}: failed: wrong by 2" in lines
    assert compare(result(*kept), OLD)[1], "what is new is no regression"


def test_each_of_ours_and_each_case_is_compared() -> None:
    old = result(*OLD["rows"], row("x", "ours, in place", 8), row("y", "ours", 1), row("y", "eager", 1))
    new = result(*OLD["rows"], row("x", "ours, in place", 10), row("y", "ours", 2), row("y", "eager", 1))
    lines, good = compare(old, new)
    assert not good and {"WORSE: x, ours, in place", "WORSE: y, ours"} <= set(lines) and "WORSE: x, ours" not in lines


def test_whole_steps_are_compared_with_the_published_algorithm() -> None:
    def step(ours: float) -> dict[str, Any]:
        pair = {"ours": ours, "baseline": 4.0}
        return result(*({"case": {"model": "m"}, "provider": k, "seconds": [v, v, v]} for k, v in pair.items()))

    assert compare(step(1), step(1.05))[1] and not compare(step(1), step(1.2))[1]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*files: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
        return main()

    committed = ROOT / "bench" / "results" / "silu_mul_cpu.json"
    assert run(committed, committed) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "nothing got worse" and "+0.0%" in printed
    slower = json.loads(committed.read_text())
    for each in slower["rows"]:
        each["ms"] = [t * (1.2 if each["provider"] == "ours" else 1) for t in each["ms"]]
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert run(committed, tmp_path / "slower.json") == 1
    assert run(tmp_path / "slower.json", committed) == 0, "faster is no regression"
    (tmp_path / "none.json").write_text(json.dumps({"bench": "scaling"}))
    for other, words in (
        (tmp_path / "none.json", "none.json: no result with a provider called eager or baseline"),
        (ROOT / "bench" / "results" / "rms_norm_cpu.json", "results of two benches: silu_mul and rms_norm"),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            run(committed, other)
        assert words in capsys.readouterr().err
