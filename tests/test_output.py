"""The output folder: what belongs to a run is found by its exact name, locked, moved or refused, and never lost."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bicot.grpo.checkpoint import MANIFEST, STATE, find_checkpoint, find_damage, list_checkpoints
from bicot.grpo.config import Config
from bicot.grpo.output import go_back, locked, make_room, read_metrics
from bicot.rewards.config import RewardConfig


def config(**settings: object) -> Config:
    return Config(rewards=RewardConfig(["scene"]), **settings)  # type: ignore[arg-type]


def checkpoint(folder: Path, name: str) -> Path:
    """A folder with a state and a manifest that fits it."""
    path = folder / name
    path.mkdir(parents=True)
    (path / STATE).write_bytes(b"state of " + name.encode())
    entry = {"size": (path / STATE).stat().st_size, "sha256": hashlib.sha256((path / STATE).read_bytes()).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"files": {STATE: entry}}))
    return path


def test_numbered_checkpoints_alone_count_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-000004-backup", "checkpoint-999999", "checkpoint-1000000"):
        checkpoint(tmp_path, name)
    (tmp_path / "checkpoint-2000000").mkdir()  # no state: a kill left it
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-999999", "checkpoint-1000000"]
    assert find_checkpoint("auto", tmp_path) == (tmp_path / "checkpoint-1000000", [])


DAMAGES = {
    "emptied": (lambda path: (path / STATE).write_bytes(b""), "trainer_state.pt has 0 bytes instead of 26"),
    "cut": (lambda path: os.truncate(path / STATE, 9), "trainer_state.pt has 9 bytes instead of 26"),
    "zeros": (lambda path: (path / STATE).write_bytes(bytes(26)), "trainer_state.pt has other contents than"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json cannot be read"),
    "torn manifest": (lambda path: os.truncate(path / MANIFEST, 20), "manifest.json cannot be read"),
    "another manifest": (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage: str, tmp_path: Path) -> None:
    whole, newest = checkpoint(tmp_path, "checkpoint-000003"), checkpoint(tmp_path, "checkpoint-000004")
    assert find_damage(newest) is None
    do, words = DAMAGES[damage]
    do(newest)
    found, (line,) = find_checkpoint("auto", tmp_path)
    assert (
        found == whole
        and line.startswith(f"{newest} is damaged: {words}")
        and line.endswith(f"continuing from {whole}")
    )
    with pytest.raises(ValueError, match=f"checkpoint-000004 is damaged: {words}"):
        find_checkpoint(str(newest), tmp_path)
    (whole / MANIFEST).unlink()
    with pytest.raises(ValueError, match=f"every checkpoint in {tmp_path} is damaged: .*000004 .*000003"):
        find_checkpoint("auto", tmp_path)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "checkpoint-000001")
    (path / MANIFEST).write_text(json.dumps({"files": {"model.safetensors": {"size": 1, "sha256": ""}}}))
    assert find_damage(path) == f"{path} is damaged: model.safetensors is missing"


OTHER_RUN = """
import sys
from pathlib import Path
from bicot.grpo.output import OutputInUse, locked
try:
    with locked(Path(sys.argv[1])):
        sys.exit("not refused")
except OutputInUse as error:
    print(error, flush=True)
input()
with locked(Path(sys.argv[1])):
    print("released")
"""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", OTHER_RUN, str(output)]
    with locked(output):
        (output / "metrics.jsonl").write_text("")
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        said = other.stdout.readline()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"{output} is in use by {holder}: choose another --output_dir" in said
    assert other.communicate("\n", timeout=120)[0] == "released\n" and other.returncode == 0
    assert (output / "metrics.jsonl").exists()
    with locked(tmp_path / "refused"):
        pass
    assert not (tmp_path / "refused").exists(), "a run that wrote nothing leaves nothing"


TENSORBOARD = "events.out.tfevents.1790000000.host.1.0"


def earlier_run(output: Path) -> None:
    checkpoint(output, "checkpoint-000002")
    checkpoint(output, "checkpoint-best")
    (output / "samples").mkdir()
    for name in ("metrics.jsonl", "summary.json", "report.html", "before_after.png", TENSORBOARD, "notes.txt"):
        (output / name).write_text("1")


OF_A_RUN = {"checkpoint-000002", "samples", "metrics.jsonl", "summary.json", "report.html", "before_after.png"}
OF_A_RUN |= {TENSORBOARD}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_earlier_run_is_refused_moved_or_replaced(tmp_path: Path) -> None:
    output = tmp_path / "toy"
    earlier_run(output)
    with pytest.raises(FileExistsError, match=r"--resume auto.*--overwrite_output_dir true"):
        make_room(output, config())
    assert names(output) == OF_A_RUN | {"checkpoint-best", "notes.txt"}
    for number in (1, 2):
        assert make_room(output, config(move_output_dir=True)) == [
            f"the earlier run in {output} is now in {tmp_path / f'toy-{number}'}"
        ]
        assert names(tmp_path / f"toy-{number}") == OF_A_RUN
        assert names(output) == {"checkpoint-best", "notes.txt"}, "what is not of the run stays where it is"
        (output / "checkpoint-best").rename(tmp_path / f"best-{number}")
        earlier_run(output)
    assert make_room(output, config(overwrite_output_dir=True)) == []
    assert names(output) == {"checkpoint-best", "notes.txt"}, "a stale report goes, what has another name stays"
    assert make_room(output, config()) == []


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    row = '{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    with pytest.raises(FileExistsError):
        make_room(tmp_path, config())
    assert make_room(tmp_path, config(resume="auto")) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    for name, text in (("metrics.jsonl", row), ("summary.json", "{}")):
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError):  # that run ended as it should
        make_room(tmp_path, config(resume="auto"))
    assert (tmp_path / "metrics.jsonl").read_text() == row


def test_going_back_moves_later_checkpoints_aside(tmp_path: Path) -> None:
    for name in ("checkpoint-000002", "checkpoint-000004", "checkpoint-000006", "checkpoint-best"):
        checkpoint(tmp_path, name)
    (said,) = go_back(tmp_path, 2)
    aside = tmp_path / "after-000002-1"
    assert said == f"going back to step 2: checkpoint-000004, checkpoint-000006 moved to {aside}"
    assert names(aside) == {"checkpoint-000004", "checkpoint-000006"}
    assert names(tmp_path) == {"checkpoint-000002", "checkpoint-best", "after-000002-1"}
    assert go_back(tmp_path, 2) == []


def test_metrics_after_the_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert go_back(tmp_path, 1) == [f"{path}: the last line was not whole and is dropped"]
    assert path.read_text() == '{"step": 1}\n'
    path.write_bytes(b'{"step": 1}\n\xff\xfe')
    assert read_metrics(path) == ([('{"step": 1}', {"step": 1})], True)
    for line, reason in (('{"step": 2, "lo', "Unterminated string"), ("[]", "not an object with a step")):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: {reason}"):
            go_back(tmp_path, 1)
        assert path.read_text().count("\n") == 3, "nothing is lost"
