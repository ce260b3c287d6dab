"""Checkpoints: a Hugging Face folder plus what the trainer needs to go on as if it had never stopped.

    output_dir/checkpoint-000050/   config.json, model.safetensors, tokenizer files …   (load it like any Janus model)
                                    (a LoRA run: adapter_config.json and adapter_model.safetensors of PEFT instead)
                                    bicot.json            (how to prompt and sample it)
                                    trainer_state.pt      (step, optimizer, schedule)
                                    heldout.jsonl, .npz   (of the best evaluation so far: its samples)
                                    ema/                  (with ema_decay: the same model of averaged weights)
                                    reference/            (with sync_ref_model: the reference model as it stands)
                                    manifest.json         (size and SHA-256 of every file)

A checkpoint appears under its name only when it is whole and on the disk, and is checked against its manifest before a
run goes on from it. What is being written or deleted is named `.checkpoint-000050.partial`; a checkpoint that another
replaces is `.checkpoint-000050.old` until that one has its name. Sampling and data order are functions of (seed, step),
so no generator state is stored. Only folders named `checkpoint-` and a number are ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..model.policy import Policy
from ..model.settings import RolloutSettings
from .files import sync
from .optim import MasterAdamW

STATE = "trainer_state.pt"
MANIFEST = "manifest.json"
# settings that hold for a whole run
FIXED = ("dtype", "freeze", "optim", "seed", "num_generations", "prompts_per_step")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<number>` that hold a trainer state, by rising number."""
    folders = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE}")]
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a numbered checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return output_dir / f"checkpoint-{step:06d}"


def find_checkpoint(resume: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` means (None = start anew), and a line for each damaged one that was passed over.

    Call it on one rank alone: what was half written or half deleted goes, and a checkpoint whose replacement was
    interrupted gets its name back.

    Raises:
        FileNotFoundError: `resume` names a folder without a trainer state.
        ValueError: the folder that `resume` names is damaged, or every checkpoint in `output_dir` is.
    """
    for left in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(left)
    for old in output_dir.glob(".checkpoint-*.old"):
        target = old.with_name(old.stem[1:])
        shutil.rmtree(old) if target.exists() else old.rename(target)
    if resume is None:
        return None, []
    if resume != "auto":
        folder = Path(resume)
        if not (folder / STATE).is_file():
            raise FileNotFoundError(f"resume={resume!r}: no {STATE} there; give a checkpoint folder of a run, or auto")
        if damage := find_damage(folder):
            raise ValueError(f"{damage}; resume from another checkpoint, or with auto from the newest whole one")
        return folder, []
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        if (damage := find_damage(folder)) is None:
            return folder, [f"{line}: going on from {folder}" for line in damaged]
        damaged.append(damage)
    if damaged:
        raise ValueError(f"no checkpoint in {output_dir} is whole: {'; '.join(damaged)}")
    return None, []


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in one line that names folder and file, or None: it is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint} is damaged: {MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{checkpoint} is damaged: {name} is missing"
        if path.stat().st_size != size:
            return f"{checkpoint} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{checkpoint} is damaged: {name} has other contents than were written"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(
    output_dir: Path,
    step: int,
    policy: Policy,
    weights: dict[str, Any] | None,
    settings: RolloutSettings,
    optimizer: dict[str, Any],
    seconds: float,
    run: dict[str, Any],
    keep: int | None,
    best: int | None = None,
    also: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write checkpoint `step` of a run with the settings `run`, then drop the oldest beyond `keep`, but not `best`.

    `weights` are the policy's where ZeRO-3 has sharded its own; `optimizer` is a state; `also` writes what else belongs
    into the folder.
    """
    target = checkpoint_path(output_dir, step)
    partial, replaced = (output_dir / f".{target.name}.{what}" for what in ("partial", "old"))
    for left in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    try:
        policy.save_pretrained(partial, weights, settings)
        also(partial)
        state = {"step": step, "seconds": seconds, "run": run, "optimizer": optimizer}
        torch.save(state, partial / STATE)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = {str(p.relative_to(partial)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
        for path in (*partial.rglob("*"), partial):
            sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        said = "make room, and go on from the one before with --resume auto"
        raise OSError(f"{target} cannot be written ({error}); {said}") from error
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync(output_dir)
    if replaced.exists():
        shutil.rmtree(replaced)
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        if step_of(old) != best:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
    return target


def load_state(
    checkpoint: Path, optimizer: MasterAdamW, run: dict[str, Any], entropy: dict[str, Any]
) -> tuple[int, float, list[str]]:
    """Restore the optimizer -> steps done, seconds spent, and a line about settings that have changed since.

    The weights come from `load_policy(checkpoint)`; `entropy` is the state of an EntropyTarget, and is filled in.

    Raises:
        ValueError: a setting has changed that cannot change within a run (both values are named).
    """
    # mapped, so that ranks of one host share what they read; the optimizer copies what it keeps
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
    changed = {name: (old, run[name]) for name, old in state["run"].items() if name in run and run[name] != old}
    for name in FIXED + LORA:
        if name in changed:
            old, new = changed[name]
            raise ValueError(f"{checkpoint} was trained with {name} {old!r}, which cannot become {new!r} within a run")
    optimizer.load_state_dict(state["optimizer"])
    entropy |= state["optimizer"].get("entropy", {})
    said = ", ".join(f"{name} {new!r} instead of {old!r}" for name, (old, new) in changed.items())
    return state["step"], state["seconds"], [f"going on with {said}"] if said else []
