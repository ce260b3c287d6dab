"""Rollouts as files: what a step trains on, written by each rank, and read again in the place of an engine.

    DIR/step-000001-rank-0.safetensors

holds the samples of one rank, in order: prompts, plans and image prompts (ids, and where each row begins), image
tokens [S, T], the log-probs of sampling, whether a plan was cut off [S], scores [S, R] (NaN = none), pictures
[S, 3, H, W] uint8 if they were asked for; and, as JSON in the file's header, the texts of the plans, the examples, and
the names of the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..model.engine import RolloutChunk
from ..model.packed import Packed
from ..rewards.base import Example, NumeracyInfo, SpatialInfo

_PACKED = ("prompts", "plans", "plan_logprobs", "image_prompts")
_TENSORS = ("truncated", "image_tokens", "image_logprobs", "guided_logprobs")


@dataclass(frozen=True)
class Scored:
    """A rank's samples of one step with their scores.

    Args:
        rollout: `images` is empty, [S, 0, 0, 0], where none were kept.
        examples: [S], with the plan of each.
        scores: [S, R] float32 on the CPU, NaN = none.
        trained, monitored: names of the R rewards, in this order.
    """

    rollout: RolloutChunk
    examples: list[Example]
    scores: Tensor
    trained: list[str]
    monitored: list[str]


def path_of(folder: Path, step: int, rank: int) -> Path:
    """The file of a step, counted from 1."""
    return folder / f"step-{step:06d}-rank-{rank}.safetensors"


def save_rollout(path: Path, scored: Scored, images: bool) -> None:
    """Write the file, whole or not at all; with the pictures if `images`."""
    rollout, tensors = scored.rollout, {"scores": scored.scores}
    for name in _PACKED:
        packed = getattr(rollout, name)
        tensors |= {name: packed.values, f"{name}.offsets": packed.offsets}
    tensors |= {name: getattr(rollout, name) for name in _TENSORS}
    if images:
        tensors["images"] = rollout.images.mul(255).round().byte()
    header = {
        "plan_texts": rollout.plan_texts,
        "examples": [asdict(replace(example, plan="")) for example in scored.examples],
        "trained": scored.trained,
        "monitored": scored.monitored,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part,
        {name: json.dumps(value) for name, value in header.items()},
    )  # fmt: skip
    part.replace(path)


def load_rollout(path: Path, device: torch.device) -> Scored:
    """What `save_rollout` wrote; the tensors that train are on the device.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --save_rollouts writes the rollout of each step and rank")
    try:
        with safe_open(path, "pt") as file:
            header = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        packed = {n: Packed(tensors[n].to(device), tensors[f"{n}.offsets"]) for n in _PACKED}
        plain = {name: tensors[name].to(device) for name in _TENSORS}
        texts, examples = header["plan_texts"], map(_example, header["examples"], header["plan_texts"])
        images = tensors["images"].to(device).float().div(255) if "images" in tensors else None
        if images is None:
            images = torch.empty(len(texts), 0, 0, 0, device=device)
        rollout = RolloutChunk(plan_texts=texts, images=images, spans=(), **packed, **plain)
        return Scored(rollout, list(examples), tensors["scores"], header["trained"], header["monitored"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no rollout of --save_rollouts: {type(error).__name__}: {error}") from error


def _example(row: dict[str, Any], plan: str) -> Example:
    spatial = row["spatial_info"]
    return Example(
        prompt=row["prompt"],
        task_type=row["task_type"],
        nouns=tuple(row["nouns"]),
        attr_nouns=tuple(row["attr_nouns"]),
        spatial_info=None if spatial is None else SpatialInfo(**spatial),
        numeracy_info=tuple(NumeracyInfo(**item) for item in row["numeracy_info"]),
        metadata=row["metadata"],
        plan=plan,
    )


def check_rollouts(folder: Path, steps: Sequence[int], rank: int) -> None:
    """Raises FileNotFoundError if the file of one of the steps is missing."""
    for step in steps:
        if not (path := path_of(folder, step, rank)).is_file():
            raise FileNotFoundError(f"replay={str(folder)!r}: {path.name} is missing; it is written by --save_rollouts")
