"""Pictures with all that was drawn for them, one object each: what `Policy.generate` returns.

A picture's random numbers are keyed to its own seed alone: picture k of `generate(..., n, seed)` is the picture of
`generate(..., 1, seed + k)`. Shapes: T image tokens, L tokens of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .settings import Sampling

if TYPE_CHECKING:
    from PIL import Image

    from .engine import RolloutChunk
    from .policy import Policy

SEEDS = 2**31  # a seed is the engine's number of a sample


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Generation:
    """One picture. Tensors are on the CPU.

    Args:
        prompt: as it was given.
        plan: its text; "" without a plan.
        seed: draws this picture again, by itself too.
        image: RGB.
        tokens: [T] int64, the image tokens.
        image_logprobs: [T] float32, of these under the distribution that reads the prompt (without guidance).
        plan_tokens: [L] int64, with the end-of-sequence token if it was drawn; empty unless the plan was sampled.
        plan_logprobs: [L] float32.
    """

    prompt: str
    plan: str
    seed: int
    image: Image.Image = field(repr=False)
    tokens: Tensor = field(repr=False)
    image_logprobs: Tensor = field(repr=False)
    plan_tokens: Tensor = field(repr=False)
    plan_logprobs: Tensor = field(repr=False)


def to_pixels(images: Tensor) -> np.ndarray:
    """[S, 3, H, W] in [0, 1] -> [S, H, W, 3] uint8."""
    return images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def plans_of(plan: str | Sequence[str], prompts: Sequence[str]) -> list[str | None] | None:
    """The argument `plan` of `Policy.generate` -> the argument `plans` of the engine."""
    if plan == "auto":
        return None
    plans = [plan] * len(prompts) if isinstance(plan, str) else list(plan)
    if len(plans) != len(prompts):
        raise ValueError(f"plan has {len(plans)} texts for {len(prompts)} prompts; give one text, or one for each")
    return [None if text == "off" else text.strip() for text in plans]


def first_samples(prompts: Sequence[str], n: int, seed: int) -> list[int]:
    """Of each prompt the engine's number of its first sample. Raises ValueError for a seed or `n` that cannot be."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if not 0 <= seed <= SEEDS - n:
        raise ValueError(f"seed={seed} must be in [0, {SEEDS - n}]: picture k has seed + k, which ends below 2^31")
    return [seed] * len(prompts)


def generate(
    policy: Policy, prompts: Sequence[str], n: int, seed: int, plan: str | Sequence[str], sampling: Sampling
) -> Iterator[Generation]:
    """`n` pictures of each prompt, in order, as they come; see `Policy.generate`."""
    first, plans, done = first_samples(prompts, n, seed), plans_of(plan, prompts), 0
    for chunk in policy.engine.generate(prompts, n, sampling, 0, first, plans):
        yield from pictures_of(chunk, prompts, n, seed, done)
        done += len(chunk)


def pictures_of(chunk: RolloutChunk, prompts: Sequence[str], n: int, seed: int, done: int = 0) -> list[Generation]:
    """The samples of a chunk, before which `done` others came."""
    from PIL import Image  # here, so that training and its benches need no PIL

    tokens, logprobs = chunk.image_tokens.cpu(), chunk.image_logprobs.cpu()
    columns = (to_pixels(chunk.images), tokens, logprobs, chunk.plans.rows(), chunk.plan_logprobs.rows())
    return [
        Generation(
            prompts[s // n],
            chunk.plan_texts[s - done],
            seed + s % n,
            Image.fromarray(pixels),
            image_tokens,
            image_logprobs,
            plan,
            plan_logprobs.cpu(),
        )
        for s, (pixels, image_tokens, image_logprobs, plan, plan_logprobs) in enumerate(
            zip(*columns, strict=True), done
        )
    ]
