"""The benches: a wrong result has no time, providers compute what they are compared on, gpu.sh walks to its end."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import CUDA, needs_triton
from tiny import ROOT
from torch import Tensor

from bicot.bench import harness, report
from bicot.bench.harness import Case, Provider, Unavailable, expect, relative_error

BENCHES = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
GPU_SH = ["bash", str(ROOT / "bench" / "gpu.sh")]


def unavailable(x: Tensor) -> list[Tensor]:
    raise Unavailable("no such machine")


def missing(x: Tensor) -> list[Tensor]:
    return [importlib.import_module("no_such_package").double(x)]


def double_cases(device: str, tiny: bool) -> list[Case]:
    x = torch.arange(1.0, 13).view(3, 4)
    providers = {
        "ours": Provider(lambda x: [x * 2], "a note"),
        "in place": Provider(lambda x: [x.mul_(2)], prepare=torch.clone),
        "wrong column": Provider(lambda x: [torch.cat([x[:, :-1] * 2, x[:, :1]], 1)]),
        "nan": Provider(lambda x: [x * torch.nan]),
        "raising": Provider(lambda x: [x @ x]),
        "unavailable": Provider(unavailable),
        "missing": Provider(missing),
    }
    return [Case({"kind": "double", "N": 3}, x.dtype, x.clone, lambda x: expect([x * 2]), providers, bytes=10**9)]


def test_only_right_results_have_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--tiny", "--output", str(file)])
    try:
        assert harness.main("double", "double: twice.\n\npython -m x\nFloor: none.", double_cases) == 1
    finally:
        torch.compiler.set_stance("default")
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(file.read_text())
    assert json.loads(printed[-1]) == result and result["about"] == "Twice. Floor: none."
    assert [row["provider"] for row in result["rows"]] == ["ours", "in place"]
    assert {entry["provider"] for entry in result["failed"]} == {"wrong column", "nan", "raising"}
    assert {entry["provider"]: entry["reason"] for entry in result["skipped"]} == {
        "unavailable": "no such machine",
        "missing": "No module named 'no_such_package'",
    }
    assert any("wrong column" in line and "failed" in line for line in printed)
    row, copy_gbps = result["rows"][0], result["ceilings"]["copy_gbps"]
    assert row["case"] == {"kind": "double", "N": 3} and row["note"] == "a note" and row["error"] == 0
    assert row["ms"] == sorted(row["ms"]) and row["peak_mib"] is None
    assert row["gbps"] == pytest.approx(1e3 / row["ms"][1], rel=0.1)  # of the rounded milliseconds
    assert row["floor_pct"] == pytest.approx(100 * row["gbps"] / copy_gbps, rel=0.01)


def test_steps_rates_and_what_does_not_fit() -> None:
    def too_large() -> Tensor:
        raise Unavailable("needs 200 GiB")

    def draw(x: Tensor) -> list[Tensor]:
        time.sleep(0.02)
        return [x * torch.rand(4)]

    x = torch.ones(4)
    drawing = Provider(draw, checked=lambda x: [x * 2])
    case = Case({"N": 1}, x.dtype, x.clone, lambda x: expect([x * 2]), {"ours": drawing}, steps=10, bytes=10**6)
    cases = [replace(case, makes=("images", 5)), replace(case, inputs=too_large, labels={"N": 2})]
    result: dict[str, Any] = {"rows": [], "skipped": [], "failed": [], "ceilings": {"copy_gbps": 10.0}}
    for each in cases:
        harness._measure(each, result, 5, "cpu", True)
    (row,) = result["rows"]
    assert not result["failed"] and result["skipped"] == [
        {"case": {"N": 2}, "provider": "ours", "reason": "needs 200 GiB"}
    ]
    assert 2 <= row["ms"][1] < 10, "of a step"
    assert row["makes"] == "images" and row["per_s"] == pytest.approx(5e3 / row["ms"][1], rel=0.02)
    wrong = replace(case, providers={"ours": replace(drawing, checked=None)})
    harness._measure(wrong, result, 5, "cpu", True)
    assert len(result["failed"]) == 1, "what is timed is checked unless something else is given"
    loose = replace(case, truth=lambda x: lambda outputs: 0.5)
    with pytest.raises(AssertionError, match="beyond"):
        loose.check(drawing, x, lambda outputs: 0.5)
    replace(loose, tolerance=0.6).check(drawing, x, lambda outputs: 0.5)


def test_a_time_budget_leaves_three_rounds() -> None:
    count = []
    harness.times_ms({"a": (Provider(lambda x: count.append(x) or []), None)}, 50, "cpu", seconds=0)
    assert len(count) == 4  # one warms up


def test_relative_error_sees_one_element() -> None:
    true = torch.linspace(1, 2, 10_000, dtype=torch.float64)
    wrong = true.clone()
    wrong[-1] = 0
    assert relative_error([wrong], [true]) == pytest.approx(1)  # of the norm it is less than 2 %
    assert relative_error([None, true.float()], [true, true]) < 1e-7
    assert math.isnan(relative_error([true, wrong * torch.nan], [true, true]))
    with pytest.raises(ValueError, match="shorter|longer"):
        relative_error([true], [true, true])


def test_times_are_interleaved_and_warmed_up() -> None:
    order: list[str] = []

    def provider(name: str) -> Provider:
        return Provider(lambda x: order.append(name) or [], prepare=lambda x: order.append("prepare " + name))

    times = harness.times_ms({name: (provider(name), None) for name in "ab"}, 3, "cpu")
    assert order == ["prepare a", "a", "prepare b", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert harness.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == [2.0, 3.5, 5.0]


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("bench", BENCHES)
def test_triton_providers_are_right(bench: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the peers' Triton kernels, in the interpreter too: their calls are those of the GPU bench."""
    module = importlib.import_module(f"bicot.bench.bench_{bench}")
    for name, replacement in (("kernel", lambda device: "triton"), ("gpu_only", lambda tensor: None)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)
    for case in module.cases("cuda" if CUDA else "cpu", True):
        inputs = case.inputs()
        error_of = case.truth(inputs)
        for name, provider in case.providers.items():
            if name == "torch.compile":
                continue
            try:
                case.check(provider, inputs, error_of)
            except (ImportError, Unavailable):
                assert not name.startswith("ours")


def test_gpu_script_walks_to_its_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "BICOT_COMMIT": "abc"}
    environment.pop("TRITON_INTERPRET", None)
    command = [*GPU_SH, "--tiny", "--device", "cpu", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted([*BENCHES, "step_profile"])
    profile = json.loads((tmp_path / "step_profile.json").read_text())
    assert profile["commit"] == "abc" and profile["covered_pct"] > 90
    for bench in BENCHES:
        result = json.loads((tmp_path / f"{bench}.json").read_text())
        assert result["bench"] == bench and result["commit"] == "abc" and not result["failed"]
        cases = importlib.import_module(f"bicot.bench.bench_{bench}").cases("cpu", True)
        listed = {(harness.label(e["case"]), e["provider"]) for e in result["rows"] + result["skipped"]}
        assert listed == {(harness.label(case.labels), name) for case in cases for name in case.providers}
        baselines = {
            "ours",
            "eager",
            {"rollout": "generate", "rewards": "the decoder alone"}.get(bench, "torch.compile"),
        }
        assert baselines <= {row["provider"] for row in result["rows"]}
    page = report.render(tmp_path)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {bench} on the CPU" for bench in ("step_profile", *report.KERNELS)
    ]


def test_gpu_script_names_what_failed(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *bench_cfg_sample*|*"-m pytest"*) exit 3;; esac\necho "ran $*"\n')
    stub.chmod(0o755)
    command = [*GPU_SH, str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(stub)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "FAILED: tests cfg_sample"
    for bench in BENCHES:
        ran = f"ran -m bicot.bench.bench_{bench} --device cuda --output {tmp_path}/out/{bench}.json" in done.stdout
        assert ran == (bench != "cfg_sample")
    usage = subprocess.run([*GPU_SH, "--fast", "x"], capture_output=True, text=True, timeout=60)
    assert usage.returncode == 2 and "gpu.sh [--tiny]" in usage.stderr


def test_pytest_benchmark_entry() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "-k"]
    command += ["group_advantages and (ours or eager)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_report_compares_with_ours() -> None:
    row = {"case": {"pass": "forward", "N": 4}, "gbps": 1234.5, "floor_pct": 61.7, "peak_mib": 2.0, "error": 1e-7}
    rows = [
        {**row, "provider": "ours", "ms": [1.0, 2.0, 3.0], "note": ""},
        {**row, "provider": "eager", "ms": [0.0123, 5.0, 412.6], "note": "slow"},
    ]
    machine = {"gpu": "H", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "device": "cuda"}
    result = {"bench": "grpo_loss", "about": "About.", "command": "run it", **machine, "rows": rows, "failed": []}
    result |= {
        "ceilings": {"copy_gbps": 2000.0},
        "skipped": [{"case": {}, "provider": "Liger", "reason": "not here"}],
    }
    page = report.kernel(result)
    assert "| forward, N 4 | ours | 2.00 [1.00 to 3.00] | 1234 GB/s | 62 | 2 | 1e-07 |  |" in page
    assert "|  | eager | 5.00 [0.0123 to 413] | 1234 GB/s | 62 | 2 | 1e-07 | 2.50× |" in page
    assert "- eager: slow\n- Liger: not run: not here" in page and "`run it` on H, driver 1, torch 2" in page
