"""The names of a run's files, and files that are complete or absent, even if the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the root folder of the repository
METRICS, SUMMARY, RUN = "metrics.jsonl", "summary.json", "run.json"  # in the output folder of a run


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to. At the end the file is flushed to disk and renamed to `path`."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")  # NumPy and matplotlib need the suffix
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
