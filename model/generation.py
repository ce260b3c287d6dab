"""`from bicot import Policy`: a policy that draws pictures, with their plans, tokens and log-probabilities.

A picture's random numbers depend on its own seed alone: picture k of `generate(..., n, seed)` is the picture of
`generate(..., 1, seed + k)`. Shapes: T image tokens, L tokens of a plan.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import policy
from .chunk import RolloutChunk
from .engine import RolloutEngine
from .settings import Sampling

if TYPE_CHECKING:
    from PIL import Image

SEEDS = 2**31  # number of seeds: a seed is the number of a sample in the engine


@dataclass(frozen=True, eq=False)  # == of tensors is not a bool
class Generation:
    """One picture. Tensors are on the CPU.

    Args:
        prompt: as it was given.
        plan: its text; "" without a plan.
        seed: with n=1, this seed draws the picture again.
        image: RGB.
        tokens: [T] int64, the image tokens.
        image_logprobs: [T] float32, log-probabilities of the image tokens, conditional (without guidance).
        plan_tokens: [L] int64, with the end-of-sequence token if it was drawn; empty unless the plan was sampled.
        plan_logprobs: [L] float32, log-probabilities of the plan tokens.
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
    """Turn the argument `plan` of `Policy.generate` into the argument `plans` of the engine."""
    if plan == "auto":
        return None
    plans = [plan] * len(prompts) if isinstance(plan, str) else list(plan)
    if len(plans) != len(prompts):
        raise ValueError(f"plan has {len(plans)} texts for {len(prompts)} prompts; give one text, or one for each")
    if "auto" in plans:
        raise ValueError('a list of plans cannot have "auto"; give "off" or the text of a plan for each prompt')
    return [None if text == "off" else text.strip() for text in plans]


def first_samples(prompts: Sequence[str], n: int, seed: int) -> list[int]:
    """The engine's number of each prompt's first sample. Raises ValueError for a seed or an `n` out of range."""
    seed = operator.index(seed)  # NumPy's integers too
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if not 0 <= seed <= SEEDS - n:
        raise ValueError(f"seed={seed} must be in [0, {SEEDS - n}]: picture k has seed + k, which must be below 2^31")
    return [seed] * len(prompts)


class Policy(policy.Policy):
    """A policy that draws pictures: `Policy.from_pretrained(path).generate("a red circle", n=4)`.

    `settings` has the prompt texts and the sampling that `generate` uses. At first they are those of the checkpoint.
    """

    _engine: RolloutEngine | None = None
    _lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Policy:
        """Load a policy with `load_policy`: by default on a GPU in bfloat16, or without a GPU on the CPU in float32."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        usual = torch.bfloat16 if where.type == "cuda" else torch.float32
        loaded = policy.load_policy(path, dtype=dtype or usual, device=where)
        loaded.__class__ = cls
        return loaded  # type: ignore[return-value]

    @property
    def engine(self) -> RolloutEngine:
        """The engine that `generate` uses. It is kept with its CUDA graphs and KV cache until the prompt texts in
        `settings`, the device or the dtype change."""
        own, wanted = self._engine, (self.settings.prompts, (self.device, self.dtype))
        if own is None or (own.encoder.format, own.weights.kind) != wanted:
            self._engine = own = RolloutEngine(self, self.prompt_encoder(self.settings.prompts))
        return own

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        plan: str | Sequence[str] = "auto",
        **sampling: Any,
    ) -> list[Generation]:
        """Plan and draw `n` pictures of each prompt, in order. Calls of several threads run one after another.

        Args:
            prompts: one prompt, or a list.
            n: number of pictures of each prompt.
            seed: seed of the first picture of each prompt; the others have the following seeds.
            plan: "auto" = the model writes a plan for each picture; "off" = it draws without a plan; any other text is
                the plan of all pictures. A list has "off" or the text of a plan for each prompt.
            sampling: fields of `Sampling`, such as cfg_weight, temperature, top_k, image_temperature and
                max_completion_length; the value in `settings` if None or left out.

        Raises:
            ValueError: an empty prompt, or one that is too long; a number out of range.
            TypeError: an argument that `Sampling` does not have.
        """
        given = {name: value for name, value in sampling.items() if value is not None}
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        drawn = self.stream(prompts, n, seed, plan, replace(self.settings.sampling, **given))
        with self._lock:  # a stream does nothing before it is read
            return list(drawn) if prompts else []

    def stream(
        self, prompts: Sequence[str], n: int, seed: int, plan: str | Sequence[str], sampling: Sampling
    ) -> Iterator[Generation]:
        """Yield the pictures of `generate` as soon as they are drawn. Only one thread at a time may use a policy."""
        first, plans, done = first_samples(prompts, n, seed), plans_of(plan, prompts), 0
        for chunk in self.engine.generate(prompts, n, sampling, 0, first, plans):
            yield from pictures_of(chunk, prompts, n, seed, done)
            done += len(chunk)


def pictures_of(chunk: RolloutChunk, prompts: Sequence[str], n: int, seed: int, done: int = 0) -> list[Generation]:
    """The pictures of a chunk that follows `done` other samples."""
    from PIL import Image  # here, so that training and its benches need no PIL

    tokens, logprobs = chunk.image_tokens.cpu(), chunk.image_logprobs.cpu()
    drawn = (to_pixels(chunk.images), tokens, logprobs, chunk.plans.unpack(), chunk.plan_logprobs.unpack())
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
        for s, (pixels, image_tokens, image_logprobs, plan, plan_logprobs) in enumerate(zip(*drawn, strict=True), done)
    ]
