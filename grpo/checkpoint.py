"""A checkpoint is a model folder in Hugging Face layout, with all that a run needs to go on as if it had never stopped.

    output_dir/checkpoint-000050/   config.json, model.safetensors, tokenizer files …   (loads like any Janus model)
                                    (with LoRA: PEFT's adapter_config.json, adapter_model.safetensors)
                                    bicot.json            (its prompt texts and sampling settings)
                                    trainer_state.pt      (step, optimizer, schedule)
                                    heldout.jsonl, .npz   (in the best checkpoint: its held-out samples)
                                    ema/                  (with ema_decay: the model with averaged weights)
                                    reference/            (with sync_ref_model: the reference model)
                                    manifest.json         (size and SHA-256 of every file)

A checkpoint gets its name only when all of it is on the disk. It is checked against its manifest before a run continues
from it. While a checkpoint is written or deleted, its name is `.checkpoint-000050.partial`. While one is replaced, the
old one is named `.checkpoint-000050.old`. Sampling and data order are functions of (seed, step), so no random
state is stored. Only folders named `checkpoint-` and a number are ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..model.policy import Policy
from ..model.settings import RolloutSettings
from .config import Config
from .files import sync
from .optim import MasterAdamW

STATE = "trainer_state.pt"
MANIFEST = "manifest.json"
# settings that cannot change within a run
FIXED = ("dtype", "freeze", "optim", "seed", "num_generations", "prompts_per_step")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
# settings that a checkpoint does not remember: where a run writes, how often, and when it ends
_OF_OUTPUT = {"output_dir", "overwrite_output_dir", "move_output_dir", "resume", "save_steps", "save_total_limit"}
_OF_OUTPUT |= {"sample_steps", "profile", "report_to", "stop_after", "save_rollouts", "save_rollout_images", "replay"}
_OF_OUTPUT |= {"push_to_hub", "hub_model_id", "hub_private_repo"}


def run_settings(config: Config, num_ranks: int) -> dict[str, Any]:
    """The settings that a checkpoint remembers, and the number of prompts in a step."""
    settings = {name: value for name, value in asdict(config).items() if name not in _OF_OUTPUT}
    # how a step's prompts are divided among micro-batches and ranks may change
    for name in ("micro_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"):
        del settings[name]
    return settings | {"prompts_per_step": config.prompts_per_device * num_ranks}


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named `checkpoint-<number>` that hold a trainer state, in the order of their numbers."""
    folders = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE}")]
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step number in the name of a checkpoint."""
    number = checkpoint.name.removeprefix("checkpoint-")
    if not number.isdigit():
        raise ValueError(f"{checkpoint} must be named checkpoint-<step>, as it was written")
    return int(number)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return output_dir / f"checkpoint-{step:06d}"


def find_checkpoint(resume: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` means (None = a new run), and a line for each damaged one that was skipped.

    Call this on one rank only, since it also cleans up: it deletes checkpoints that were half written or half deleted,
    and gives a checkpoint its name back if replacing it was interrupted.

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
            return folder, [f"{line}: continuing from {folder}" for line in damaged]
        damaged.append(damage)
    if damaged:
        raise ValueError(f"every checkpoint in {output_dir} is damaged: {'; '.join(damaged)}; give another --resume")
    return None, []


def find_damage(checkpoint: Path) -> str | None:
    """What is damaged in a checkpoint, in one line that names folder and file; None if nothing is."""
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Write the checkpoint of a step, then delete the oldest ones.

    Args:
        weights: the policy's full weights if ZeRO-3 has sharded them, otherwise None.
        settings: prompt texts and sampling settings of the policy.
        optimizer: the optimizer's `state_dict()`.
        seconds: training time so far.
        run: the settings that the checkpoint remembers, from `run_settings`.
        keep: number of newest checkpoints to keep; None = all.
        best: step of a checkpoint that is never deleted.
        also: writes more files into the folder.
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
        said = "make room, and continue from the previous checkpoint with --resume auto"
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
    """Restore the optimizer -> steps done, seconds spent, and a line about settings that have changed.

    The weights are not restored here but come from `load_policy(checkpoint)`.

    Args:
        run: the settings of now, from `run_settings`.
        entropy: the state of an EntropyTarget, which is filled in.

    Raises:
        ValueError: a setting has changed that cannot change within a run. Both values are named.
    """
    # memory-mapped, so that the ranks of a host share one copy; the optimizer copies what it keeps
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
    changed = {name: (old, run[name]) for name, old in state["run"].items() if name in run and run[name] != old}
    for name in FIXED + LORA:
        if name in changed:
            old, new = changed[name]
            raise ValueError(f"{checkpoint} was trained with {name} {old!r}, which cannot become {new!r} within a run")
    optimizer.load_state_dict(state["optimizer"])
    entropy |= state["optimizer"].get("entropy", {})
    said = ", ".join(f"{name} {new!r} instead of {old!r}" for name, (old, new) in changed.items())
    return state["step"], state["seconds"], [f"continuing with {said}"] if said else []
