"""Fixtures that every test file may ask for."""

from __future__ import annotations

import pytest
from tiny import tiny_policy

from bicot.model.policy import Policy


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()
