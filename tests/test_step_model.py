"""The step model: the floors this project holds itself to, and what must hold of any step on any cluster."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bicot.bench import bench_rollout, step_model
from bicot.bench.models import SHAPES
from bicot.bench.step_costs import GPU, GPUS, Cluster, Plans, Step, efficiency, predict, slower, state_bytes

H200 = GPUS["H200"]
SAME_PARTS, ALL_PARTS = 0.01, 0.06  # of the floors; they are rounded to a tenth of an image besides

gpus = st.builds(GPU, st.floats(100, 1e4), st.floats(10, 2e3), st.floats(24, 300), st.sampled_from([0.0, 1.0, 30.0]))
plans = st.builds(Plans, st.floats(1, 300), st.sampled_from([0, 1, 30]), st.integers(1, 400))
steps = st.builds(
    Step,
    st.sampled_from([SHAPES["Janus-Pro-1B"], SHAPES["Janus-Pro-7B"]]),
    prompts=st.integers(1, 6),
    generations=st.integers(2, 16),
    plans=plans,
    max_rows=st.integers(2, 300),
    accumulation=st.integers(1, 6),
    reference=st.booleans(),
    recompute=st.booleans(),
    reward_seconds=st.sampled_from([0, 0.1]),
)
zeros = st.sampled_from([0, 2, 3])
links = st.floats(1, 1000)
few = settings(max_examples=40, deadline=None)


def seconds_of(step: Step, gpu: GPU, **more: Any) -> float:
    return predict(step, Cluster(gpu, **more)).seconds


def test_the_floors_of_an_h200() -> None:
    rows = step_model.floors()
    assert [row["held"] for row in rows if row["model"] == "Janus-Pro-1B"] == [10.4, 14.0, 17.0, 18.9, 20.1]
    assert [row["held"] for row in rows if row["model"] == "Janus-Pro-7B"] == [2.5, 3.5, 4.4, 5.1, 5.5]
    for row in rows:
        assert abs(row["same_parts"] - row["held"]) <= SAME_PARTS * row["held"] + 0.05, row
        # the parts that the floors leave out cost something, and little
        assert (1 - ALL_PARTS) * row["same_parts"] < row["all_parts"] < 0.99 * row["same_parts"], row
        assert row["all_parts"] < row["shared"] < 1.2 * row["all_parts"]


def test_a_step_by_hand() -> None:
    """Two pictures of a shape so small that every term can be written down."""
    shape = SHAPES["tiny"]
    body, text, image = shape.layer_weights, 32 * 61, shape.image_head_weights
    step = Step(
        shape, 1, 2, prompt_tokens=7, plans=Plans(3, 0, 5), image_prompt_tokens=9, image_tokens=4, max_rows=2,
        accumulation=1, vq_flops=1000, reward_seconds=0.5,
    )  # fmt: skip
    costs = predict(step, Cluster(GPU(1e-9, math.inf, math.inf))).costs  # one byte a second
    kv = 2 * 2 * 32 * 2
    decode = sum(2 * (body + text) + 2 * kv * (7 + t) for t in (1, 2, 3))
    assert costs["plan/decode"] == (pytest.approx(decode), "bandwidth")
    # two rows a picture and two rows a step: one picture at a time
    assert costs["draw/decode"].seconds == pytest.approx(
        2 * sum(2 * (body + image) + 2 * kv * (9 + t) for t in (1, 2, 3, 4))
    )
    assert [costs[f"{stage}/prefill"].seconds for stage in ("plan", "draw")] == pytest.approx([2 * body, 2 * 2 * body])
    trained = body + 2 * text
    assert costs["train/optimizer"].seconds == pytest.approx((32 + 2 + 6) * trained)
    costs = predict(step, Cluster(GPU(math.inf, 1e-12 / 0.6, math.inf))).costs  # one FLOP a second in training
    tokens = 7 + (9 - 3) + 2 * (2 * 3 + 4 + 1)  # what both prompts have in common once; plan twice and picture of each
    assert costs["train/body"] == (pytest.approx(6 * body * tokens), "compute")
    assert costs["train/heads"].seconds == pytest.approx(6 * 2 * 3 * text + 4 * 2 * 4 * image)
    assert costs["reference/body"].seconds + costs["reference/heads"].seconds == pytest.approx(
        2 * body * tokens + 2 * (2 * 3 * text + 2 * 4 * image)
    )
    assert costs["decode/pictures"].seconds == pytest.approx(2 * 1000) and costs["reward/wait"] == (1.0, "rewards")
    launches = predict(step, Cluster(GPU(math.inf, math.inf, math.inf, 1e6))).by("phase")  # a second each
    assert launches["plan"] == 3 * (9 * 2 + 10) and launches["draw"] == 2 * 4 * (9 * 2 + 10)
    assert launches["train"] == 2 * (45 + 60) and launches["reference"] == 2 * 45
    assert costs["plan/prefill"].seconds == pytest.approx(2 * body * 7)  # a prompt is prefilled once for its group
    assert costs["draw/prefill"].seconds == pytest.approx(2 * body * (2 + 2) * 9)  # and each part's shared prefix
    recomputed = predict(replace(step, recompute=True, reference=False), Cluster(GPU(math.inf, 1e-12 / 0.6, math.inf)))
    assert recomputed.costs["train/body"].seconds == pytest.approx(8 * body * tokens)
    assert not any("reference" in name for name in recomputed.costs)


@few
@given(steps, gpus, zeros, st.integers(2, 8), links, links)
def test_more_gpus_make_more_images(step: Step, gpu: GPU, zero: int, first: int, within: float, across: float) -> None:
    """Between clusters that share a kind of link; a second GPU, and a second node, may cost more than it brings."""
    in_a_node = [Cluster(gpu, n, zero, 64, within, across) for n in (first, first + 1, 2 * first, 50)]
    nodes = [Cluster(gpu, 8 * n, zero, 8, within, across) for n in (first, first + 1, 10 * first, 1000)]
    for clusters in (in_a_node, nodes):
        rates = [predict(step, cluster).images_per_second for cluster in clusters]
        assert all(more >= (1 - 1e-9) * fewer for fewer, more in pairwise(rates))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("zero", [2, 3])
def test_with_real_links_every_node_brings_more(gpu: GPU, zero: int) -> None:
    step = Step(SHAPES["Janus-Pro-7B"], plans=step_model.LENGTHS, recompute=True)
    rates = [predict(step, Cluster(gpu, n, zero)).images_per_second for n in (1, 2, 4, 8, 9, 16, 64, 512, 4096)]
    assert rates == sorted(rates) and rates[-1] > 400 * rates[3]


@few
@given(steps, gpus, zeros, st.integers(1, 5000), links, links)
def test_efficiency_is_a_share(step: Step, gpu: GPU, zero: int, n: int, within: float, across: float) -> None:
    cluster = Cluster(gpu, n, zero, 8, within, across)
    share, found = efficiency(step, cluster), predict(step, cluster)
    assert 0 <= share <= 1 + 1e-9 and (share == 0) == (not found.costs)
    bound, part = found.binds()
    assert (bound == "memory") == (not found.costs) and 0 < part <= 1 + 1e-9
    if found.costs:
        assert sum(found.by("phase").values()) == pytest.approx(found.seconds)
        assert sum(found.by("bound").values()) == pytest.approx(found.seconds)
    assert efficiency(step, Cluster(gpu._replace(gib=math.inf))) == pytest.approx(1)


@few
@given(steps, gpus, zeros, st.integers(1, 100), st.floats(1, 100))
def test_better_hardware_is_never_slower(step: Step, gpu: GPU, zero: int, n: int, times: float) -> None:
    before = seconds_of(step, gpu, gpus=n, zero=zero)
    for name in GPU._fields:
        better = getattr(gpu, name) * (1 / times if name == "launch_us" else times)
        assert seconds_of(step, gpu._replace(**{name: better}), gpus=n, zero=zero) <= before * (1 + 1e-9)
    assert seconds_of(step, gpu, gpus=n, zero=zero, within=450 * times, across=50 * times) <= before * (1 + 1e-9)
    assert seconds_of(replace(step, reference=False), gpu, gpus=n, zero=zero) <= before
    assert seconds_of(replace(step, mfu=step.mfu / times), gpu, gpus=n, zero=zero) >= before


@few
@given(steps, gpus, zeros, st.integers(1, 100))
def test_infinite_bandwidth_leaves_compute(step: Step, gpu: GPU, zero: int, n: int) -> None:
    step = replace(step, reward_seconds=0)
    endless = GPU(math.inf, gpu.tflops, math.inf)
    found = predict(step, Cluster(endless, n, zero, within=math.inf, across=math.inf))
    assert found.binds()[0] == "compute" and found.by("bound")["compute"] == found.seconds > 0
    faster = Cluster(endless._replace(tflops=2 * gpu.tflops), n, zero, within=math.inf, across=math.inf)
    assert found.seconds == pytest.approx(2 * predict(step, faster).seconds)
    no_compute = predict(step, Cluster(GPU(gpu.gbps, math.inf, math.inf), n, zero))
    assert no_compute.by("bound").get("compute", 0) == 0


def test_messages() -> None:
    step = Step(SHAPES["Janus-Pro-1B"], accumulation=2)
    trained, model = 1e-9 * step.trained, 1e-9 * step.weights

    def links_of(zero: int, n: int, **more: float) -> float:
        return predict(step, Cluster(H200, n, zero, **more)).by("bound")["links"]

    assert links_of(0, 1) == 0
    assert links_of(0, 4) == pytest.approx(2 * 3 / 4 * 4 * trained / 450)  # float32, there and back
    assert links_of(2, 4) == pytest.approx(3 / 4 * 2 * trained * (2 + 1) / 450)
    expected = 3 / 4 * 2 * (2 * trained + (1 + 2 * 2 + 2) * model) / 450
    assert links_of(3, 4) == pytest.approx(expected)
    assert links_of(0, 64) == pytest.approx(2 * 63 / 64 * 4 * trained / 400)  # eight ports of 50 a node
    assert links_of(0, 64, across=200) == pytest.approx(2 * 63 / 64 * 4 * trained / 450)


def test_memory_decides_the_parts_and_whether_it_fits() -> None:
    step = Step(SHAPES["Janus-Pro-7B"], recompute=True)
    needed = state_bytes(step, Cluster(H200)) / 2**30
    assert needed > 140 and not predict(step, Cluster(H200)).costs  # 20 bytes a weight, and the reference
    assert predict(step, Cluster(H200)).images_per_second == 0
    sharded = [state_bytes(step, Cluster(H200, 8, zero)) for zero in (0, 2, 3)]
    assert sharded == sorted(sharded, reverse=True)
    rest = sharded[0] - 18 * step.trained - 2 * 2 * step.weights  # activations, and what else there is
    assert sharded[2] == pytest.approx(
        rest + 18 * step.trained / 8 + 2 * step.weights * (1 + 2 / 8)
    )  # and rollouts' copy
    activations = state_bytes(replace(step, recompute=False), Cluster(H200)) - state_bytes(step, Cluster(H200))
    assert activations == pytest.approx(32 * 30 * 4096 * 8 * step.tokens)  # of one of the two micro-batches
    picture = (160 + 576) * 2 * 491520 / 2**30
    one, all_of_them = (
        predict(step, Cluster(H200._replace(gib=needed + n * picture + 0.1))).costs["draw/decode"] for n in (1, 16)
    )
    weights = 576 * 2 * step.image_weights / 4.3e12
    assert one.seconds - all_of_them.seconds == pytest.approx(15 * weights)


def test_plans() -> None:
    assert Plans(3, 0, 5).reach() == [1, 1, 1, 0, 0] and sum(Plans(0.2, 0, 5).reach()) == 1
    normal = Plans(80, 20, 1024)
    assert sum(normal.reach()) == pytest.approx(80, abs=0.01)
    assert sum(Plans(80, 20, 80).reach()) == pytest.approx(80 - 20 * 0.3989, abs=0.3)  # the mean of what is cut
    step = Step(SHAPES["Janus-Pro-1B"], plans=normal)

    def waited(n: int) -> float:  # steps' worth of weights beyond those of plans of 80
        fixed = predict(replace(step, plans=Plans()), Cluster(H200)).costs["plan/decode"].seconds
        return (predict(step, Cluster(H200, n)).costs["plan/decode"].seconds - fixed) / (2 * step.text_weights / 4.3e12)

    in_four = predict(replace(step, plans=Plans(), max_rows=4), Cluster(H200)).costs["plan/decode"].seconds
    together = predict(replace(step, plans=Plans()), Cluster(H200)).costs["plan/decode"].seconds
    assert in_four - together == pytest.approx(3 * 80 * 2 * step.text_weights / 4.3e12)  # weights are read four times
    endless = Cluster(H200, 64, within=math.inf, across=math.inf)
    lost = (waited(64) - waited(1)) * (2 * step.text_weights / 4.3e12 + (9 * 24 + 10) * 1.1e-6)
    assert 1 - efficiency(step, endless) == pytest.approx(lost / predict(step, endless).seconds) and lost > 0.01
    assert waited(1) == pytest.approx(1.766 * 20, rel=0.05)  # the expected largest of 16 normal numbers
    assert waited(64) == pytest.approx(3.25 * 20, rel=0.05)  # of 1,024


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="zero=1"):
        Cluster(H200, 8, 1)
    with pytest.raises(ValueError, match="gpus=0"):
        Cluster(H200, 0)
    assert slower(2e9, 1e12, GPU(1, 2, 1), use=0.5) == (2, "bandwidth")
    assert slower(1e9, 3e12, GPU(1, 2, 1), use=0.5) == (3, "compute")


def machine(**more: Any) -> dict[str, Any]:
    return {"cpu": "A", "threads": 2, "device": "cpu", **more}


def test_ceilings_are_the_runs_own_or_its_machines() -> None:
    run = machine(ceilings={"copy_gbps": 40.0})
    others = [machine(ceilings={"copy_gbps": 9.0, "gemm_tflops": {"float32": x}}) for x in (1.0, 2.0, 9.0)]
    others.append(machine(threads=1, ceilings={"gemm_tflops": {"bfloat16": 5.0}}))
    assert step_model.ceilings(run, [run, *others], "float32") == (GPU(40, 2, math.inf), "")
    assert step_model.ceilings(run, [run, *others], "bfloat16") == (
        GPU(40, math.inf, math.inf),
        "gemm_tflops of bfloat16",
    )
    assert step_model.ceilings(machine(), others, "float32")[0].gbps == 9
    others[0]["ceilings"]["launch_us"] = 5.0
    assert step_model.ceilings(run, [run, *others], "float32")[0].launch_us == 5


def test_validation(tmp_path: Path) -> None:
    """What the rollout bench calls a floor is predicted here, but for prefixes, which it counts once."""
    stage = bench_rollout.IMAGE
    case = {"model": "Janus-Pro-1B", "stage": "image", "rows": 64, "context": 440, "steps": 16, "dtype": "bfloat16"}
    rows = [
        {"case": case | {"kv": "fp8 KV"}, "provider": "ours", "ms": [1, 20.0, 30]},
        {"case": case, "provider": "ours", "ms": [1, 40.0, 50]},
        {"case": case, "provider": "eager", "ms": [1, 2.0, 3]},
    ]
    result = machine(bench="rollout", ceilings={"copy_gbps": 1000.0}, rows=rows)
    (tmp_path / "a.json").write_text(json.dumps(result))
    point = {"x": 4, "seconds": 8.0, "phases": {"plan": 1.0, "draw": 2.0, "reward": 1.0, "train": 4.0}}
    point |= {"model": "toy", "dtype": "float32", "plans": [9.0, 2.0, 12], "ranks": 2, "link_gbps": 1e-3}
    point |= {"step": {"prompts": 3, "generations": 5, "itemsize": 4, "vq_flops": 1e6, "image_tokens": 64}}
    series = [{"axis": "ranks", "points": [point]}]
    ceilings = {"copy_gbps": 10.0, "gemm_tflops": {"float32": 0.1}}
    (tmp_path / "b.json").write_text(json.dumps(machine(bench="scaling", ceilings=ceilings, series=series)))
    (tmp_path / "c.json").write_text(json.dumps(machine(bench="grpo_loss", rows=[])))
    fp8, decode, *parts = step_model.validate(tmp_path)
    floor = bench_rollout.floor_bytes("Janus-Pro-1B", 2, stage, 32, 280 + 8.5, False) + (63 - 32) * 160 * 196608
    assert decode["predicted_ms"] == pytest.approx(floor / 1e9, rel=1e-3) and decode["measured_ms"] == 40
    assert (
        decode["ratio"] == pytest.approx(floor / 1e9 / 40, rel=2e-3) and decode["missing"] == "gemm_tflops of bfloat16"
    )
    floor = bench_rollout.floor_bytes("Janus-Pro-1B", 2, stage, 32, 280 + 8.5, True)
    floor += (63 - 32) * 160 * 2 * 24 * (2048 + 4 * 16)  # a byte a number, and a scale for each head
    assert fp8["predicted_ms"] == pytest.approx(floor / 1e9, rel=1e-3)
    assert [row["what"] for row in parts] == ["step", "plan", "draw", "train"]
    step = Step(SHAPES["toy"], plans=Plans(9.0, 2.0, 12), **point["step"])
    expected = predict(step, Cluster(GPU(10, 0.1, math.inf), 2, within=1e-3, across=1e-3))
    assert parts[0]["predicted_ms"] == pytest.approx(1e3 * expected.seconds, rel=1e-3)
    assert parts[0]["ratio"] == pytest.approx(expected.seconds / 8, rel=1e-2)
    assert parts[3]["predicted_ms"] > 1e3 * 4 * step.trained / 1e6  # two gradients over a slow link


def test_command_and_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpu=H100", "--gpus=64", "--zero=3", "--gbps=2000", "--prompts=4", "--plans", "70", "9", "99"]
    words += ["--recompute", "--mfu=0.5", f"--output={tmp_path / 'r.json'}"]
    monkeypatch.setattr(sys, "argv", ["step_model", *words])
    step_model.main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(lines[-1]) == result and any(line.startswith("reference/weights") for line in lines)
    step = Step(SHAPES["Janus-Pro-1B"], 4, plans=Plans(70, 9, 99), recompute=True, mfu=0.5)
    assert result["asked"] == step_model.summary(step, Cluster(GPU(2000, 790, 79, 1.1), 64, 3))
    assert len(result["projection"]) == 2 * 2 * 2 * 4 and result["validation"]
    result["projection"][0]["images_per_second"] = 0
    page = step_model.section(result)
    assert "| Janus-Pro-7B | held | 2.5 | 3.5 | 4.4 | 5.1 | 5.5 |" in page and "does not fit: " in page
    assert page.count("\n| rollout on the CPU |") == 6 and "| decode step |" in page
    first = result["validation"][0]
    assert f"| {first['ratio']:.2f} |" in page and "Projected, not measured" in page
    monkeypatch.setattr(sys, "argv", ["step_model", "--zero", "1"])
    with pytest.raises(SystemExit):
        step_model.main()
    assert "zero must be 0, 2 or 3" in capsys.readouterr().err
