"""The bar: one line of at most 100 columns, and what others say stands above it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.tracking import Log

METRICS = {"reward": -12.3456, "kl": 123.4567, "entropy": 12.3456, "loss": 0.1}
METRICS |= {f"reward_by_task/a task type with a long name {i}": 0.5 for i in range(9)}
METRICS |= {f"seconds/phase {i}": 12.3 for i in range(9)}


def screen(text: str) -> list[str]:
    """What a terminal shows: a carriage return goes back to the beginning of the line, and overwrites."""
    shown = []
    for line in text.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        shown.append(cells.rstrip())
    return shown


@pytest.mark.parametrize("terminal", [60, 80, 300])
def test_the_bar_fits(
    terminal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(terminal))
    config = Config(rewards=RewardConfig("scene"), output_dir=str(tmp_path), max_steps=1_000_000)
    log = Log(config, 123_456)
    for metrics in (METRICS, {"entropy": 1.0}):
        log.write(123_457, metrics)
        log.bar.refresh()
    log.close()
    bars = re.split("[\r\n]", capsys.readouterr().err)
    assert max(map(len, bars)) <= min(terminal, 100)
    assert terminal < 100 or any("reward -12.346 kl 123.4567 entropy 12.35" in bar for bar in bars)
    assert terminal < 100 or any("no reward applies entropy 1.00" in bar for bar in bars)


CHATTER = """
import logging, sys, warnings
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler(sys.stdout))
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.tracking import Log

streams = sys.stdout, sys.stderr
log = Log(Config(rewards=RewardConfig("scene"), output_dir=sys.argv[1], max_steps=3), 0)
for step in (1, 2, 3):
    print("printed", end=" ")
    print("in two parts")
    early.warning("logged by a handler from before")
    transformers_logging.get_logger("transformers.models").warning("warned by transformers")
    warnings.warn(f"warned by Python {step}")
    from deepspeed.accelerator import real_accelerator
    real_accelerator.accel_logger.warning("warned by DeepSpeed")
    for _ in tqdm(range(2), desc="Loading weights", mininterval=0):
        pass
    log.write(step, {"entropy": 1.0})
    log.bar.refresh()
print("begun", end="")
log.close()
assert (sys.stdout, sys.stderr) == streams and early.handlers[0].stream is sys.stdout
early.warning("after the run")
"""


def test_what_others_say_does_not_break_the_bar(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    done = subprocess.run(
        [sys.executable, "-c", CHATTER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        check=True,
    )  # fmt: skip
    lines = screen(done.stdout.decode())  # text=True would make line ends of carriage returns
    said = ["printed in two parts", "logged by a handler from before", "warned by transformers", "warned by Python"]
    for words in (*said, "warned by DeepSpeed"):
        found = [line for line in lines if words in line]
        assert len(found) == 3 and not any("step/s" in line for line in found), (words, lines)
    assert all(line in lines for line in (*said[:2], "begun", "after the run"))
    bars = [line for line in lines if "%" in line]
    assert len(bars) == 4 and all("Loading weights: 100%" in bar and "2/2" in bar for bar in bars[:3])
    assert "3/3" in bars[3] and "entropy 1.00" in bars[3]
