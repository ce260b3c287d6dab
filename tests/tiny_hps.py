"""A small random HPS v2: the file as published, with open_clip's names, and a tokenizer of bytes and few merges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

SIZE, PATCH, CONTEXT = 28, 14, 16
FILE = "HPS_v2.1_compressed.pt"
MERGES: Any = [
    tuple(pair.split()) for pair in ("c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "a n", "an d</w>")
]


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes, bytes at the end of a word, merges, start and end of a text: the order of CLIP's vocabulary."""
    characters = sorted(ByteLevel.alphabet())
    words = [*characters, *(f"{c}</w>" for c in characters), *(left + right for left, right in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=MERGES)


def open_clip_weights(
    *, vision: int = 160, text: int = 128, layers: int = 2, embed: int = 48, size: int = SIZE
) -> dict[str, Tensor]:
    """The same random state dict for the same arguments, with gain: its scores tell pictures and prompts apart."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.5) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.2)}

    def linear(name: str, inner: int, outer: int, weight: str = ".weight", bias: str = ".bias") -> dict[str, Tensor]:
        return {
            f"{name}{weight}": normal(outer, inner, std=1.5 / math.sqrt(inner)),
            f"{name}{bias}": normal(outer, std=0.2),
        }

    def tower(prefix: str, width: int) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for layer in range(layers):
            block = f"{prefix}transformer.resblocks.{layer}."
            weights |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
            weights |= linear(f"{block}attn.in_proj", width, 3 * width, "_weight", "_bias")
            weights |= linear(f"{block}attn.out_proj", width, width)
            weights |= linear(f"{block}mlp.c_fc", width, 4 * width) | linear(f"{block}mlp.c_proj", 4 * width, width)
        return weights

    vocabulary = len(clip_tokenizer())
    return {
        "positional_embedding": normal(CONTEXT, text),
        "text_projection": normal(text, embed),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": normal(vision),
        "visual.positional_embedding": normal((size // PATCH) ** 2 + 1, vision),
        "visual.proj": normal(vision, embed),
        "visual.conv1.weight": normal(vision, 3, PATCH, PATCH, std=0.1),
        **norm("visual.ln_pre", vision),
        **tower("visual.", vision),
        **norm("visual.ln_post", vision),
        **tower("", text),
        "token_embedding.weight": normal(vocabulary, text),
        **norm("ln_final", text),
    }


def make_hps(folder: Path) -> Path:
    """Write the published file and, under `folder`/tokenizer, its tokenizer -> the file."""
    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    torch.save({"epoch": 1, "state_dict": open_clip_weights()}, folder / FILE)
    return folder / FILE
