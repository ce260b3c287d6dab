"""The benches: a wrong result has no time, providers compute what they are compared on, gpu.sh walks to its end."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from oracle import CUDA, needs_triton
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT
from torch import Tensor

from bicot.bench import bench_rollout, bench_train, harness, kernels, loss_kernels, models, report, walk
from bicot.bench.harness import Case, Provider, Unavailable, expect, relative_error
from bicot.grpo.plan import settled

BENCHES = {"train": bench_train.cases, "rollout": bench_rollout.cases, **kernels.OPS}
DOC = "rms_norm: twice.\n\npython -m x\nFloor: none."
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
        assert harness.main(DOC, double_cases) == 1
    finally:
        torch.compiler.set_stance("default")
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(file.read_text())
    assert json.loads(printed[-1]) == result and result["about"] == "Twice. Floor: none."
    assert result["command"] == "python -m x --device cpu"
    assert [row["provider"] for row in result["rows"]] == ["ours", "in place"]
    assert {entry["provider"] for entry in result["failed"]} == {"wrong column", "nan", "raising"}
    assert {entry["provider"]: entry["reason"] for entry in result["skipped"]} == {
        "unavailable": "no such machine",
        "missing": "No module named 'no_such_package'",
    }
    assert any("wrong column: FAILED: AssertionError" in line for line in printed)
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
    harness.measured({"a": (Provider(lambda x: count.append(x) or []), None)}, 50, "cpu", seconds=0)
    assert len(count) == 4  # one warms up


def test_a_result_has_a_line_for_each_row(tmp_path: Path) -> None:
    result = {"bench": "x", "rows": [{"ms": [1, 2.5]}, {"note": "é"}], "skipped": [], "ceilings": {"a": 1}}
    harness.save(result, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == result and len(text.splitlines()) == 9
    with pytest.raises(TypeError):
        harness.save({"rows": [object()]}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == text


def test_the_toys_settings_without_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = pytest.importorskip("bicot.grpo.cli")
    assert models.toy_config(max_steps=3) == cli.parse_config(["--max_steps", "3"])
    published = models.published_config()
    assert (published.dtype, published.cfg_weight, published.prompts_per_device) == ("bfloat16", 5.0, 2)
    assert published.num_generations == 8 and published.beta == 0.01 and published.top_k == 50
    model = models._random_model(models.SHAPES["Janus-Pro-1B"], torch.bfloat16, "meta", 576)
    on_80_gb = settled(published, model, 1, 79 * 2**30)
    assert on_80_gb.gradient_checkpointing is False and on_80_gb.micro_batch_tokens > 16 * (576 + 2 * 80)


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

    times = harness.measured({name: (provider(name), None) for name in "ab"}, 3, "cpu")
    assert order == ["prepare a", "a", "prepare b", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert harness.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == [2.0, 3.5, 5.0]


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("bench", ["rollout", *kernels.OPS])
def test_triton_providers_are_right(bench: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the peers' Triton kernels, in the interpreter too: their calls are those of the GPU bench."""
    for module in (kernels, loss_kernels):
        monkeypatch.setattr(module, "kernel", lambda device: "triton")
    monkeypatch.setattr(loss_kernels, "gpu_only", lambda tensor: None)
    for case in BENCHES[bench]("cuda" if CUDA else "cpu", True):
        inputs = case.inputs()
        error_of = case.truth(inputs)
        for name, provider in case.providers.items():
            if name == "torch.compile":
                continue
            try:
                case.check(provider, inputs, error_of)
            except (ImportError, Unavailable):
                assert not name.startswith("ours")


def beyond(*names: str) -> set[str]:
    """What can be imported here and is of no distribution that these need."""
    needed, queue = set(), list(names)
    while queue:
        if (name := canonicalize_name(queue.pop())) not in needed:
            needed.add(name)
            try:
                wanted = map(Requirement, metadata.requires(name) or [])
            except metadata.PackageNotFoundError:
                continue  # of another platform
            queue += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    owners = metadata.packages_distributions()
    return {package for package, its in owners.items() if needed.isdisjoint(map(canonicalize_name, its))} - {"bicot"}


def test_gpu_script_walks_to_its_end(tmp_path: Path) -> None:
    """With no package but torch, triton, transformers, numpy, pytest and what these need."""
    blocked = beyond("torch", "triton", "transformers", "numpy", "pytest")
    assert {"jsonargparse", "matplotlib", "hypothesis", "trl", "peft", "deepspeed", "PIL"} & set(blocked)
    assert not {"yaml", "tqdm", "packaging", "_pytest"} & blocked
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)}))\n")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "BICOT_COMMIT": "abc"}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("TRITON_INTERPRET", None)
    # all smoke tests run as tests of their own; here those that ask for most packages
    environment["PYTEST_ADDOPTS"] = "-k 'rms_norm or scorers'"
    command = [*GPU_SH, "--tiny", "--device", "cpu", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
    steps = [step.name for step in walk.steps("full", "cpu", True, tmp_path)]
    assert all(f"===== {name}: exit status 0" in done.stdout for name in steps)
    assert {step.name for step in walk.steps("quick", "cpu", True, tmp_path)} <= {*steps}, "--quick takes no other"
    kept = {path.name for path in (tmp_path / "out" / "results").iterdir()}
    assert kept == {f"{name}_cpu.json" for name in steps if name != "smoke"} | {"step_profile_cpu.trace.json.gz"}
    files = (tmp_path / "out" / "results").glob("*.json")
    results = {path.name.removesuffix("_cpu.json"): json.loads(path.read_text()) for path in files}
    assert all(result["commit"] == "abc" and not result.get("failed") for result in results.values())
    assert results["step_profile"]["covered_pct"] > 90 and not results["step"]["skipped"]
    assert {row["provider"] for row in results["step_7b"]["rows"]} == {"ours"}
    for bench in report.KERNELS:
        result = results[bench]
        assert result["bench"] == bench and set(result["ceilings"]) <= {"copy_gbps", "gemm_tflops"}
        listed = {(report.label(e["case"]), e["provider"]) for e in result["rows"] + result["skipped"]}
        assert listed == {(report.label(c.labels), name) for c in BENCHES[bench]("cpu", True) for name in c.providers}
        compiled = set() if bench == "rollout" else {"torch.compile"}
        assert {"ours", "eager"} | compiled <= {row["provider"] for row in result["rows"]}
    page = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "svg" not in page and [line for line in page.splitlines() if line.startswith("## ")] == [
        *(f"## {bench} on the CPU" for bench in ("step", "step", "step_profile", *report.KERNELS)),
    ]


def test_a_walk_names_what_failed(capfd: pytest.CaptureFixture[str]) -> None:
    def step(name: str, seconds: int, command: str) -> walk.Step:
        return walk.Step(name, seconds, ["sh", "-c", command], is_bench=False)

    todo = [step("dies", 1, "kill -SEGV $$"), step("fails", 1, "exit 3"), step("runs", 0, "true")]
    begin = time.monotonic()
    assert walk.walk([*todo, step("hangs", 0, "sleep 60 & sleep 60"), step("late", 1, "true")], begin) == [
        "dies", "fails", "hangs",
    ]  # fmt: skip
    assert 2 <= time.monotonic() - begin < 6, "what the first steps left"
    printed = capfd.readouterr().out
    assert "===== dies: exit status 245 after" in printed and "===== hangs: exit status 124 after 2 s" in printed
    assert walk.walk([step("has no limit", 0, "sleep 1.5")]) == []


def test_modes_fit_their_time(tmp_path: Path) -> None:
    for mode, limit in (("quick", 170), ("full", 540), ("tests", 570)):
        todo = walk.steps(mode, "cuda", False, tmp_path)
        assert limit - 15 <= sum(step.seconds for step in todo) <= limit - 5 * (mode != "tests"), "and packs"
    every = [step.name for step in walk.steps("all", "cpu", False, tmp_path)]
    assert every == ["step_profile", "step", *report.KERNELS]
    assert {step.name for step in walk.steps("full", "cuda", False, tmp_path)} >= set(report.KERNELS)


def test_a_bad_gpu_test_fails_alone(tmp_path: Path) -> None:
    """A test that hangs ends its process. The others run, and the log says what happened."""
    pytest.importorskip("xdist")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_missing.py").write_text("import no_such_package\n")
    (tmp_path / "test_bad.py").write_text(
        "import time, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_fails(): assert 1 + 1 == 3\n"
        "def test_hangs(): time.sleep(600)\n"
        "@pytest.mark.parametrize('i', range(9))\n"
        "def test_passes(i): pass\n"
    )
    command = walk.parallel_tests(tmp_path, 90, ["-m", "gpu", "-n", "1", "-o", "faulthandler_timeout=1"])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    log = (tmp_path / "tests.log").read_text()
    assert done.returncode == 1 and done.stdout == log and log.count(" PASSED ") == 9
    failed = {line.split(" - ")[0].split("::")[-1] for line in log.splitlines() if line.startswith("FAILED ")}
    assert failed == {"test_fails", "test_hangs"} and "assert (1 + 1) == 3" in log
    assert "No module named 'no_such_package'" in log and (tmp_path / "tests.xml").read_text().count("<testcase") == 12


def test_a_test_that_breaks_cuda_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a broken CUDA context would fail all later tests; xdist replaces a process that has ended."""
    ended: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: exec("raise RuntimeError('CUDA error: illegal access')"))
    monkeypatch.setattr(conftest.os, "_exit", ended.append)
    for worker, status in (("gw0", [1]), ("", [])):
        monkeypatch.setitem(os.environ, "PYTEST_XDIST_WORKER", worker)
        with pytest.raises(RuntimeError, match="illegal access"):
            conftest.pytest_runtest_teardown()
        assert ended == status
        ended.clear()


def test_report_compares_with_ours() -> None:
    row = {"case": {"pass": "forward", "N": 4}, "gbps": 1234.5, "floor_pct": 61.7, "peak_mib": 2.0, "error": 1e-7}
    rows = [
        {**row, "provider": "ours", "ms": [1.0, 2.0, 3.0], "note": ""},
        {**row, "provider": "eager", "ms": [0.0123, 5.0, 412.6], "note": "slow"},
    ]
    machine = {"gpu": "H", "gpu_state": "clocks.sm 1980 MHz", "torch": "2", "triton": "3", "commit": "abc"}
    machine["device"] = "cuda"
    result = {"bench": "grpo_loss", "about": "About.", "command": "run it", **machine, "rows": rows, "failed": []}
    result |= {
        "ceilings": {"copy_gbps": 2000.0},
        "skipped": [{"case": {}, "provider": "Liger", "reason": "not here"}],
    }
    page = report.kernel(result)
    assert "| forward, N 4 | ours | 2.00 [1.00 to 3.00] | 1234 GB/s | 62 | 2 | 1e-07 |  |" in page
    assert "|  | eager | 5.00 [0.0123 to 413] | 1234 GB/s | 62 | 2 | 1e-07 | 2.50× |" in page
    assert "- eager: slow\n- Liger: not run: not here" in page
    assert "`run it` on H (clocks.sm 1980 MHz), triton 3, torch 2, commit abc." in page


def test_results_are_what_report_writes(tmp_path: Path) -> None:
    folder = ROOT / "bench" / "results"
    assert report.render(folder, pictures=False) == (folder.parent / "RESULTS.md").read_text()
    for path in folder.glob("*.json"):
        assert report.dumps(json.loads(path.read_text())) == path.read_text(), path
    (tmp_path / "other.json").write_text(json.dumps({"bench": "other"}))
    with pytest.raises(ValueError, match=r"other\.json: no section for bench 'other'; there are tables"):
        report.render(tmp_path)


@pytest.mark.parametrize("name", ["step_cpu", "step_profile_cuda"])
def test_report_draws_where_a_step_goes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(ROOT / "bench" / "results" / f"{name}.json", folder)
    assert f"(results/{name}.png)" in report.render(folder)
    first = (folder / f"{name}.png").read_bytes()
    report.render(folder)
    assert (folder / f"{name}.png").read_bytes() == first, "the same result is the same picture"
