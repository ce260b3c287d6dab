"""A small random outcome reward model, written as LLaVA-NeXT writes its folders and as transformers does.

Its parts are Qwen2ForCausalLM, SiglipVisionModel and a plain MLP: the names of their weights, prefixed, are the names
of the published checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZE, PATCH = 56, 14  # pixels; the published model has 384 and 14
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("yes", "no")


@dataclass(frozen=True)
class Parts:
    """The modules that LLaVA-NeXT puts together. The tower has one layer more than the model runs."""

    tower: SiglipVisionModel
    projector: nn.Sequential
    newline: Tensor
    language: Qwen2ForCausalLM

    def original(self) -> dict[str, Tensor]:
        """The weights under the names of the published checkpoint: without the tower's last layer and its head."""
        dropped = (f"encoder.layers.{self.tower.config.num_hidden_layers - 1}.", "head.")
        return {
            **self.language.state_dict(),
            **{
                f"model.vision_tower.vision_tower.vision_model.{name}": weight
                for name, weight in self.tower.state_dict().items()
                if not name.startswith(dropped)
            },
            **{f"model.mm_projector.{name}": weight for name, weight in self.projector.state_dict().items()},
            "model.image_newline": self.newline,
        }


def orm_parts(*, size: int = SIZE, tied: bool = False) -> Parts:
    """The same parts for the same arguments.

    Freshly initialised, a transformer hardly looks at its context and scores are constant: these weights have gain.
    """
    torch.manual_seed(0)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=144, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=size,
            patch_size=PATCH,
        )
    )  # fmt: skip
    language = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    projector = nn.Sequential(nn.Linear(144, 64), nn.GELU(), nn.Linear(64, 64))
    with torch.no_grad():
        for module in (tower, language, projector):
            for name, weight in module.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    weight.normal_(std=0.1)
        language.model.embed_tokens.weight.normal_(std=0.1 if tied else 1.0)
    return Parts(tower.eval(), projector.eval(), torch.randn(64), language.eval())


def make_orm(
    folder: Path, *, layout: Literal["original", "transformers"] = "original", size: int = SIZE, tied: bool = False
) -> Path:
    """Write config, weights (in parts) and tokenizer to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = orm_parts(size=size, tied=tied)
    if layout == "transformers":
        _transformers_model(parts).save_pretrained(folder, max_shard_size="200KB")
        write_tokenizer(folder)
        Qwen2Tokenizer.from_pretrained(folder).save_pretrained(folder)
        return folder
    weights = {name: weight.contiguous() for name, weight in parts.original().items()}
    if tied:
        del weights["lm_head.weight"]
    write_weights(folder, weights)
    (folder / "config.json").write_text(json.dumps(_original_config(parts.language.config)))
    write_tokenizer(folder)
    return folder


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Two safetensors files and their index."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, mine in shards.items():
        save_file({name: weights[name] for name in mine}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, mine in shards.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """Qwen2's files: a byte-level BPE that knows bytes and `words`."""
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    tokens = [*sorted(ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(len(tokens) + i): {"content": t, **flags} for i, t in enumerate(SPECIAL)},
        "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 32768, "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _original_config(text: Qwen2Config) -> dict:
    """As LLaVA-NeXT writes it: Qwen2's fields of transformers 4, and of the tower nothing but its name."""
    return {
        "architectures": ["LlavaQwenForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 257, "eos_token_id": 260,
        "hidden_act": "silu", "hidden_size": text.hidden_size, "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]],
        "initializer_range": 0.02, "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings, "max_window_layers": 28, "mm_hidden_size": 144,
        "mm_patch_merge_type": "spatial_unpad", "mm_projector_lr": None, "mm_projector_type": "mlp2x_gelu",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384", "model_type": "llava",
        "num_attention_heads": text.num_attention_heads, "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": text.tie_word_embeddings,
        "tokenizer_model_max_length": 32768, "tokenizer_padding_side": "right", "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0", "use_cache": True, "use_mm_proj": True, "use_sliding_window": False,
        "vision_tower_pretrained": None, "vocab_size": text.vocab_size,
    }  # fmt: skip


def _transformers_model(parts: Parts) -> LlavaOnevisionForConditionalGeneration:
    vision = {**parts.tower.config.to_dict(), "vision_use_head": False}
    vision["num_hidden_layers"] -= 1
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=parts.language.config.to_dict(),
        tie_word_embeddings=parts.language.config.tie_word_embeddings, image_token_index=262, video_token_index=263,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config)
    model.lm_head.load_state_dict(parts.language.lm_head.state_dict())
    model.model.language_model.load_state_dict(parts.language.model.state_dict())
    model.model.vision_tower.load_state_dict(parts.tower.state_dict(), strict=False)
    for mine, given in zip(model.model.multi_modal_projector.children(), parts.projector, strict=True):
        mine.load_state_dict(given.state_dict())
    model.model.image_newline.data.copy_(parts.newline)
    return model
