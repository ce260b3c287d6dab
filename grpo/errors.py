"""How the command line shows an error or a signal."""

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
    """A wrong option is one line that names the nearest right one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {with_nearest(message, self._option_string_actions)}\n")


def with_nearest(message: str, options: Iterable[str]) -> str:
    """A parser's message in one line, with the nearest of `options` to each that it does not know."""
    message, known = one_line(message), sorted({option.removeprefix("--") for option in options})
    unrecognized = "unrecognized" in message
    group = re.search(r"Group '([\w.]+)'", message)
    for key in re.findall(r"--([\w.]+)" if unrecognized else r"'([\w.]+)'", message):
        if unrecognized or ("not accept" in message and not (group and key == group[1])):
            full = f"{group[1]}.{key}" if group else key
            near = difflib.get_close_matches(full, known, n=1, cutoff=0.4)
            message += f"; unknown setting {full!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    return message


def one_line(error: object) -> str:
    """What a message says, without its line ends."""
    return " ".join(str(error).split())


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
        sys.exit(f"error: {one_line(error)} (--debug shows where)")
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
