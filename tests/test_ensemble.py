"""The scheduler of rewards: order, micro-batches, what does not apply, threads, offload, errors; rewards by name."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import gpu
from torch import Tensor, nn

from bicot.rewards import worker as workers
from bicot.rewards.base import Example
from bicot.rewards.config import RewardConfig, load_reward
from bicot.rewards.ensemble import RewardEnsemble, RewardHandle
from bicot.rewards.worker import Placement, RewardError

NAN = float("nan")
EXAMPLES = [Example("a cat", "object", nouns=("cat",)), Example("two dogs", "numeracy")]
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Constant:
    def __init__(self, name: str, *values: float) -> None:
        self.name, self.values = name, values

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.tensor(self.values)


class Red:
    """Mean of the red channel; remembers the sizes of its batches."""

    def __init__(self, name: str = "red") -> None:
        self.name, self.batches = name, list[list[str]]()

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.batches.append([example.prompt for example in examples])
        return images[:, 0].mean((1, 2))


class RedObjects(Red):
    """Red, where the task is an object."""

    def applies(self, example: Example) -> bool:
        return example.task_type == "object"


class Failing(Constant):
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        red = images[:, 0].mean((1, 2))
        images.zero_()  # others must not see that
        if any("dogs" in example.prompt for example in examples):
            raise RuntimeError("cannot count dogs")
        return red


class Leaving(Constant):
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        raise SystemExit("bye")


class FailingWhereItApplies(Failing):
    def applies(self, example: Example) -> bool:
        return True


class FailingOnBatches(Constant):
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.zeros(1) if len(examples) == 1 else self.missing  # type: ignore[attr-defined]


class Weighing:
    """The mean of a picture times a weight that it was told."""

    name = "weighing"

    def __init__(self, weight: float, unit: str = "g") -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, weight)

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        assert not torch.is_grad_enabled() and not self.model.training and not self.model.weight.requires_grad
        return self.model(images.mean((1, 2, 3))[:, None])[:, 0]


@pytest.fixture(params=["serial", "threads"])
def schedule(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_scores_weights_and_missing_rewards(schedule: Any) -> None:
    rewards = [Constant("a", 1.0, NAN), Constant("b", 0.5, NAN)]
    ensemble = RewardEnsemble(rewards, [1.0, 2.0], [Constant("m", 9.0, 9.0)], schedule=schedule)
    scores = ensemble.submit(IMAGES, EXAMPLES).result()
    assert ensemble.names == ["a", "b", "m"] and ensemble.weights.tolist() == [1.0, 2.0, 0.0]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.5, 9.0], [NAN, NAN, 9.0]]), equal_nan=True)
    # the monitor neither adds to a reward nor stands in for one
    torch.testing.assert_close(ensemble.total(scores), torch.tensor([2.0, NAN]), equal_nan=True)


def test_handles_of_chunks_in_micro_batches_of_what_applies(schedule: Any) -> None:
    images, examples = torch.rand(7, 3, 4, 4), [*EXAMPLES, *EXAMPLES, EXAMPLES[0], EXAMPLES[0], EXAMPLES[0]]
    everywhere, objects = Red("everywhere"), RedObjects("objects")
    places = {"everywhere": Placement(micro_batch=2), "objects": Placement(micro_batch=3)}
    ensemble = RewardEnsemble([everywhere, objects], placements=places, schedule=schedule)
    handles = [ensemble.submit(images[:6], examples[:6]), ensemble.submit(images[6:], examples[6:])]
    scores = RewardHandle.cat(handles).result()
    red = images[:, 0].mean((1, 2))
    applies = torch.tensor([example.task_type == "object" for example in examples])
    torch.testing.assert_close(scores, torch.stack([red, red.where(applies, NAN)], 1), equal_nan=True)
    assert [len(batch) for batch in everywhere.batches] == [2, 2, 2, 1]
    assert objects.batches == [["a cat"] * 3, ["a cat"], ["a cat"]]


def test_metrics_of_scores() -> None:
    ensemble = RewardEnsemble([Constant("a"), Constant("b")])
    metrics = ensemble.metrics(torch.tensor([[1.0, NAN], [2.0, NAN], [NAN, NAN], [6.0, 4.0]]))
    assert metrics["rewards/a/mean"] == 3.0 and metrics["rewards/a/missing"] == 0.25
    assert metrics["rewards/a/std"] == pytest.approx(math.sqrt(7.0))
    assert metrics["rewards/b/mean"] == 4.0 and metrics["rewards/b/missing"] == 0.75
    assert math.isnan(metrics["rewards/b/std"])


def test_threaded_rewards_run_beside_the_caller() -> None:
    begun, caller_worked = threading.Event(), threading.Event()

    class Waiting(Red):
        def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            begun.set()
            assert caller_worked.wait(60)  # would fail if `submit` waited for the score
            return super().score(images, examples)

    ensemble = RewardEnsemble([Waiting(), Red("beside")], schedule="threads")
    handle = ensemble.submit(IMAGES, EXAMPLES)
    assert begun.wait(60)  # would fail if the score were made in `result`
    caller_worked.set()
    for worker in ensemble.workers:
        worker.thread.submit(int).result()  # type: ignore[union-attr]
    handle.result()  # both were done before anyone asked
    for name in ("red", "beside"):
        assert handle.metrics[f"rewards/{name}/milliseconds"] > 0
        assert handle.metrics[f"rewards/{name}/milliseconds_hidden"] == handle.metrics[f"rewards/{name}/milliseconds"]


def test_serial_rewards_hide_no_time() -> None:
    ensemble = RewardEnsemble([Red(), Red("second")], schedule="serial")
    handle = RewardHandle.cat([ensemble.submit(IMAGES, EXAMPLES), ensemble.submit(IMAGES, EXAMPLES)])
    assert len(handle.result()) == 4
    assert handle.metrics["rewards/second/milliseconds"] > 0
    assert handle.metrics["rewards/second/milliseconds_hidden"] == pytest.approx(0, abs=1e-9)


def test_scores_are_made_once(schedule: Any) -> None:
    reward = Red()
    handle = RewardEnsemble([reward], schedule=schedule).submit(IMAGES, EXAMPLES)
    assert torch.equal(handle.result(), handle.result()) and len(reward.batches) == 1


def test_auto_is_serial_on_a_cpu() -> None:
    assert [worker.thread for worker in RewardEnsemble([Red()]).workers] == [None]


@pytest.mark.parametrize(
    ("reward", "message", "picture"),
    [
        (Failing("broken"), r"reward 'broken' failed on 'two dogs' \(picture: .*\): RuntimeError: cannot count", 1),
        (FailingOnBatches("big"), r"'big' failed on 2 prompts together \(the first: 'a cat'\), but .* 'missing'", None),
        (Constant("short", 1.0, 2.0, 3.0), r"'short' failed on 'a cat' .*: it returned scores \[3\], expected \[1", 0),
        (Leaving("left"), r"'left' failed on 'a cat' .*: RuntimeError: it called sys.exit\(bye\)", 0),
        (Constant("wild", 1.0, float("inf")), "reward 'wild' failed on 'two dogs' .*: its score is inf", 1),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_named(
    reward: Constant, message: str, picture: int | None, schedule: Any, tmp_path: Path
) -> None:
    ensemble = RewardEnsemble([Red(), reward], schedule=schedule, failures=tmp_path / "out")
    handle = ensemble.submit(IMAGES, EXAMPLES)
    with pytest.raises(RewardError, match=message):
        handle.result()
    saved = tmp_path / "out" / f"failed-{reward.name}.png"
    assert saved.exists() == (picture is not None)
    if picture is not None:
        image = pytest.importorskip("matplotlib.image")
        pixels = torch.from_numpy(image.imread(saved)[..., :3]).permute(2, 0, 1)
        torch.testing.assert_close(pixels, IMAGES[picture], atol=1 / 255, rtol=0)


def test_missing_is_an_error_where_a_reward_says_that_it_applies(tmp_path: Path) -> None:
    class Lost(RedObjects):
        def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return torch.full((len(images),), NAN)

    with pytest.raises(RewardError, match="reward 'red' failed on 'a cat' .*: its score is nan"):
        RewardEnsemble([Lost()], failures=tmp_path).submit(IMAGES, EXAMPLES).result()


def test_a_reward_that_does_not_know_where_it_applies(schedule: Any) -> None:
    class Lost(Red):
        def applies(self, example: Example) -> bool:
            return len(example.nouns[0]) > 2

    with pytest.raises(RewardError, match="reward 'red' cannot say whether it applies to 'two dogs': tuple index"):
        RewardEnsemble([Lost()], schedule=schedule).submit(IMAGES, EXAMPLES).result()


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("kind", [Failing, FailingWhereItApplies])
def test_samples_on_which_a_reward_fails_can_be_skipped(
    schedule: Any, micro_batch: int, kind: type[Constant], tmp_path: Path
) -> None:
    rewards = [kind("broken"), Red()]
    places = {"broken": Placement(micro_batch=micro_batch)}
    ensemble = RewardEnsemble(
        rewards, placements=places, schedule=schedule, on_reward_error="skip", failures=tmp_path
    )  # fmt: skip
    handle = ensemble.submit(IMAGES, EXAMPLES[::-1])
    red = IMAGES[:, 0].mean((1, 2))
    expected = torch.stack([torch.tensor([NAN, red[1]]), red], 1)
    torch.testing.assert_close(handle.result(), expected, equal_nan=True)
    assert handle.metrics["rewards/broken/skipped"] == 1 and handle.metrics["rewards/red/skipped"] == 0
    assert (tmp_path / "failed-broken.png").exists()

    ensemble = RewardEnsemble([Constant("wild", 2.0, float("inf"))], on_reward_error="skip", failures=tmp_path)
    handle = ensemble.submit(IMAGES, EXAMPLES)
    torch.testing.assert_close(handle.result()[:, 0], torch.tensor([2.0, NAN]), equal_nan=True)
    assert handle.metrics["rewards/wild/skipped"] == 1


def test_examples_that_a_reward_cannot_score_are_found_before_a_run() -> None:
    class Choosy(RedObjects):
        def check(self, example: Example) -> None:
            raise ValueError("too small to see")

    for rewards, monitors in (([Red("other"), Choosy()], []), ([Red("other")], [Choosy()])):
        ensemble = RewardEnsemble(rewards, monitors=monitors)
        with pytest.raises(ValueError, match="reward 'red': too small to see"):
            ensemble.check(EXAMPLES[0])
        ensemble.check(EXAMPLES[1])  # to which it does not apply
    RewardEnsemble([Choosy()], on_reward_error="skip").check(EXAMPLES[0])


def test_out_of_memory_is_never_skipped() -> None:
    class Greedy(Red):
        def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    with pytest.raises(RewardError, match="out of memory with 2 pictures: lower its micro_batch.*80 GiB"):
        RewardEnsemble([Greedy()], on_reward_error="skip").submit(IMAGES, EXAMPLES).result()


@pytest.mark.parametrize("offload", [False, True])
def test_models_are_frozen_and_offloaded(schedule: Any, offload: bool) -> None:
    reward = Weighing(3.0)
    ensemble = RewardEnsemble([reward], placements={"weighing": Placement(offload=offload)}, schedule=schedule)
    for _ in range(2):
        scores = ensemble.submit(IMAGES, EXAMPLES).result()
        torch.testing.assert_close(scores[:, 0], 3 * IMAGES.mean((1, 2, 3)))
    assert reward.model.weight.item() == 3.0
    with pytest.raises(ValueError, match="reward 'red' has no `model`, a torch module, to offload"):
        RewardEnsemble([Red()], placements={"red": Placement(offload=True)})


@pytest.mark.parametrize(("own", "used"), [("cuda:2", "cuda:2"), ("cpu", "cuda:1")])
def test_a_reward_thread_uses_its_gpu_or_that_of_the_run(own: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never GPU 0 by default: each rank would open a second CUDA context there."""
    seen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(workers, "_device", lambda name, reward: torch.device(name))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    options: dict[str, Any] = {"threads": True, "on_error": "raise", "failures": None}
    thread = workers.Worker(Red(), Placement(device=own), device="cuda:1", **options).thread
    assert thread and thread.submit(lambda: list(seen)).result() == [("reward-red_0", torch.device(used))]


@gpu
@pytest.mark.parametrize("offload", [False, True])
def test_rewards_on_a_gpu(schedule: Any, offload: bool) -> None:
    images = IMAGES.to("cuda")
    rewards, places = [Weighing(3.0), Red()], {"weighing": Placement(offload=offload), "red": Placement(device="cpu")}
    ensemble = RewardEnsemble(rewards, placements=places, device="cuda", schedule=schedule)
    for _ in range(2):
        spin = torch.cuda.Stream()
        with torch.cuda.stream(spin):
            torch.cuda._sleep(50_000_000)  # the pictures come late: scores made before them would be zeros
            late = torch.zeros_like(images).copy_(images)
            handle = ensemble.submit(late, EXAMPLES)
            scores = handle.result()
        expected = torch.stack([3 * images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], 1)
        torch.testing.assert_close(scores, expected.cpu())
    assert rewards[0].model.weight.is_cuda != offload  # type: ignore[attr-defined]


def test_a_model_that_is_no_module_is_left_alone() -> None:
    """It may be the name of one on a server."""
    reward = Red()
    reward.model = "gpt-4o"  # type: ignore[attr-defined]
    assert RewardEnsemble([reward]).submit(IMAGES, EXAMPLES).result().shape == (2, 1)


def test_bad_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="two rewards have the name 'a'"):
        RewardEnsemble([Constant("a", 1.0)], None, [Constant("a", 1.0)])
    for device in ("nowhere", "cuda:63"):
        with pytest.raises(ValueError, match=f"reward 'red' cannot use device '{device}'"):
            RewardEnsemble([Red()], placements={"red": Placement(device=device)})
    for wrong in (0, "many", 2.5):
        with pytest.raises(ValueError, match=f"micro_batch={wrong!r} must be at least 1, or auto"):
            Placement(micro_batch=wrong)
    assert Placement(micro_batch="auto") == Placement(micro_batch=16)


MODULE = """
class Brightness:
    name = "brightness"
    def __init__(self, scale=1.0):
        self.scale = scale
    def score(self, images, examples):
        return self.scale * images.mean((1, 2, 3))
ready = Brightness()
number = 3
def broken(images, examples):
    raise KeyError("no such noun")
def bright(images, examples, *, scale=1.0):
    return scale * images.mean((1, 2, 3))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ensemble_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "ensemble_rewards"


def test_rewards_by_dotted_path(module: str) -> None:
    for name in ("Brightness", "ready", "bright"):
        reward = load_reward(f"{module}:{name}")
        scores = RewardEnsemble([reward]).submit(IMAGES, EXAMPLES).result()
        torch.testing.assert_close(scores[:, 0], IMAGES.mean((1, 2, 3)))
        assert reward.name == ("bright" if name == "bright" else "brightness")
    for name, message in [
        (f"{module}:Darkness", "cannot be imported: module 'ensemble_rewards' has no attribute 'Darkness'"),
        ("no_such_module:X", "cannot be imported: No module named 'no_such_module'"),
        (f"{module}:number", "needs a `name` and a `score"),
        ("hpsv9", "unknown reward 'hpsv9'; did you mean 'hps'.; built in are git, grounding, hps, orm, plan, scene"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(name)


def test_a_reward_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python train.py` and torchrun put the script's folder on the path in its stead."""
    (tmp_path / "reward_lying_here.py").write_text(MODULE + "import helper_lying_here\n")
    (tmp_path / "helper_lying_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    assert load_reward("reward_lying_here:Brightness").name == "brightness"
    (tmp_path / "json.py").write_text("raise RuntimeError('hides what is installed')")
    with pytest.raises(ValueError, match="module 'json' has no attribute 'X'"):
        load_reward("json:X")
    with pytest.raises(ValueError, match=f"looked in {tmp_path} too"):
        load_reward("no_such_module:X")


def test_options(module: str, tmp_path: Path) -> None:
    names = [f"{module}:Brightness", f"{module}:bright"]
    config = RewardConfig(
        ",".join(names), options={names[0]: {"scale": 2.0, "micro_batch": 1}, names[1]: {"scale": 3.0}}
    )
    ensemble = config.build([1.0, 0.5])
    scores = ensemble.submit(IMAGES, EXAMPLES).result()
    mean = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(scores, torch.stack([2 * mean, 3 * mean], 1))
    torch.testing.assert_close(ensemble.total(scores), 3.5 * mean)
    assert [worker.micro_batch for worker in ensemble.workers] == [1, 16]
    config = RewardConfig([f"{module}:broken"], schedule="threads", on_reward_error="skip")
    ensemble = config.build(failures=tmp_path / "out")
    assert ensemble.submit(IMAGES, EXAMPLES).result().isnan().all() and ensemble.workers[0].thread
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failed-broken.png"]
    for name, options, message in [
        (
            names[0],
            {"size": 1},
            r"'ensemble_rewards:Brightness': got an unexpected .*'size'; it takes \(scale=1.0\), and .* micro_batch",
        ),
        (names[1], {"size": 1}, "'ensemble_rewards:bright': got an unexpected keyword argument 'size'"),
        (f"{module}:ready", {"scale": 1}, "is an object, which takes no options: scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardConfig([name], options={name: options}).build()
    with pytest.raises(ValueError, match="rewards.options has 'scenes', which is no reward; did you mean 'scene'?"):
        RewardConfig("scene", options={"scenes": {}, "hps": {}})
    with pytest.raises(ValueError, match="rewards.options has 'x', which is no reward"):
        RewardConfig(options={"x": {}})
