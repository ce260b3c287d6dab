"""rewards: the published scorers on a batch of pictures, ours against one picture at a time.

python -m bicot.bench.bench_rewards [--device cpu|cuda] [--output FILE.json]
Random weights at true widths, of all layers on a GPU; eight pictures share a prompt and two phrases to look for. Eager
scores one picture at a time, as T2I-R1's code does, with our forward passes. Floor: the FLOPs of the models at their
published sizes. Checked: scores against eager's, as a share of their spread. What of their time is hidden in a step is
in a run's profile (train.py --profile).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..rewards.base import Example
from ..rewards.git_vqa import GitReward
from ..rewards.grounding import GroundingReward
from ..rewards.hps import HPSReward
from ..rewards.orm import OrmReward
from ..rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from .harness import Case, Outputs, Provider, main, short

hf: Any = transformers  # its types reject what its classes take
TOLERANCE = 0.15  # a score that belongs to another picture is off by one spread or so; half precision rounds everything
GROUP = 8
PROMPTS = [("a red apple and a blue bench", ("red apple", "blue bench")), ("a cat and two dogs", ("cat", "dog"))]
WORDS = ["a", "red", "apple", "and", "blue", "bench", "cat", "two", "dogs", "dog", "yes", "no", "image", "prompt"]


class Scale(NamedTuple):
    """How much of a published model is run: the share of each stack of layers, of a picture's edge, of the widths."""

    layers: float
    pixels: float
    widths: float

    def deep(self, layers: int, least: int = 1) -> int:
        return max(least, int(layers * self.layers))

    def wide(self, width: int, multiple: int) -> int:
        return max(multiple, int(width * self.widths))


TRUE, CPU, TINY = Scale(1, 1, 1), Scale(1 / 24, 1, 1), Scale(0, 1 / 8, 0)


def tokenizer(size: int, special: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """Word by word; ids that no word has are not drawn. The first special token is the padding, the last the end."""
    vocab = {word: i for i, word in enumerate([*special[:-1], "[UNK]", *WORDS, "?", "."])}
    core = Tokenizer(models.WordLevel(vocab | {special[-1]: size - 1}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    ids = [(token, core.token_to_id(token)) for token in special]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    named = {"pad_token": special[0], "unk_token": "[UNK]", "cls_token": special[1], "eos_token": special[-1]}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def random(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    """Weights that keep the size of what they multiply: initialised as usual, scores hardly depend on the picture."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # at no moment twice the memory
    try:
        with torch.device(device):
            model = kind(config)
        model.to(device)  # GroundingDINO makes a parameter with torch.Tensor(...), always on the CPU
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def hps(scale: Scale, device: str, dtype: torch.dtype) -> HPSReward:
    def tower(width: int, head: int, layers: int, inner: int) -> dict[str, Any]:
        width = scale.wide(width, head)
        sizes = dict(hidden_size=width, num_attention_heads=width // head, intermediate_size=scale.wide(inner, head))
        return dict(sizes, num_hidden_layers=scale.deep(layers), hidden_act="gelu", projection_dim=1024)

    words = 49408
    text = tower(1024, 64, 24, 4096) | dict(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1)
    vision = tower(1280, 80, 32, 5120) | dict(patch_size=14, image_size=14 * int(16 * scale.pixels))
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    made = tokenizer(words, ["<pad>", "<start>", "<end>"], "<start> $A <end>")
    return HPSReward(random(hf.CLIPModel, config, device, dtype), made)


def git(scale: Scale, device: str, dtype: torch.dtype) -> GitReward:
    def width(full: int) -> dict[str, int]:
        size = scale.wide(full, 64)
        return dict(hidden_size=size, num_attention_heads=size // 64, intermediate_size=4 * size)

    edge = 14 * int(30 * scale.pixels)
    vision = width(1024) | dict(num_hidden_layers=scale.deep(24), image_size=edge, patch_size=14)
    config = hf.GitConfig(vision_config=vision, num_hidden_layers=scale.deep(6), **width(768))
    made = tokenizer(config.vocab_size, ["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    model = random(hf.GitForCausalLM, config, device, dtype)
    return GitReward(model, made, Preprocess(edge, CLIP_MEAN, CLIP_STD))


def grounding(scale: Scale, device: str, dtype: torch.dtype) -> GroundingReward:
    stages = dict(window_size=7, image_size=224, out_features=["stage2", "stage3", "stage4"])
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(depths=[scale.deep(depth) for depth in (2, 2, 6, 2)], **stages),
        text_config=hf.BertConfig(num_hidden_layers=scale.deep(12)),
        encoder_layers=scale.deep(6, 2),
        decoder_layers=scale.deep(6, 2),
        num_queries=900 if scale.pixels == 1 else 20,
        d_model=scale.wide(256, 32),
        encoder_ffn_dim=scale.wide(2048, 32),
        decoder_ffn_dim=scale.wide(2048, 32),
    )
    made = tokenizer(30522, ["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    fit = Preprocess(int(800 * scale.pixels), IMAGENET_MEAN, IMAGENET_STD, "bilinear", "keep", 1333)
    return GroundingReward(random(hf.GroundingDinoForObjectDetection, config, device, dtype), made, fit)


def orm(scale: Scale, device: str, dtype: torch.dtype) -> OrmReward:
    def sizes(width: int, head: int, inner: int, layers: int) -> dict[str, int]:
        width = scale.wide(width, head)
        found = dict(hidden_size=width, intermediate_size=scale.wide(inner, head), num_hidden_layers=scale.deep(layers))
        return found | dict(num_attention_heads=width // head)

    heads = dict(num_key_value_heads=4 if scale.widths == 1 else 1, max_position_embeddings=32768)
    text = hf.Qwen2Config(vocab_size=152064, **sizes(3584, 128, 18944, 28), **heads)
    picture = dict(image_size=int(384 * scale.pixels), patch_size=14, vision_use_head=False)
    vision = hf.SiglipVisionConfig(**sizes(1152, 72, 4304, 26), **picture)
    config = hf.LlavaOnevisionConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
    made = tokenizer(text.vocab_size, ["<pad>", "<|im_end|>"], "$A")
    return OrmReward(random(hf.LlavaOnevisionForConditionalGeneration, config, device, dtype), made)


# name -> makes the reward, GFLOP of a picture at the published size
REWARDS: dict[str, tuple[Callable[..., Any], int]] = {
    "hps": (hps, 334),
    "git": (git, 716),
    "grounding": (grounding, 506),
    "orm": (orm, 11100),
}


def batch(samples: int, device: str) -> tuple[Tensor, list[Example]]:
    """Pictures [S, 3, 384, 384] of soft colours, each with its tint, and their prompts."""
    generator = torch.Generator().manual_seed(1)
    tint, noise = (torch.rand(samples, 3, *size, generator=generator) for size in ((1, 1), (6, 6)))
    images = F.interpolate((tint * noise).to(device), (384, 384), mode="bilinear")
    made = [Example(prompt, "color", nouns=phrases, attr_nouns=phrases) for prompt, phrases in PROMPTS]
    return images, [made[s // GROUP % len(made)] for s in range(samples)]


def scored(x: Any) -> Outputs:
    reward, images, examples = x
    return (reward.score(images, examples),)


def found(x: Any) -> Outputs:
    """What grounding is checked by, the sum of the phrases' mean scores: with random weights the best are all 1."""
    reward, images, examples = x
    each = reward.detect(images, [list(example.nouns) for example in examples])
    return (torch.stack([scores.mean(1).sum() for _, scores in each]).to(images.device),)


def one_at_a_time(run: Callable[[Any], Outputs], x: Any) -> Outputs:
    reward, images, examples = x
    each: Any = [run((reward, image, [example]))[0] for image, example in zip(images.split(1), examples, strict=True)]
    return (torch.cat(each),)


def of_spread(expected: Any, outputs: Outputs) -> float:
    return float((outputs[0] - expected).abs().amax() / expected.std())


def case(name: str, scale: Scale, samples: int, device: str, dtype: torch.dtype) -> Case:
    checked = found if name == "grounding" else scored
    make, gflop = REWARDS[name]
    note = "one picture at a time, as the published T2I-R1 code scores"
    return Case(
        {"reward": name, "pictures": samples, "dtype": short(dtype)}
        | ({"layers": "one layer in 24"} if scale is CPU else {}),
        dtype,
        lambda: (make(scale, device, dtype), *batch(samples, device)),
        lambda x: partial(of_spread, one_at_a_time(checked, x)[0]),
        {
            "ours": Provider(scored, checked=checked),
            "eager": Provider(partial(one_at_a_time, scored), note, checked=partial(one_at_a_time, checked)),
        },
        flops=samples * gflop * 10**9 if scale is TRUE else 0,
        makes=("images", samples),
        tolerance=TOLERANCE,
        seconds=4 if device == "cuda" else 8,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    """On a GPU the pictures of a published step; on a CPU fewer, and one layer in 24."""
    if tiny:
        return [case(name, TINY, 3, device, torch.float32) for name in REWARDS]
    if device == "cpu":
        counts = {"hps": 8, "git": 4, "grounding": 2, "orm": 2}
        return [case(name, CPU, count, device, torch.float32) for name, count in counts.items()]
    dtypes = {"hps": torch.float16, "git": torch.float16, "grounding": torch.float32, "orm": torch.bfloat16}
    return [case(name, TRUE, 16, device, dtype) for name, dtype in dtypes.items()]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
