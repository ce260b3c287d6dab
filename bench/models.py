"""The policies and runs of the benches: the toy, and random weights at true shapes, which need no download."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText, JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..grpo.config import Config, RewardConfig
from ..grpo.distributed import Ranks
from ..grpo.plan import AUTO, settle, yaml_text
from ..grpo.trainer import Trainer
from ..model.policy import Policy, load_policy
from ..rewards.base import Example

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "assets"
TRAINED = {"Janus-Pro-7B": 2}  # number of last layers that train, so that it fits into 80 GB


class Words:
    """The tokenizer of a random model: every word is a token, and every token is a word."""

    bos_token_id, eos_token_id, pad_token_id, boi_token_id, special = 0, 1, 2, 3, 4
    unk_token_id = None
    all_special_tokens: Sequence[str] = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id] * add_special_tokens + [*map(self._id, text.split())]}

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self.vocab)}

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(f"t{i}" for i in ids if i >= self.special)

    def _id(self, word: str) -> int:
        if re.fullmatch(r"t\d+", word):
            return int(word[1:])
        return self.special + zlib.crc32(word.encode()) % (self.vocab - self.special)


class Shape(NamedTuple):
    """Sizes of the language model and its two heads. Each attention head has its own keys and values."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    codes: int

    @property
    def layer_weights(self) -> int:
        D = self.hidden
        return self.layers * (4 * D * D + 3 * D * self.intermediate + 2 * D) + D  # with the last norm

    @property
    def text_head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def image_head_weights(self) -> int:
        return self.hidden * (self.hidden + 1) + (self.hidden + 1) * self.codes


SHAPES = {
    "toy": Shape(128, 4, 4, 384, 58, 64),
    "tiny": Shape(32, 2, 4, 48, 61, 37),
    "Janus-Pro-1B of 2 layers": Shape(2048, 2, 16, 5632, 102400, 16384),
    "Janus-Pro-1B": Shape(2048, 24, 16, 5632, 102400, 16384),
    "Janus-Pro-7B": Shape(4096, 30, 32, 11008, 102400, 16384),
}


def _random_model(shape: Shape, dtype: torch.dtype, device: str, image_tokens: int) -> Any:
    """VQ model and vision tower are tiny; a picture has `image_tokens` tokens."""
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        initializer_range=shape.hidden**-0.5,  # logits of unit size at any width
    )
    tower: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    vision = JanusVisionConfig(**tower, patch_size=2, projection_dim=shape.hidden, num_image_tokens=image_tokens)
    coder: dict[str, Any] = {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1]}
    coder |= {"num_res_blocks": 1, "projection_dim": shape.hidden, "image_token_embed_dim": shape.hidden}
    vq = JanusVQVAEConfig(num_embeddings=shape.codes, **coder)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@lru_cache(maxsize=1)
def policy_of(name: str, dtype: torch.dtype, device: str, image_tokens: int) -> Policy:
    """The policy `name` of `SHAPES`; the toy's pictures always have 64 tokens."""
    if name == "toy":
        return load_policy(TOY, dtype=dtype, device=device)
    return Policy(_random_model(SHAPES[name], dtype, device, image_tokens), Words(SHAPES[name].vocab))


def brightness(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """A reward that costs next to nothing: the mean of the pixels."""
    return images.mean((1, 2, 3))


def toy_config(**changes: Any) -> Config:
    """Read configs/toy.yaml, without the packages that a command line needs, and change some settings."""
    values = _read("toy")
    return Config(**values | {"rewards": RewardConfig(**values["rewards"])} | changes)


def published_config(**changes: Any) -> Config:
    """Read configs/janus-pro-1b.yaml; the toy's prompts, plans of at most 80 tokens, and a reward without weights."""
    values = _read("janus-pro-1b") | {name: _read("toy")[name] for name in ("train_file", "model_name_or_path")}
    values |= {"max_completion_length": 80, "eval_file": None, "sample_steps": 0}
    return Config(**values | {"rewards": RewardConfig(["bicot.bench.models:brightness"])} | changes)


def _read(name: str) -> dict[str, Any]:
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    paths = {"model_name_or_path", "train_file", "eval_file", "reasoning_prompt_path"} & set(values)
    return values | {path: str(ROOT / values[path]) for path in paths}


class ShapeTrainer(Trainer):
    """Trains random weights of a shape of `SHAPES` with their own words, or the toy itself.

    A picture has `image_tokens` tokens, a square number; the toy's have 64.
    """

    def __init__(self, shape: str, image_tokens: int, config: Config, ranks: Ranks) -> None:
        self.shape, self.image_tokens = shape, image_tokens
        if shape in TRAINED:
            first = SHAPES[shape].layers - TRAINED[shape]
            parts = ("embed_tokens", *(f"layers.{i}" for i in range(first)))
            config = replace(config, freeze=[*config.freeze, *(f"model.language_model.{part}." for part in parts)])
        super().__init__(config, ranks)

    def _settle(self, config: Config) -> tuple[Config, Callable[[int], bool | str]]:
        given = (SHAPES[self.shape], getattr(torch, config.dtype), "meta", self.image_tokens)
        return settle(config, self.ranks, lambda _: _random_model(*given))

    @property
    def memory_settings(self) -> str:
        """What the settings that depend on the size of the GPU are."""
        return ", ".join(f"{name} {yaml_text(getattr(self.config, name))}" for name in AUTO)

    def _roll_out(self, examples: list[Example]) -> Any:
        drawn = super()._roll_out(examples)
        self.rollout = drawn[0]  # the last one
        return drawn

    def _load(self, path: str | Path, reference: bool = False) -> Policy:
        """The pictures of a shape other than "tiny" are as large as published."""
        if self.shape == "toy":
            return super()._load(path, reference)
        dtype = getattr(torch, self.config.dtype)
        policy = policy_of.__wrapped__(self.shape, dtype, self.ranks.device.type, self.image_tokens)
        patches = math.isqrt(self.image_tokens)
        policy.config.vq_config.num_patches = patches
        if self.shape != "tiny":
            policy.config.vq_config = JanusVQVAEConfig(num_patches=patches)
            with torch.device(self.ranks.device):
                pictures: Any = JanusVQVAE(policy.config.vq_config)
            policy.model.model.vqmodel = pictures.to(dtype).eval()
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(not reference and not name.startswith(tuple(self.config.freeze)))
        return policy.freeze() if reference else policy
