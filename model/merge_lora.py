"""Merges LoRA adapters into their base model, and writes it in Hugging Face layout.

    python -m bicot.model.merge_lora ADAPTER OUT     # ADAPTER: a checkpoint of a LoRA run; OUT: a new folder

adapter_config.json names the base model. The sum is computed in float32 and written in the base model's dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .adapters import adapter_base, is_adapted, unmerged
from .policy import load_policy


def merge(adapter: Path, out: Path) -> None:
    """Write the merged model, its tokenizer, and the settings with which `adapter` draws.

    Raises:
        ValueError: a layer is adapted that shares its weight with another one (`tie_word_embeddings`).
        FileNotFoundError: `adapter` is no adapter folder, or its base model is not there.
        FileExistsError: `out` exists.
    """
    base = adapter_base(adapter)
    if base is None:
        raise FileNotFoundError(f"{adapter}: no adapter_config.json there; give a checkpoint of a run with lora_r")
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new folder")
    policy = load_policy(adapter, dtype=torch.float32)
    ends = (policy.model.lm_head, policy.decoder.embed_tokens)
    if any(map(is_adapted, ends)) and unmerged(ends[0], "weight") is unmerged(ends[1], "weight"):
        raise ValueError(f"{adapter} adapts lm_head or embed_tokens, which share one weight: they cannot be merged")
    policy.model, policy.adapters = policy.adapters.merge_and_unload(), None
    raw, _ = PreTrainedConfig.get_config_dict(base)
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    policy.model.to(getattr(torch, name))
    policy.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge LoRA adapters into their model.", allow_abbrev=False)
    parser.add_argument("adapter", type=Path, help="adapter folder, such as a checkpoint of a run with lora_r")
    parser.add_argument("out", type=Path, help="new folder for the merged model")
    args = parser.parse_args()
    try:
        merge(args.adapter, args.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
