"""The profile of a step: every moment has its phase, a kernel that of its launch; floors count work."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TOY

from bicot.bench import harness, models, report, step_profile
from bicot.grpo import profile
from bicot.grpo.config import RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.profile import IDLE, STEP, Launch, Range, attributed, charged, innermost, longest, read_trace

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = {"num_generations": 6, "per_device_train_batch_size": 2, "max_completion_length": 12, "eval_file": None}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, models.ShapeTrainer]:
    """The result of a small profile of the toy, its file, and the trainer."""
    folder = tmp_path_factory.mktemp("profile")
    # enough samples that a step is what it is in the default run, a fifth as large
    trainer = models.ShapeTrainer("toy", 64, models.toy_config(output_dir=str(folder / "run"), **SMALL), ALONE)
    result: dict[str, Any] = {"bench": "step_profile", "about": "About.", "command": "run it", "device": "cpu"}
    result |= {"cpu": "A", "isa": "B", "cpu_mhz": 1, "threads": 1, "torch": "2", "commit": "abc"}
    step_profile.measure(trainer, 2, result, folder / "step.json", tiny=True)
    return result, folder / "step.json", trainer


def test_the_phases_cover_a_toy_step(profiled: tuple[dict[str, Any], Path, Any]) -> None:
    result, _, _ = profiled
    rows = {row["phase"]: row for row in result["rows"]}
    assert {*profile.PHASES, "reward scene", "reward scene_relation", IDLE} == rows.keys() and list(rows)[-1] == IDLE
    # 98 in the default run; what interrupts the process may do so between two phases
    assert result["covered_pct"] >= 93, result["rows"]
    assert result["covered_pct"] == pytest.approx(100 - rows[IDLE]["pct"], abs=0.02)
    # nothing is counted twice: the parts are the whole
    low, _, high = result["profiled_step_ms"]
    assert 0.99 * low <= sum(row["ms"] for row in rows.values()) <= 1.01 * high
    assert sum(row["pct"] for row in rows.values()) == pytest.approx(100, abs=0.2)
    assert all(0 <= row["gap_ms"] <= row["ms"] + 1e-3 and row["binds"] for row in rows.values())
    once = {name: rows[name]["calls"] for name in ("text decode", "image decode", "VQ", "reference", "backward")}
    assert set(once.values()) == {1} and rows["prefill"]["calls"] == 2 and rows["communication"]["calls"] >= 4
    floored = {"prefill", "text decode", "image decode", "VQ", "reference", "forward", "loss", "backward", "optimizer"}
    assert {name for name, row in rows.items() if row["floor_ms"]} == floored
    assert rows["image decode"]["launches"] > 64 * 4 * 5 and rows["tokenizer"]["launches"] == 0
    for part, table in result["kernels"].items():
        busy_us = sum(1e3 * rows[phase]["busy_ms"] for phase in profile.LISTED[part])
        assert len(table) <= 25 and 0.8 * busy_us < sum(us for _, _, us in table) <= busy_us + 5
    assert "aten::linear" in {name for name, _, _ in result["kernels"]["image decode"]}
    assert result["images"] == 12 and result["power"] == {}


def test_what_lies_beside_the_json(profiled: tuple[dict[str, Any], Path, Any]) -> None:
    result, file, _ = profiled
    known = json.loads(file.read_text())
    assert known["step_ms"] == result["step_ms"] and known["rows"] == [], "written before the profiler began"
    assert "The profile of it did not end." in report.step_profile(known)
    events = json.loads(gzip.decompress(file.with_suffix(".trace.json.gz").read_bytes()))["traceEvents"]
    seen = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    assert seen[STEP] == seen["image decode"] == seen["reward scene"] == 3
    page = report.step_profile(result)
    name, count, us = result["kernels"]["update"][0]
    assert f"\n| update | `{name}` | {report.number(count)} | {report.number(us)} |\n" in page
    assert all(f"\n| {row['phase']} | " in page for row in result["rows"])


def test_training_settings_are_profiled_instead_of_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "profile.json"
    config = models.toy_config(**step_profile.TINY, output_dir=str(tmp_path / "run"))
    profile.profile(config, file, steps=1)
    said, result = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    said = said[[line.startswith("phase ") for line in said].index(True) :]
    rows = [row for row in result["rows"] if row["pct"] >= 1]
    assert [line.split("  ")[0] for line in said[1:-3]] == [row["phase"] for row in rows] and len(rows) > 5
    assert said[-3].startswith(f"a step: {result['step_ms'][1]:.1f} ms, and ") and max(map(len, said[:-1])) <= 100
    assert said[-1].startswith(f"more in {file}; ") and {path.suffix for path in file.parent.iterdir()} == {
        ".json",
        ".gz",
    }
    assert not (tmp_path / "run").exists()


def test_a_profile_evaluates_and_saves_nothing(tmp_path: Path) -> None:
    rewards = RewardConfig(["scene"], heldout=["scene_relation"])
    more: dict[str, Any] = {"eval_file": str(TOY / "heldout.jsonl"), "eval_steps": 1, "rewards": rewards}
    more |= {"load_best_model_at_end": True, "save_rollouts": str(tmp_path / "kept"), "push_to_hub": True}
    config = profile.for_profile(models.toy_config(**more, resume="auto", stop_after=1), str(tmp_path), 7)
    assert config.eval_file is config.save_rollouts is config.resume is None and not config.push_to_hub
    more |= {"load_best_model_at_end": False, "save_rollouts": None, "replay": str(tmp_path / "kept")}
    config = profile.for_profile(models.toy_config(**more, stop_after=1), str(tmp_path), 7)
    assert (config.max_steps, config.stop_after) == (7, None), "a replay says at once if it has fewer steps"


def test_the_innermost_range_has_the_time() -> None:
    ranges = [Range(STEP, 0, 100, 1), Range("a", 10, 40, 1), Range("b", 20, 40, 1), Range("a", 40, 50, 1)]
    ranges += [Range(STEP, 130, 150, 1)]
    parts = innermost(reversed(ranges))
    assert [(part.start, part.end, part.name) for part in parts] == [
        (0, 10, STEP), (10, 20, "a"), (20, 40, "b"), (40, 50, "a"), (50, 100, STEP), (130, 150, STEP),
    ]  # fmt: skip
    assert charged(parts, []) == {STEP: (80, 80), "a": (20, 20), "b": (20, 20)} and innermost([]) == []


def test_device_time_goes_to_the_first_phase_and_gaps_to_the_host() -> None:
    host = [Range("image decode", 0, 50, 1), Range(STEP, 50, 80, 1), Range("forward", 80, 100, 1)]
    busy = [
        ("image decode", 5, 30),
        ("image decode", 10, 20),  # the same phase on two streams takes its time once
        ("reward x", 25, 45),  # hidden until 30, alone until 45
        ("image decode", 60, 60),
        ("forward", 70, 120),  # ends after the host
    ]
    launches = [(name, Launch(start, 1, start, end, "stream 7", "k")) for name, start, end in busy]
    for each in (launches, launches[::-1]):
        assert charged(host, each) == {
            "image decode": (5 + 25 + 5, 5 + 5), "reward x": (15, 0), STEP: (20, 20), "forward": (30, 0),
        }  # fmt: skip


def event(cat: str, name: str, tid: int, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur, "args": args}


def test_a_kernel_belongs_to_the_range_that_launched_it(tmp_path: Path) -> None:
    main, scorer, autograd, shift = 1, 2, 3, 5000.0
    noted = [event("user_annotation", STEP, main, shift - 100, 90), event("user_annotation", STEP, main, shift, 100)]
    noted += [event("user_annotation", "image decode", main, shift + 10, 20)]
    noted += [event("user_annotation", "backward", main, shift + 50, 30)]
    noted += [event("user_annotation", "reward hps", scorer, shift + 20, 40)]
    noted += [event("user_annotation", "Optimizer.step#AdamW.step", main, shift + 85, 1)]
    calls = [
        event("cuda_runtime", "cudaGraphLaunch", main, shift + 12, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", autograd, shift + 60, 2, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", scorer, shift + 25, 2, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", main, shift + 90, 2, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", main, shift - 40, 2, correlation=5),
        event("cuda_runtime", "cudaEventQuery", main, shift + 91, 2),
    ]
    kernels = [
        event("kernel", "first of a graph", 7, shift + 14, 10, correlation=1, stream=7),
        event("kernel", "second of a graph", 7, shift + 40, 10, correlation=1, stream=7),  # runs after its range
        event("kernel", "gradient", 7, shift + 62, 10, correlation=2, stream=7),
        event("kernel", "score", 9, shift + 30, 10, correlation=3, stream=9),
        event("gpu_memcpy", "copy", 7, shift + 92, 1, correlation=4, stream=7),
        event("kernel", "of the step before", 7, shift - 30, 10, correlation=5, stream=7),
        event("gpu_memset", "its call is not in the trace", 7, shift + 55, 1, stream=7),
    ]
    file = tmp_path / "trace.json"
    others = [event("cpu_op", "mm", main, shift, 9), {"ph": "M", "name": "process"}]
    file.write_text(json.dumps({"traceEvents": [*kernels, *noted, *others, *calls]}))
    ranges, launches = read_trace(file)
    busy = attributed(ranges, launches, main)
    assert sorted((run.start - shift, run.end - run.start, name, run.stream) for name, run in busy) == [
        (14, 10, "image decode", "stream 7"),
        (30, 10, "reward hps", "stream 9"),
        (40, 10, "image decode", "stream 7"),
        (55, 1, "backward", "stream 7"),
        (62, 10, "backward", "stream 7"),
        (92, 1, STEP, "stream 7"),
    ]
    result = profile.described(ranges, launches, 1, "cuda")
    assert result["streams"] == {
        "stream 7": {"image decode": 0.02, "backward": 0.011, IDLE: 0.001},
        "stream 9": {"reward hps": 0.01},
    }
    rows = {row["phase"]: row for row in result["rows"]}
    assert rows["reward hps"]["ms"] == 0.01 and rows["image decode"]["gap_ms"] == 0.01
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(0.1)


def test_without_a_gpu_operators_stand_in(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    events = [event("user_annotation", STEP, 1, 1, 5), event("user_annotation", STEP, 1, 10, 90)]
    events += [
        event("cpu_op", "linear", 1, 20, 30),
        event("cpu_op", "addmm", 1, 21, 28),
        event("cpu_op", "t", 2, 30, 5),
    ]
    events += [event("cpu_op", "add", 1, 50, 4)]
    file.write_text(json.dumps({"traceEvents": events}))
    _, launches = read_trace(file)
    assert [(x.called, x.thread, x.end - x.start, x.stream, x.name) for x in launches] == [
        (20, 1, 30, "operators", "linear"), (30, 2, 5, "operators", "t"), (50, 1, 4, "operators", "add"),
    ]  # fmt: skip
    assert longest([*launches, *launches, launches[2]], 2) == [["linear", 1, 30], ["add", 1.5, 6], ["t", 1, 5]]


def test_floors_count_what_a_step_reads_and_trains(profiled: tuple[Any, Path, models.ShapeTrainer]) -> None:
    _, _, trainer = profiled
    work, policy, rollout = step_profile.floors(trainer), trainer.policy, trainer.rollout
    shape, G, T = models.SHAPES["toy"], 6, 64
    body, samples = step_profile.matrices(policy.decoder.layers), 12
    assert body == shape.layer_weights - 9 * 128
    plans, prompts = ([*map(len, part)] for part in (rollout.ids[1], rollout.ids[0]))
    # of each plan its own tokens, of a prompt those of its longest plan: one that ends reads no more
    cached = sum(n * (n + 1) // 2 for n in plans)
    cached += sum((prompts[i] - 1) * max(plans[i : i + G]) for i in (0, G))
    weights = body + shape.text_head_weights
    assert work["text decode"] == (
        max(plans) * weights * 4 + trainer.engine.pool.bytes_per_token * cached, 2 * weights * sum(plans)
    )  # fmt: skip
    assert max(plans) > min(plans) and work["image decode"][1] == 2 * T * samples * (body + 128 * (128 + 64))
    forward, projection = work["forward"][1], 2 * 128 * 128 * samples * T
    tokens = (forward - projection) / (2 * body)
    assert tokens == int(tokens) and sum(plans) + samples * T < tokens < 2 * sum(plans) + samples * T + 2 * 2 * 60
    # the image head is frozen, so its backward pass is one product and not two
    assert work["backward"][1] == 2 * (forward - projection) + projection
    heads = sum(plans) * shape.text_head_weights, samples * T * 128 * 64
    assert work["reference"][1] == forward + 2 * sum(heads) and work["loss"][1] == 6 * heads[0] + 4 * heads[1]
    policy.decoder.layers[:3].requires_grad_(False)
    last = step_profile.matrices(policy.decoder.layers[3])
    found = step_profile.training_flops(policy, [rollout])
    policy.decoder.layers[:3].requires_grad_(True)
    assert found["forward"] == forward and found["backward"] == 4 * last * tokens + projection
    trained = sum(p.numel() for p in policy.trainable_parameters())
    assert work["optimizer"][0] == 32 * trained, "float32 weights are their own masters"
    assert work["VQ"][1] > 0 and work["VQ"][1] % samples == 0


@pytest.mark.parametrize(
    ("changes", "flops", "sentence"),
    [
        ({}, 3e9, "work: 40 kernels of 200 µs, 30% of the floor's rate (compute)"),
        ({}, 7.5e9, "compute: 75% of the floor's rate"),
        ({"gap_ms": 6.0}, 3e9, "host: no kernels run for 60% of this phase"),
        (
            {"launch_us": 2.0, "launches": 4000},
            3e9,
            "launch: 4000 kernels of 2.0 µs, 30% of the floor's rate (compute)",
        ),
        ({}, None, "work: 40 kernels of 200 µs"),
        ({"ms": 2.0, "busy_ms": 8.0}, None, "overlap: 6 ms of its kernels run beside another phase"),
        ({"phase": IDLE}, None, "host: work outside all phases"),
    ],
)
def test_what_binds_a_phase(changes: dict[str, Any], flops: float | None, sentence: str) -> None:
    row = {"phase": "forward", "ms": 10.0, "gap_ms": 1.0, "busy_ms": 9.0, "launches": 40, "launch_us": 200.0} | changes
    row["binds"] = profile.binds(row, "cuda")
    work = None if flops is None else (1e8, flops)  # a millisecond of bytes
    found = step_profile.with_floor(row, work, gbps=100, tflops=1)
    assert found["binds"] == sentence and found["floor_ms"] == (flops and flops / 1e9)


class Nvml:
    """A GPU that uses 8 J from one look to the next."""

    NVMLError = RuntimeError
    energy = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.energy += 8000  # mJ
        return self.energy


def test_energy_is_measured_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert [harness.joules(), harness.joules()] == [8.0, 16.0]
    monkeypatch.setattr(nvml, "nvmlInit", lambda: exec("raise RuntimeError('driver not loaded')"))
    assert harness.joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert harness.joules() is None


def test_random_weights_of_a_shape(tmp_path: Path) -> None:
    """As gpu.sh profiles Janus-Pro-1B: bfloat16, guidance."""
    config = models.published_config(**step_profile.TINY, output_dir=str(tmp_path / "run"))
    trainer = models.ShapeTrainer("tiny", 16, config, ALONE)
    names = [name for name, p in trainer.policy.model.named_parameters() if p.requires_grad]
    assert names and all(name.startswith(("model.language_model", "lm_head")) for name in names)
    assert trainer.reference is not None and not any(p.requires_grad for p in trainer.reference.model.parameters())
    metrics, _ = trainer._train_step()
    assert len(trainer.rollout) == 2 * 2 * 2 and metrics["grad_norm"] > 0 and trainer.policy.dtype == torch.bfloat16
    work = step_profile.floors(trainer)
    assert work["optimizer"][0] == (32 + 2 + 2 * 6) * sum(p.numel() for p in trainer.policy.trainable_parameters())
    assert work["image decode"][1] == 2 * 16 * (2 * 8) * (
        models.SHAPES["tiny"].layer_weights - 5 * 32 + 32 * (32 + 37)
    )  # two rows a picture


def test_words_are_tokens_and_tokens_words() -> None:
    words = models.Words(50)
    ids = words("a red t7 circle t49")["input_ids"]
    assert ids[0] == 0 and ids[3] == 7 and ids[5] == 49 and min(ids[1:]) >= 4 and max(ids) < 50
    assert words.decode([1, *ids]) == " ".join(f"t{i}" for i in ids[1:])
    assert words(words.decode(ids))["input_ids"] == ids
