"""How the command line shows an error or a signal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..rewards.worker import RewardError
from .distributed import RankLost
from .output import OutputInUse


@contextmanager
def one_line_errors(words: Sequence[str], go_on: str = "") -> Iterator[None]:
    """An error that its message explains ends the program with that line and exit status 1; with `--debug` among the
    words of the command line, and for any other exception, Python shows where it came from. SIGTERM and SIGINT end it
    with one line too: `go_on` says how to continue."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, RewardError, OutputInUse, RankLost) as error:
        if "--debug" in words:
            raise
        sys.exit(f"error: {error} (--debug shows where)")
    except KeyboardInterrupt as stop:
        name = str(stop) or "SIGINT"
        print(f"\nstopped by {name}{go_on}", file=sys.stderr)
        sys.exit(128 + signal.Signals[name])


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that ends what runs, as Ctrl-C does, and says which signal it was."""
    raise KeyboardInterrupt(signal.Signals(number).name)
