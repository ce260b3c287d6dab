"""Tiny Janus models with random weights, made by transformers itself, and where the tests' data lies."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from bicot.model.policy import PUBLISHED_FREEZE, Policy

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "assets"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PUBLISHED_PROMPTS = ROOT.parent / "shared" / "data" / "t2i_r1_prompts.jsonl"


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all processes of a test run. A process that asks later waits for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (done := folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a process left that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def wait_until(done: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Until `done()`, while `process` runs."""
    deadline = time.monotonic() + seconds
    while not done():
        assert (process is None or process.poll() is None) and time.monotonic() < deadline
        time.sleep(0.1)


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly `vocab_size` entries, with the special tokens that Janus has."""
    special = ["<bos>", "<eos>", "<pad>", "<unk>", "<image>", "<boi>", "<eoi>"]
    words = ["User", "Assistant", ":", ".", "plan", "a", "red", "blue", "circle", "square", "and", "of", "two"]
    words += [f"w{i}" for i in range(vocab_size - len(special) - len(words))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )  # fmt: skip


def tiny_policy(
    *,
    kv_heads: int = 4,
    layers: int = 2,
    vocab: int = 61,
    codes: int = 37,
    seed: int = 0,
    scale: float = 8.0,
    context: int = 128,
    tied: bool = False,
    biased: bool = False,
    hidden: int = 32,
    intermediate: int = 48,
    image_size: int = 8,
) -> Policy:
    """A Janus of a few thousand weights: 2 layers, 4 heads of 8, 16 image tokens. `scale` widens its logits.

    `tied`: lm_head shares the input embeddings; `biased`: all layers of the body have a (random) bias.
    """
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=context, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, attention_bias=biased, mlp_bias=biased, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=image_size, patch_size=2,
        projection_dim=hidden, num_image_tokens=(image_size // 2) ** 2,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=codes, latent_channels=32, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, projection_dim=hidden, image_token_embed_dim=hidden,
    )  # fmt: skip
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=4, tie_word_embeddings=tied
    )
    config._attn_implementation = "sdpa"
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in (model.lm_head.weight, model.model.generation_head.vision_head.weight):
            parameter.mul_(scale)
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(PUBLISHED_FREEZE))
    return Policy(model, tiny_tokenizer(vocab))
