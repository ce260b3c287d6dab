"""Files that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end the file is on the disk, and takes `path`'s name."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")  # NumPy and matplotlib read the suffix
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
