"""Shows errors and signals on the command line in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..rewards.worker import RewardError
from .distributed import RankLost
from .output import OutputInUse


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, which names the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {with_nearest(message, self._option_string_actions)}\n")


def with_nearest(message: str, options: Iterable[str]) -> str:
    """A parser's error message in one line. For each unknown option it adds the nearest of `options`."""
    message, known = one_line(message), sorted({option.removeprefix("--") for option in options})
    unrecognized = "unrecognized" in message
    group = re.search(r"Group '([\w.]+)'", message)
    for key in re.findall(r"--([\w.-]+)" if unrecognized else r"'([\w.]+)'", message):
        if unrecognized or ("not accept" in message and not (group and key == group[1])):
            full = f"{group[1]}.{key}" if group else key
            near = difflib.get_close_matches(full, known, n=1, cutoff=0.4)
            message += f"; unknown setting {full!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    return message


def one_line(error: object) -> str:
    """A message with its line breaks and repeated spaces replaced by single spaces."""
    return " ".join(str(error).split())


@contextmanager
def one_line_errors(words: Sequence[str], go_on: str = "") -> Iterator[None]:
    """Inside this context, expected errors end the program with their message in one line, and exit status 1.

    Other exceptions keep Python's traceback, and with `--debug` among the words of the command line all do. SIGTERM and
    SIGINT end the program with one line, too. `go_on` is added to it, and says how to continue.
    """
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, RewardError, OutputInUse, RankLost) as error:
        if "--debug" in words:
            raise
        sys.exit(f"error: {one_line(error)} (--debug shows where)")
    except KeyboardInterrupt as stop:
        name = str(stop) or "SIGINT"
        print(f"\nstopped by {name}{go_on}", file=sys.stderr)
        sys.exit(128 + signal.Signals[name])


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises KeyboardInterrupt, as Ctrl-C does, with the name of the signal."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside this context, SIGTERM and SIGINT are only collected, so that a step can be finished and saved first."""
    received: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > 1:  # a second signal ends at once, unless torchrun has only repeated a Ctrl-C
            interrupt(number, frame)
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
