"""Fixtures that every test file may ask for."""

from __future__ import annotations

import importlib.util
import os

import pytest
from tiny import tiny_policy

from bicot.model.policy import Policy


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


if os.environ.get("CI") and importlib.util.find_spec("hypothesis"):  # tests for a GPU come without it
    from hypothesis import settings

    # the same examples every time: a change is judged by what it changes, and new examples are found at one's desk
    settings.register_profile("ci", derandomize=True)
    settings.load_profile("ci")
