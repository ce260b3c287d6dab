"""The output folder of a run. It belongs to one run at a time, and an earlier run is deleted only on request."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import list_checkpoints, step_of
from .config import Config
from .files import METRICS, RUN, SUMMARY, whole

# what a run writes besides its checkpoints
_FILES = (METRICS, SUMMARY, RUN, "report.html", "before_after.png")
_FOLDERS = ("samples",)


class OutputInUse(RuntimeError):
    """Another process has locked the output folder."""


@contextmanager
def locked(output: Path, option: str = "--output_dir") -> Iterator[None]:
    """Lock the folder for this process, and create it if needed. The lock ends with the process, however that ends.

    Raises:
        OutputInUse: another process has locked it.
        OSError: it cannot be written.
    """
    require_writable(output, "output_dir")
    output.mkdir(parents=True, exist_ok=True)
    path = output / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OutputInUse(f"{output} is in use by {holder}: choose another {option}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if not any(other != path for other in output.iterdir()):  # the run was refused before it wrote anything
                path.unlink()
                output.rmdir()


def require_writable(folder: Path, setting: str) -> None:
    """Raises OSError, which names the setting, if no file can be written into the folder, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{setting}: nothing can be written into {folder} ({error.strerror}); give another") from error


def holds_run(output: Path) -> bool:
    return (output / METRICS).exists() or bool(list_checkpoints(output))


def make_room(output: Path, config: Config) -> list[str]:
    """Prepare the folder for a new run -> lines for the user that say what was done with an earlier one.

    Raises:
        FileExistsError: the folder holds an earlier run, and no setting says what to do with it.
    """
    if config.resume == "auto" and not list_checkpoints(output) and not (output / SUMMARY).exists():
        return go_back(output, 0)  # the run ended before its first checkpoint: begin again
    said = []
    if holds_run(output):
        kept = [*(output / name for name in (*_FILES, *_FOLDERS)), *list_checkpoints(output)]
        kept += output.glob("events.out.tfevents.*")  # TensorBoard's
        if config.overwrite_output_dir:
            for path in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif config.move_output_dir:
            target = _free_name(output)
            target.mkdir()
            for path in kept:
                if path.exists():
                    path.rename(target / path.name)
            said.append(f"the earlier run in {output} is now in {target}")
        else:
            raise FileExistsError(
                f"{output} holds an earlier run: continue it with --resume auto, replace it with "
                "--overwrite_output_dir true, or choose another --output_dir"
            )
    return said


def go_back(output: Path, step: int) -> list[str]:
    """Prepare the folder for going on after `step` -> lines for the user that say what was done.

    Metrics after `step` are dropped, since the run writes them again. Later checkpoints are moved away, since they
    would count as newer than those that the run will write.
    """
    said = []
    if later := [path for path in list_checkpoints(output) if step_of(path) > step]:
        target = _free_name(output / f"after-{step:06d}")
        target.mkdir()
        for path in later:
            path.rename(target / path.name)
        names = ", ".join(path.name for path in later)
        said.append(f"going back to step {step}: {names} moved to {target}")
    metrics = output / METRICS
    if metrics.is_file():
        rows, torn = read_metrics(metrics)
        if torn:
            said.append(f"{metrics}: the last line was not whole and is dropped")
        with whole(metrics) as part:
            part.write_text("".join(f"{line}\n" for line, row in rows if row["step"] <= step))
    return said


def read_metrics(path: Path) -> tuple[list[tuple[str, dict[str, float]]], bool]:
    """Read metrics.jsonl -> its lines with their values, and whether an incomplete last line was left out.

    A full disk or a killed process can leave the last line incomplete.

    Raises:
        ValueError: another line does not hold the metrics of a step (`file:line: what is wrong`).
    """
    rows: list[tuple[str, dict[str, float]]] = []
    lines = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if number == len(lines):  # the last line, without a newline
                return rows, True
            raise ValueError(f"{path}:{number}: {error}") from None
        rows.append((line, row))
    return rows, False


def _free_name(path: Path) -> Path:
    """`path`-1, or the first free number."""
    number = 1
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")
