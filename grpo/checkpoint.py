"""Checkpoints: a Hugging Face folder plus what the trainer needs to go on as if it had never stopped.

    output_dir/checkpoint-000050/   config.json, model.safetensors, tokenizer files …   (load it like any Janus model)
                                    bicot.json            (how to prompt and sample it)
                                    trainer_state.pt                                    (step, optimizer, schedule)

A checkpoint appears under its name only when it is whole. Sampling and data order are functions of (seed, step), so
no generator state is stored.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from ..model.policy import Policy
from ..model.settings import RolloutSettings
from .optim import MasterAdamW

STATE = "trainer_state.pt"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in output_dir.glob(f"checkpoint-*/{STATE}"))


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means; None = start anew.

    Raises:
        FileNotFoundError: `resume` names a folder without a trainer state.
    """
    if resume is None:
        return None
    if resume == "auto":
        return next(reversed(list_checkpoints(output_dir)), None)
    if not (Path(resume) / STATE).is_file():
        raise FileNotFoundError(f"resume={resume!r}: no {STATE} there; give a checkpoint folder of a run, or auto")
    return Path(resume)


def save_checkpoint(
    output_dir: Path,
    step: int,
    policy: Policy,
    settings: RolloutSettings,
    optimizer: MasterAdamW,
    seconds: float,
    keep: int | None,
) -> Path:
    """Write checkpoint `step`, then drop the oldest beyond `keep`."""
    target = output_dir / f"checkpoint-{step:06d}"
    partial = output_dir / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save_pretrained(partial)
    settings.save(partial)
    torch.save({"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}, partial / STATE)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return target


def load_state(checkpoint: Path, optimizer: MasterAdamW) -> tuple[int, float]:
    """Restore the optimizer -> (steps done, seconds spent). The weights come from `load_policy(checkpoint)`."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`: a run that died between checkpoints writes them again."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{row}\n" for row in rows))
