"""Fixtures that every test file may ask for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from bounds import checked_bounds
from tiny import tiny_policy

from bicot.kernels.dispatch import INTERPRETED
from bicot.model.policy import Policy

if INTERPRETED:

    @pytest.fixture(autouse=True)
    def _bounds() -> Iterator[None]:
        """A GPU stops the whole process at an access out of bounds; the interpreter would not notice."""
        with checked_bounds():
            yield


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


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


if os.environ.get("CI") and importlib.util.find_spec("hypothesis"):  # tests for a GPU come without it
    from hypothesis import settings

    # the same examples every time: a change is judged by what it changes, and new examples are found at one's desk
    settings.register_profile("ci", derandomize=True)
    settings.load_profile("ci")
