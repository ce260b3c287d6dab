"""How the command line shows an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..rewards.worker import RewardError
from .output import OutputInUse


@contextmanager
def one_line_errors(words: Sequence[str]) -> Iterator[None]:
    """An error that its message explains ends the program with that line and exit status 1; with `--debug` among the
    words of the command line, and for any other exception, Python shows where it came from."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, RewardError, OutputInUse) as error:
        if "--debug" in words:
            raise
        sys.exit(f"error: {error} (--debug shows where)")
