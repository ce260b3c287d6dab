"""How the command line shows an error or a signal."""

from __future__ import annotations

import signal
import sys
import time
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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them: the step in progress is finished and saved."""
    received: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > 1:  # a second one means now; torchrun repeats a Ctrl-C at once
            interrupt(number, frame)
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
