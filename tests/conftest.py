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


if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may lack it
    from hypothesis import settings

    # No deadline: other processes may slow a test down. On CI the same examples every time, so that a failure is the
    # fault of the change.
    settings.register_profile("bicot", deadline=None, derandomize=bool(os.environ.get("CI")))
    settings.load_profile("bicot")
