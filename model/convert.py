"""Reads checkpoints in DeepSeek's own layout (`deepseek-ai/Janus-Pro-*`, the released T2I-R1) as transformers' Janus.

    python -m bicot.model.convert SRC DST      # SRC: folder or hub id; DST: a new folder in Hugging Face layout

`load_policy` reads this layout directly; the `model_type` of its config.json is `multi_modality`. The rules below
rename or drop every known weight, and any other weight is an error. config.json only names the vision tower and the VQ
model, so their sizes are here. Source: github.com/deepseek-ai/Janus, janus/models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from .settings import Sampling, save_for_transformers

ORIGINAL = "multi_modality"  # model_type of config.json

TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "mlp_ratio": 4.0,
    }
}
VQ_MODELS: dict[str, dict[str, Any]] = {
    "VQ-16": {
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "latent_channels": 256,
    }
}
IMAGE_TOKENS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
PAD = "<\uff5c\u2581pad\u2581\uff5c>"  # the pad token of the original code

# pattern of the full name -> the new name; a fused q, k, v weight has three new names, one for each third of it
_BLOCK, _LAYER = r"vision_model\.vision_tower\.blocks\.(\d+)", r"model.vision_model.encoder.layers.\1"
_RENAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"language_model\.lm_head\.(.+)", (r"lm_head.\1",)),
    (r"language_model\.model\.(.+)", (r"model.language_model.\1",)),
    (r"gen_embed\.(.+)", (r"model.generation_embeddings.\1",)),
    (r"gen_head\.output_mlp_projector\.(.+)", (r"model.generation_head.proj_out.\1",)),
    (r"gen_head\.vision_head\.(.+)", (r"model.generation_head.vision_head.\1",)),
    (r"vision_model\.vision_tower\.pos_embed", ("model.vision_model.embeddings.position_embedding.weight",)),
    (r"vision_model\.vision_tower\.patch_embed\.proj\.(.+)", (r"model.vision_model.embeddings.patch_embedding.\1",)),
    (r"vision_model\.vision_tower\.norm\.(.+)", (r"model.vision_model.post_layernorm.\1",)),
    (_BLOCK + r"\.norm([12])\.(.+)", (_LAYER + r".layer_norm\2.\3",)),
    (_BLOCK + r"\.mlp\.(.+)", (_LAYER + r".mlp.\2",)),
    (_BLOCK + r"\.attn\.proj\.(.+)", (_LAYER + r".self_attn.projection_layer.\2",)),
    (_BLOCK + r"\.attn\.qkv\.(.+)", tuple(_LAYER + rf".self_attn.{x}_proj.\2" for x in "qkv")),
    (r"gen_vision_model\.(\w+)\.mid\.0\.(.+)", (r"model.vqmodel.\1.mid.block_1.\2",)),
    (r"gen_vision_model\.(\w+)\.mid\.1\.(.+)", (r"model.vqmodel.\1.mid.attn_1.\2",)),
    (r"gen_vision_model\.(\w+)\.mid\.2\.(.+)", (r"model.vqmodel.\1.mid.block_2.\2",)),
    (r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.(.+)", (r"model.vqmodel.encoder.down.\1.block.\2",)),
    (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.(.+)", (r"model.vqmodel.decoder.up.\1.block.\2",)),
    (r"gen_vision_model\.encoder\.conv_blocks\.(\d+\.(?:attn|downsample)\..+)", (r"model.vqmodel.encoder.down.\1",)),
    (r"gen_vision_model\.decoder\.conv_blocks\.(\d+\.(?:attn|upsample)\..+)", (r"model.vqmodel.decoder.up.\1",)),
    (r"gen_vision_model\.(\w+\.(?:conv_in|norm_out|conv_out|embedding)\..+)", (r"model.vqmodel.\1",)),
    (r"gen_vision_model\.((?:post_)?quant_conv\..+)", (r"model.vqmodel.\1",)),
)
# SigLIP's head, which Janus does not use; statistics of training the VQ model; tables that transformers computes
_DROPPED = (
    r"vision_model\.vision_tower\.attn_pool\..+|gen_vision_model\.quantize\.codebook_used"
    r"|language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)


def new_names(key: str) -> list[str] | None:
    """The names of an original weight in transformers: three for a fused q, k, v, [] if dropped, None if unknown."""
    if re.fullmatch(_DROPPED, key):
        return []
    if linear := re.fullmatch(r"(gen_)?aligner\.layers\.(\d*[02468])\.(.+)", key):  # odd layers are GELUs
        gen, index, what = linear.groups()
        layer = "fc1" if index == "0" else f"hidden_layers.{int(index) // 2 - 1}"
        return [f"model.{'generation_' if gen else ''}aligner.{layer}.{what}"]
    for pattern, names in _RENAMES:
        if match := re.fullmatch(pattern, key):
            return [match.expand(name) for name in names]
    return None


def original_tokenizer(path: str | Path) -> Any:
    """The tokenizer of tokenizer.json, with Janus's image tokens as the attributes that transformers expects.

    Raises:
        ValueError: an image token is missing.
        OSError: there is no tokenizer.json.
    """
    vocab = Tokenizer.from_file(str(cached_file(path, "tokenizer.json"))).get_vocab()
    if lacking := [token for token in IMAGE_TOKENS.values() if token not in vocab]:
        raise ValueError(f"{path}: the tokenizer has no {', '.join(lacking)}; use Janus's own tokenizer.json")
    # not AutoTokenizer, whose class would split words differently from tokenizer.json
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, extra_special_tokens=IMAGE_TOKENS)
    if tokenizer.pad_token is None and PAD in vocab:
        tokenizer.pad_token = PAD
    return tokenizer


def original_config(path: str | Path, raw: dict[str, Any], tokenizer: Any) -> JanusConfig:
    """The configuration of transformers' Janus for an original config.json `raw`, with the tokenizer's token ids.

    Raises:
        ValueError: it is another model of DeepSeek (VL, JanusFlow), or has components that Janus does not have.
    """
    parts = ("language", "vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
    if lacking := [f"{part}_config" for part in parts if f"{part}_config" not in raw]:
        raise ValueError(f"{path}: config.json lacks {', '.join(lacking)}, so it is no Janus or Janus-Pro checkpoint")
    try:
        language, *others = (raw[f"{part}_config"] for part in parts)
        vision, aligner, gen_vision, gen_aligner, gen_head = (part["params"] for part in others)
        found = {
            "language_config.model_type": (language.get("model_type", "llama"), ["llama"]),
            "vision_config.params.model_name": (vision["model_name"], list(TOWERS)),
            "aligner_config.params.projector_type": (aligner["projector_type"], ["mlp_gelu"]),
            "gen_vision_config.cls": (raw["gen_vision_config"]["cls"], list(VQ_MODELS)),
            "gen_aligner_config.params.projector_type": (gen_aligner["projector_type"], ["mlp_gelu"]),
        }
        for what, (value, known) in found.items():
            if value not in known:
                raise ValueError(f"{path}: {what} of config.json is {value!r}; supported: {', '.join(known)}")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = LlamaConfig.from_dict({**language, **ids})
        tower, image_size = dict(TOWERS[vision["model_name"]]), vision["image_size"]
        last, layers = vision.get("select_layer", -1), tower.pop("num_hidden_layers")
        vision_config = JanusVisionConfig(
            **tower,
            num_hidden_layers=min(layers, last if last > 0 else layers + last + 1),
            image_size=image_size,
            projection_dim=aligner["n_embed"],
            depth=aligner.get("depth", 1),
            num_image_tokens=(image_size // tower["patch_size"]) ** 2,
        )
        vq_config = JanusVQVAEConfig(
            **VQ_MODELS[raw["gen_vision_config"]["cls"]],
            embed_dim=gen_vision["n_embed"],
            num_embeddings=gen_vision["image_token_size"],
            projection_dim=gen_aligner["n_embed"],
            num_hidden_layers=gen_aligner.get("depth", 1),
            image_token_embed_dim=gen_head["n_embed"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: config.json lacks {error}") from error
    return JanusConfig(
        text_config=text,
        vision_config=vision_config,
        vq_config=vq_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["image_token"]),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def load_original(path: str | Path, config: JanusConfig, tokenizer: Any, dtype: torch.dtype | None = None) -> Any:
    """Load the model, one file of weights at a time, converted to `dtype` (None = the dtype of the file).

    Raises:
        ValueError: some weights are missing, unknown or of another shape; found before any weight is read.
        OSError: a file is missing or damaged.
    """
    files = _files(path)
    with torch.device("meta"):
        empty: Any = JanusForConditionalGeneration(config)
    shapes = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    _check_weights(path, files, shapes)
    weights: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in _read(file, "cpu").items():
            if names := new_names(key):
                parts = tensor.reshape(-1, *shapes[names[0]][1:]).chunk(len(names))
                weights |= {n: part.to(dtype or part.dtype, copy=True) for n, part in zip(names, parts, strict=True)}
    dtype = dtype or weights["lm_head.weight"].dtype
    model: Any = JanusForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    ids = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # transformers' `generate` needs it to draw pictures
    drawing = {"boi_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["boi_token"])}
    model.generation_config = GenerationConfig(do_sample=True, generation_kwargs=drawing, **ids)
    return model


def _check_weights(path: str | Path, files: Sequence[str], shapes: dict[str, list[int]]) -> None:
    """ValueError unless the renamed weights are exactly those in `shapes` (transformers' name -> shape)."""
    unknown, lacking = [], set(shapes)
    for file in files:
        for key, tensor in _read(file, "meta").items():
            names = new_names(key)
            if names is None or not shapes.keys() >= set(names):
                unknown.append(key)
            elif names:
                first, *others = shapes[names[0]]
                shape = [1] * key.endswith("pos_embed") + [len(names) * first, *others]
                if list(tensor.shape) != shape:
                    raise ValueError(f"{path}: {key} is {list(tensor.shape)}, but config.json implies {shape}")
                lacking -= set(names)
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} unknown weights, such as {', '.join(sorted(unknown)[:3])}")
    if lacking:
        some = ", ".join(sorted(lacking)[:3])
        raise ValueError(f"{path} lacks {len(lacking)} weights, in transformers' names such as {some}")


def _files(path: str | Path) -> list[str]:
    """Local paths of the weight files; hub files are downloaded."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if index := cached_file(path, f"{name}.index.json", _raise_exceptions_for_missing_entries=False):
            names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            return [str(cached_file(path, file)) for file in sorted(names)]
        if file := cached_file(path, name, _raise_exceptions_for_missing_entries=False):
            return [file]
    raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _read(file: str, device: str) -> dict[str, Tensor]:
    try:
        return load_state_dict(file, map_location=device, weights_only=True)
    except Exception as error:  # its class depends on what is wrong with the file
        raise OSError(f"{file} cannot be read, download it again: {str(error).splitlines()[0]}") from error


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or hub id of a checkpoint in DeepSeek's layout")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet, or an empty one")
    args = parser.parse_args(words)
    try:
        if args.output.exists() and any(args.output.iterdir()):
            raise ValueError(f"{args.output} is not empty; give a new folder")
        try:
            raw, _ = PreTrainedConfig.get_config_dict(args.source)
        except OSError as error:
            raise FileNotFoundError(f"{args.source} has no config.json: {error}") from error
        if raw.get("model_type") != ORIGINAL:
            raise ValueError(f"{args.source} is a {raw.get('model_type')!r} checkpoint, not in DeepSeek's layout")
        tokenizer = original_tokenizer(args.source)
        config = original_config(args.source, raw, tokenizer)
        model = load_original(args.source, config, tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    save_for_transformers(args.output, config, tokenizer, Sampling())


if __name__ == "__main__":
    main()
