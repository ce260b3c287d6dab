"""Fixtures that every test file may ask for."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bounds import checked_bounds
from oracle import IMPLEMENTATIONS, poisoned_outputs
from tiny import tiny_policy

from bicot.kernels.dispatch import INTERPRETED
from bicot.model.policy import Policy

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it; tests send it

if INTERPRETED:

    @pytest.fixture(autouse=True)
    def _bounds() -> Iterator[None]:
        """A GPU stops the whole process at an access out of bounds; the interpreter would not notice."""
        with checked_bounds():
            yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file whose runs take longest goes first. If it came last, the other processes would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_zero.py")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A kernel that breaks CUDA fails its own test, and not the next ones: pytest-xdist replaces an ended process."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # for the other processes
        except RuntimeError:
            if os.environ.get("PYTEST_XDIST_WORKER"):
                os._exit(1)
            raise


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation of a kernel that can run here, unless a test has its own list."""
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poisoned_outputs():
        yield


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


REDNESS = """
class Redness:
    name = "redness"
    def score(self, images, examples):
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what a run needs: a tiny model, prompts, and a reward module that can be imported."""
    folder = tmp_path_factory.mktemp("job")
    tiny_policy(seed=5).save_pretrained(folder / "model")
    rows = [
        {"prompt": f"a {colour} {shape} and w{i}", "task_type": "color" if i % 2 else "object"}
        for i, (colour, shape) in enumerate([("red", "circle"), ("blue", "square")] * 4)
    ]
    for name, count in (("train", len(rows)), ("heldout", 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    (folder / "redness.py").write_text(REDNESS)
    (folder / "plan.txt").write_text("plan {}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module of this name and text, which can then be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may lack it
    from hypothesis import settings

    # No deadline: other processes may slow a test down. On CI the same examples every time, so that a failure is the
    # fault of the change.
    settings.register_profile("bicot", deadline=None, derandomize=bool(os.environ.get("CI")))
    settings.load_profile("bicot")
