"""examples/reward_server.py in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import ROOT

SERVED = """
class Everything:
    name = "everything"
    def applies(self, example):
        return example.task_type != "non"
    def score(self, images, examples):
        if any("fails" in example.prompt for example in examples):
            raise KeyError("no such noun")
        weights = [1 + len(e.plan) + e.metadata.get("weight", 0) + len(e.nouns) for e in examples]
        return images.std((1, 2, 3)) / images.new_tensor(weights)
"""


@contextmanager
def example_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """examples/reward_server.py at work, with the reward `Everything` -> its url, its process."""
    (folder / "served.py").write_text(SERVED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    command = [sys.executable, str(ROOT / "examples" / "reward_server.py"), "served:Everything", "--port", "0"]
    with subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()
