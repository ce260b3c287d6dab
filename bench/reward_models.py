"""The published rewards with random weights at true widths, and the processors of PIL pictures that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..rewards.git_vqa import GitReward
from ..rewards.grounding import GroundingReward
from ..rewards.hps import HPSReward
from ..rewards.orm import OrmReward
from ..rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess

hf: Any = transformers  # its types reject what its classes take
WORDS = ["a", "red", "apple", "and", "blue", "bench", "cat", "two", "dogs", "dog", "yes", "no", "image", "prompt"]


class Scale(NamedTuple):
    """How much of a published model is run."""

    layers: float  # share of each stack of layers
    pixels: float  # share of the picture's edge
    width: float  # share of the widths


TRUE, CPU, TINY = Scale(1, 1, 1), Scale(1 / 24, 1, 1), Scale(0, 1 / 8, 0)


class Made(NamedTuple):
    """A reward, its model, and what makes transformers' processor of PIL pictures for it, where PIL is."""

    reward: Any
    model: Any
    processor: Callable[[], Any]


def tokenizer(size: int, special: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """Word by word; ids that no word has are not drawn. The first special token is the padding, the last the end."""
    vocab = {word: i for i, word in enumerate([*special[:-1], "[UNK]", *WORDS, "?", "."])}
    core = Tokenizer(models.WordLevel(vocab | {special[-1]: size - 1}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, core.token_to_id(token)) for token in special]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], unk_token="[UNK]", cls_token=special[1], eos_token=special[-1]
    )


def lively(model: nn.Module) -> Any:
    """Weights that keep the size of what they multiply: initialised as usual, scores hardly depend on the picture."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def hps(scale: Scale, device: str, dtype: torch.dtype) -> Made:
    def tower(width: int, head: int, layers: int, inner: int) -> dict[str, Any]:
        width = max(head, int(width * scale.width))
        return dict(
            hidden_size=width,
            num_attention_heads=width // head,
            intermediate_size=max(head, int(inner * scale.width)),
            num_hidden_layers=max(1, int(layers * scale.layers)),
            hidden_act="gelu",
            projection_dim=1024,
        )

    words = 49408
    config = hf.CLIPConfig(
        text_config=tower(1024, 64, 24, 4096) | dict(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1),
        vision_config=tower(1280, 80, 32, 5120) | dict(patch_size=14, image_size=14 * int(16 * scale.pixels)),
        projection_dim=1024,
    )
    made = tokenizer(words, ["<pad>", "<start>", "<end>"], "<start> $A <end>")
    model = _model(hf.CLIPModel, config, device, dtype)
    return Made(HPSReward(model, made), model, square("CLIPImageProcessorPil", config.vision_config.image_size))


def git(scale: Scale, device: str, dtype: torch.dtype) -> Made:
    def width(full: int, head: int = 64) -> dict[str, int]:
        size = max(head, int(full * scale.width))
        return dict(hidden_size=size, num_attention_heads=size // head, intermediate_size=4 * size)

    edge = 14 * int(30 * scale.pixels)
    vision = dict(num_hidden_layers=max(1, int(24 * scale.layers)), image_size=edge, patch_size=14)
    config = hf.GitConfig(
        vision_config=vision | width(1024), num_hidden_layers=max(1, int(6 * scale.layers)), **width(768)
    )
    made = tokenizer(config.vocab_size, ["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    model = _model(hf.GitForCausalLM, config, device, dtype)
    reward = GitReward(model, made, Preprocess(edge, CLIP_MEAN, CLIP_STD))
    return Made(reward, model, square("CLIPImageProcessorPil", edge))


def grounding(scale: Scale, device: str, dtype: torch.dtype) -> Made:
    layers = max(2, int(6 * scale.layers))
    depths = [max(1, int(depth * scale.layers)) for depth in (2, 2, 6, 2)]
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(
            depths=depths, window_size=7, image_size=224, out_features=["stage2", "stage3", "stage4"]
        ),
        text_config=hf.BertConfig(num_hidden_layers=max(1, int(12 * scale.layers))),
        encoder_layers=layers,
        decoder_layers=layers,
        num_queries=900 if scale.pixels == 1 else 20,
    )
    made = tokenizer(30522, ["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    fit = Preprocess(int(800 * scale.pixels), IMAGENET_MEAN, IMAGENET_STD, "bilinear", "keep", 1333)
    model = _model(hf.GroundingDinoForObjectDetection, config, device, dtype)
    edges = dict(shortest_edge=fit.size, longest_edge=fit.max_size)
    return Made(GroundingReward(model, made, fit), model, partial(hf.GroundingDinoImageProcessorPil, size=edges))


def orm(scale: Scale, device: str, dtype: torch.dtype) -> Made:
    def of(full: int, multiple: int) -> int:
        return max(multiple, int(full * scale.width))

    text = hf.Qwen2Config(
        vocab_size=152064,
        hidden_size=of(3584, 128),
        intermediate_size=of(18944, 128),
        num_hidden_layers=max(1, int(28 * scale.layers)),
        num_attention_heads=of(3584, 128) // 128,
        num_key_value_heads=4 if scale.width == 1 else 1,
        max_position_embeddings=32768,
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=of(1152, 72),
        intermediate_size=of(4304, 72),
        num_hidden_layers=max(1, int(26 * scale.layers)),
        num_attention_heads=of(1152, 72) // 72,
        image_size=int(384 * scale.pixels),
        patch_size=14,
        vision_use_head=False,
    )
    config = hf.LlavaOnevisionConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
    made = tokenizer(text.vocab_size, ["<pad>", "<|im_end|>"], "$A")
    model = _model(hf.LlavaOnevisionForConditionalGeneration, config, device, dtype)
    return Made(OrmReward(model, made), model, square("SiglipImageProcessorPil", vision.image_size))


def _model(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # at no moment twice the memory
    try:
        with torch.device(device):
            model = kind(config)
        return lively(model.to(device))  # GroundingDINO makes a parameter with torch.Tensor(...), always on the CPU
    finally:
        torch.set_default_dtype(before)


def square(kind: str, edge: int) -> Callable[[], Any]:
    size = {"height": edge, "width": edge}
    sizes = dict(size=size) if kind.startswith("Siglip") else dict(size={"shortest_edge": edge}, crop_size=size)
    return partial(getattr(transformers, kind), **sizes, resample=3)
