"""Writes rollouts to files and reads them. Each rank writes what a step trains on, and a replay reads it again.

    DIR/step-000001-rank-0.safetensors

holds the samples of one rank in order: prompts, plans and image prompts (ids, and the offset of each sequence), image
tokens [S, T], the log-probs of sampling, whether a plan was cut off [S], scores [S, R] (NaN = no score), and on request
the pictures [S, 3, H, W] as uint8. The file's header has, as JSON, the texts of the plans, the examples, and the names
of the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..model.chunk import RolloutChunk
from ..model.packed import Packed
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble, RewardHandle
from ..rewards.worker import Scored
from .data import parse_example
from .distributed import Ranks
from .files import whole
from .output import require_writable

_PACKED = ("prompts", "plans", "plan_logprobs", "image_prompts")
_TENSORS = ("truncated", "image_tokens", "image_logprobs", "guided_logprobs")
_ON_DEVICE = {"plan_logprobs", "image_tokens", "image_logprobs", "guided_logprobs"}


@dataclass(frozen=True)
class SavedRollout:
    """The samples of one rank in one step, with their scores.

    Args:
        rollout: the samples. Without pictures its `images` is empty, [S, 0, 0, 0].
        examples: [S] the example of each sample, with its plan.
        scores: [S, R] float32 on the CPU; NaN = no score.
        trained, monitored: names of the R rewards, in this order.
        ranks: number of ranks, each of which has a file for this step.
    """

    rollout: RolloutChunk
    examples: list[Example]
    scores: Tensor
    trained: list[str]
    monitored: list[str]
    ranks: int


def path_of(folder: Path, step: int, rank: int) -> Path:
    """The file of a rank and a step, which is counted from 1."""
    return folder / f"step-{step:06d}-rank-{rank}.safetensors"


def require_room(folder: Path, resumes: bool) -> None:
    """Check that the folder can take the rollouts of a run. One that resumes may replace its own.

    Raises:
        FileExistsError: a new run would mix its rollouts with those of another one.
        OSError: the folder cannot be written.
    """
    require_writable(folder, "save_rollouts")
    if not resumes and (found := next(folder.glob("step-*-rank-*.safetensors"), None)):
        raise FileExistsError(
            f"save_rollouts: {folder} has rollouts of another run ({found.name}); give another folder"
        )


def save_rollout(path: Path, saved: SavedRollout, images: bool) -> None:
    """Write the file, with the pictures if `images` is true. If this is interrupted, there is no file."""
    rollout, tensors = saved.rollout, {"scores": saved.scores}
    for name in _PACKED:
        packed = getattr(rollout, name)
        tensors |= {name: packed.values, f"{name}.offsets": packed.offsets}
    tensors |= {name: getattr(rollout, name) for name in _TENSORS}
    if images:
        tensors["images"] = rollout.images.mul(255).round().byte()
    header = {
        "plan_texts": rollout.plan_texts,
        "examples": [example.as_line() for example in saved.examples],
        "trained": saved.trained,
        "monitored": saved.monitored,
        "ranks": saved.ranks,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as part:
        save_file(on_host, part, {name: json.dumps(value) for name, value in header.items()})


def load_rollout(path: Path, device: torch.device) -> SavedRollout:
    """Read what `save_rollout` wrote. Its tensors are where a new rollout has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no rollout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --save_rollouts writes the rollout of each step and rank")
    try:
        with safe_open(path, "pt") as file:
            header = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, `file` is no dict
        tensors |= {name: tensors[name].to(device) for name in _ON_DEVICE}
        packed: dict[str, Any] = {name: Packed(tensors[name], tensors[f"{name}.offsets"]) for name in _PACKED}
        plain = {name: tensors[name] for name in _TENSORS}
        texts, rows = header["plan_texts"], header["examples"]
        examples = [replace(parse_example(row), plan=plan) for row, plan in zip(rows, texts, strict=True)]
        images = tensors["images"].to(device).float().div(255) if "images" in tensors else None
        if images is None:
            images = torch.empty(len(texts), 0, 0, 0, device=device)
        rollout = RolloutChunk(plan_texts=texts, images=images, spans=(), **packed, **plain)
        names = header["trained"], header["monitored"]
        return SavedRollout(rollout, examples, tensors["scores"], *names, header["ranks"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of --save_rollouts: {type(error).__name__}: {error}") from error


class Replay:
    """Reads saved rollouts from a folder, instead of an engine and rewards.

    Args:
        steps: the steps that the run will ask for, counted from 1.
        samples: number of samples of a rank in a step.
        weights: weights of the rewards that are trained on; None = all 1.

    Raises:
        FileNotFoundError: the file of a step is missing.
        ValueError: the first file holds no rollout, or has another number of ranks, samples or rewards.
    """

    def __init__(
        self, folder: Path, steps: Sequence[int], ranks: Ranks, samples: int, weights: Sequence[float] | None
    ) -> None:
        self.folder, self.ranks, self.samples = folder, ranks, samples
        for step in steps:
            if not (path := path_of(folder, step, ranks.rank)).is_file():
                raise FileNotFoundError(f"replay={str(folder)!r}: {path.name} is missing; --save_rollouts writes it")
        first = self.load(steps[0] if steps else 1)
        if weights is not None and len(weights) != len(first.trained):
            raise ValueError(f"reward_weights has {len(weights)} entries, {folder} has rewards {first.trained}")
        self.ensemble = RewardEnsemble.of_names(first.trained, weights, first.monitored)

    def load(self, step: int) -> SavedRollout:
        """Read this rank's samples of a step."""
        path = path_of(self.folder, step, self.ranks.rank)
        saved = load_rollout(path, self.ranks.device)
        found, asked = (saved.ranks, len(saved.examples)), (self.ranks.size, self.samples)
        if found != asked:
            raise ValueError(
                f"{path} is of {found[0]} ranks with {found[1]} samples each, this run has {asked[0]} with {asked[1]}: "
                "give per_device_train_batch_size, gradient_accumulation_steps and num_generations of the run that "
                "saved it"
            )
        return saved

    def roll_out(self, step: int) -> tuple[RolloutChunk, list[Example], RewardHandle]:
        """What `rollout.roll_out` returned in that step. The scores are ready at once."""
        saved = self.load(step)
        jobs: list[Callable[[], Scored]] = [partial(Scored, values, 0.0, 0.0, 0) for values in saved.scores.unbind(1)]
        handle = RewardHandle([*saved.trained, *saved.monitored], torch.device("cpu"), [jobs])
        return saved.rollout, saved.examples, handle
