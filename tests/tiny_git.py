"""A small random GIT in the published format: pytorch_model.bin, a WordPiece tokenizer, CLIP's preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, CLIPImageProcessorPil, GitConfig, GitForCausalLM

SIZE = 28
WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "?", "-", "'", "yes", "no"]
WORDS += ["red", "apple", "blue", "bench", "wooden", "cat", "dog", "tall"]


def git_tokenizer() -> BertTokenizer:
    """BERT's, with letters and few words."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def git_model(size: int = SIZE) -> GitForCausalLM:
    """The same weights for the same size, with gain: as initialised, answers hardly depend on picture and question."""
    torch.manual_seed(0)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=14
    )
    config = GitConfig(
        vision_config=vision,
        vocab_size=len(git_tokenizer()),
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = GitForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
        model.git.embeddings.position_embeddings.weight.normal_()
        model.git.embeddings.word_embeddings.weight.normal_()
    return model


def make_git(folder: Path, size: int = SIZE, **processor: Any) -> Path:
    """Write the model as microsoft/git-large-vqav2 is written."""
    folder.mkdir(parents=True, exist_ok=True)
    model = git_model(size)
    weights = model.state_dict()
    for part in ("git", "git.image_encoder.vision_model"):  # transformers 4 wrote these, 5 does not
        weights[f"{part}.embeddings.position_ids"] = model.get_submodule(part).embeddings.position_ids
    torch.save(weights, folder / "pytorch_model.bin")
    model.config.architectures = ["GitForCausalLM"]
    model.config.save_pretrained(folder)
    git_tokenizer().save_pretrained(folder)
    edges = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPImageProcessorPil(**edges | processor).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
