"""HPS from the published file: against open_clip's arithmetic written out, one picture at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_hps import CONTEXT, FILE, SIZE, clip_tokenizer, make_hps, open_clip_weights
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bicot.rewards.base import Example
from bicot.rewards.checkpoints import MissingCheckpoint
from bicot.rewards.hps import HPSReward, clip_from_open_clip
from bicot.rewards.preprocess import CLIP_MEAN, CLIP_STD

TOLERANCE = 1e-5  # float32, other order of sums
RESIZED = 1e-2  # rounding to 8 bits moves the scores of this random model by up to 0.007
PROMPTS = [
    "a red cat and a dog",
    "A RED Cat  and\na dog.",
    "cat",
    "",
    "un été: 3 naïve 猫 🐱",
    "a red dog and a cat and a red dog and a cat and a dog",  # longer than the context
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture
def reward(file: Path) -> HPSReward:
    return HPSReward.from_pretrained(file, tokenizer=file.parent / "tokenizer")


def examples(*prompts: str) -> list[Example]:
    return [Example(prompt, "object") for prompt in prompts]


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """[count, 3, height, width], exact in 8 bits, of clearly different colours and textures."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(count, 3, 4, 4, generator=generator)
    return (F.interpolate(blocks, (height, width), mode="bilinear") * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def tower(weights: dict[str, Tensor], prefix: str, x: Tensor, head: int, mask: Tensor | None = None) -> Tensor:
    """open_clip's ResidualAttentionBlocks: x [L, 1, D], `mask` added to the attention's logits."""
    width, layer = x.shape[-1], 0
    while f"{prefix}transformer.resblocks.{layer}.ln_1.weight" in weights:
        w = {
            n.removeprefix(p): v
            for n, v in weights.items()
            if n.startswith(p := f"{prefix}transformer.resblocks.{layer}.")
        }
        y = F.layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        attended, _ = F.multi_head_attention_forward(
            *(y, y, y, width, width // head, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0),
            *(w["attn.out_proj.weight"], w["attn.out_proj.bias"]), training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended
        y = F.layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"])
        y = F.gelu(F.linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x, layer = x + F.linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"]), layer + 1
    return x


def open_clip_image(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """pixels [3, H, W], normalised -> features [E] of length 1."""
    w = {name.removeprefix("visual."): weight for name, weight in weights.items()}
    x = F.conv2d(pixels[None], w["conv1.weight"], stride=w["conv1.weight"].shape[-1])[0].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"][None], x]) + weights["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], w["ln_pre.weight"], w["ln_pre.bias"])
    x = tower(weights, "visual.", x[:, None], 80)[0, 0]
    return F.normalize(F.layer_norm(x, x.shape, w["ln_post.weight"], w["ln_post.bias"]) @ w["proj"], dim=-1)


def open_clip_text(weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Tokens of one text -> features [E] of length 1. Zeros after the text, as open_clip has them."""
    ids = torch.zeros(CONTEXT, dtype=torch.long)
    ids[: len(tokens)] = torch.tensor(tokens)
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
    x = tower(weights, "", x[:, None], 64, mask)[:, 0]
    x = F.layer_norm(x, x.shape[-1:], weights["ln_final.weight"], weights["ln_final.bias"])
    return F.normalize(x[ids.argmax()] @ weights["text_projection"], dim=-1)


def tokenize(text: str) -> list[int]:
    """open_clip's: lower case, start, end; a long text is cut and ends with the end."""
    tokenizer = clip_tokenizer()
    tokens = tokenizer(re.sub(r"\s+", " ", text).strip().lower()).input_ids
    return tokens if len(tokens) <= CONTEXT else [*tokens[: CONTEXT - 1], tokenizer.eos_token_id]


def published(prompt: str, image: Tensor) -> float:
    """The score of one picture as open_clip makes it, behind CLIP's processor on PIL pictures."""
    weights = open_clip_weights()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = torch.as_tensor(processor(pil(image), return_tensors="pt")["pixel_values"][0])
    return float(open_clip_image(weights, pixels) @ open_clip_text(weights, tokenize(prompt)))


def test_scores_are_open_clips(reward: HPSReward) -> None:
    """Every prompt with every picture in one batch, against one at a time."""
    images, pairs = pictures(4), [(s, prompt) for prompt in PROMPTS for s in range(4)]
    scores = reward.score(images[[s for s, _ in pairs]], examples(*(prompt for _, prompt in pairs)))
    expected = torch.tensor([published(prompt, images[s]) for s, prompt in pairs])
    assert scores.shape == (24,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)

    by_prompt = expected.view(len(PROMPTS), 4)
    gaps = torch.cat([torch.pdist(column[:, None]) for column in (*by_prompt, *by_prompt.T)])
    assert by_prompt.std(1).min() > 0.01 and by_prompt.std(0).min() > 0.01, "the scores say nothing"
    assert (gaps > 10 * TOLERANCE).float().mean() > 0.95


@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 20), (48, 36)])
def test_pictures_of_other_sizes(reward: HPSReward, height: int, width: int) -> None:
    """PIL rounds to 8 bits; the pictures stay clear of 0 and 1, where it clips as well."""
    images = (pictures(4, height, width) * 0.6 * 255).round() / 255 + 51 / 255
    expected = torch.tensor([published("a red cat", image) for image in images])
    torch.testing.assert_close(reward.score(images, examples(*["a red cat"] * 4)), expected, rtol=0, atol=RESIZED)
    assert expected.std() > 5 * RESIZED

    coarse = F.interpolate(images, (SIZE * height // min(height, width), SIZE * width // min(height, width)))
    assert (reward.score(coarse, examples(*["a red cat"] * 4)) - expected).abs().max() > RESIZED


def test_preprocessing_is_hps_own(reward: HPSReward) -> None:
    """Bicubic on floats: it overshoots, and nothing clips it."""
    images = (torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    bicubic = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True)
    assert bicubic.max() > 1.05
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(reward.preprocess(images), (bicubic - mean) / std, rtol=0, atol=TOLERANCE)


def test_equals_open_clip_itself() -> None:
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)  # it needs torchvision
    weights = open_clip_weights()
    model = open_clip.CLIP(
        48,
        dict(layers=2, width=160, head_width=80, patch_size=14, image_size=SIZE),
        dict(context_length=CONTEXT, vocab_size=len(clip_tokenizer()), width=128, heads=2, layers=2),
    ).eval()
    model.load_state_dict(weights)
    ours = clip_from_open_clip(weights).eval()
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([F.pad(torch.tensor(tokenize(p)), (0, CONTEXT - len(tokenize(p)))).tolist() for p in PROMPTS])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.visual_projection(ours.vision_model(pixels).pooler_output), model.encode_image(pixels)
        )
        torch.testing.assert_close(ours.text_projection(ours.text_model(ids).pooler_output), model.encode_text(ids))


def test_conversion_takes_every_weight_once(file: Path) -> None:
    """As copies in the model's dtype, with nothing left on the meta device and no hold on the file."""
    weights = open_clip_weights()
    model = clip_from_open_clip(weights, torch.float16)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert all(p.dtype == torch.float16 and p.is_contiguous() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    config: Any = model.config
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 2
    torch.testing.assert_close(
        model.vision_model.encoder.layers[1].self_attn.k_proj.weight,
        weights["visual.transformer.resblocks.1.attn.in_proj_weight"][160:320].half(),
    )


def test_config_of_the_published_size() -> None:
    """ViT-H-14, 986 million weights, without its memory."""
    with torch.device("meta"):
        shapes = open_clip_weights(vision=1280, text=1024, layers=1, embed=1024, size=224)
    config: Any = clip_from_open_clip(shapes).config
    text, vision = config.text_config, config.vision_config
    assert (vision.num_attention_heads, vision.intermediate_size, vision.image_size, vision.patch_size) == (
        16,
        5120,
        224,
        14,
    )
    assert (text.num_attention_heads, text.intermediate_size, text.max_position_embeddings) == (16, 4096, CONTEXT)
    assert (text.hidden_act, vision.hidden_act, config.projection_dim, vision.layer_norm_eps) == (
        "gelu",
        "gelu",
        1024,
        1e-5,
    )
    assert text.eos_token_id == text.vocab_size - 1 == clip_tokenizer().eos_token_id


def test_text_features_are_computed_once(reward: HPSReward) -> None:
    batches: list[int] = []
    reward.model.text_model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    images = pictures(6)
    first = reward.score(images, examples("cat", "cat", "dog", "dog", "dog", "red"))
    assert batches == [3]
    again = reward.score(images[:4], examples("cat", "cat", "dog", "dog"))
    assert batches == [3]
    torch.testing.assert_close(again, first[:4], rtol=0, atol=TOLERANCE)
    mixed = reward.score(images, examples("red", "cat", "and", "dog", "and", "cat"))  # red was dropped
    assert batches == [3, 2]
    alone = [reward.score(images[s : s + 1], examples(p))[0] for s, p in enumerate(["red", "cat", "and", "dog", "and"])]
    torch.testing.assert_close(mixed[:5], torch.stack(alone), rtol=0, atol=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_model_may_move_between_calls(reward: HPSReward, monkeypatch: pytest.MonkeyPatch) -> None:
    images, asked = pictures(3), examples("cat", "cat", "dog")
    expected = reward.score(images, asked)
    model: torch.nn.Module = reward.model
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for device in ("cuda", "cpu"):
        model.to(device)
        scores = reward.score(images.to(device), asked)
        assert scores.device.type == device
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_ends_in_float32(file: Path, reward: HPSReward, dtype: str | torch.dtype) -> None:
    half = HPSReward.from_pretrained(file, tokenizer=file.parent / "tokenizer", dtype=dtype)
    assert half.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
    images, asked = pictures(4), examples("cat", "cat", "dog", "red")
    scores, exact = half.score(images, asked), reward.score(images, asked)
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < 0.05 < exact.max() - exact.min()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_gives_the_same_scores(file: Path, tmp_path: Path, dtype: str) -> None:
    """And needs nothing of the published files."""
    reward = HPSReward.from_pretrained(file, tokenizer=file.parent / "tokenizer", dtype=dtype)
    reward.save_pretrained(tmp_path)
    saved = HPSReward.from_pretrained(tmp_path, tokenizer="not/used", dtype=dtype)
    images, asked = pictures(3), examples(*PROMPTS[:3])
    assert torch.equal(saved.score(images, asked), reward.score(images, asked))
    assert not any(p.requires_grad for p in saved.model.parameters()) and not saved.model.training


def test_a_folder_with_the_published_file(file: Path, reward: HPSReward) -> None:
    folder = HPSReward.from_pretrained(str(file.parent), tokenizer=str(file.parent / "tokenizer"))
    assert torch.equal(
        folder.score(pictures(2), examples("cat", "dog")), reward.score(pictures(2), examples("cat", "dog"))
    )


def test_missing_files_name_command_and_option(file: Path, tmp_path: Path) -> None:
    weights = r"hf download xswu/HPSv2 HPS_v2.1_compressed.pt\n.*with rewards.options.hps.path$"
    tokenizer = r"hf download openai/clip-vit-large-patch14 tokenizer.json\n.*with rewards.options.hps.tokenizer$"
    for path in (tmp_path, tmp_path / "missing", tmp_path / FILE):
        with pytest.raises(MissingCheckpoint, match=weights):
            HPSReward.from_pretrained(path)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MissingCheckpoint, match=tokenizer):
            HPSReward.from_pretrained(file, tokenizer=path)
    HPSReward.from_pretrained(file, tokenizer=file.parent / "tokenizer").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    with pytest.raises(MissingCheckpoint, match=r"tokenizer.json\n.*with rewards.options.hps.path$"):
        HPSReward.from_pretrained(tmp_path / "saved")


def changed(**weights: Tensor | None) -> dict[str, Tensor]:
    merged = {**open_clip_weights(), **{name.replace("__", "."): weight for name, weight in weights.items()}}
    return {name: weight for name, weight in merged.items() if weight is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "has no 'state_dict'"),
        ([1], "has no 'state_dict'"),
        ({"state_dict": {}}, "an open_clip ViT-H-14: there is no 'token_embedding.weight'"),
        ({"state_dict": open_clip_weights(vision=192)}, "an open_clip ViT-H-14: 192 is no multiple of 80"),
        ({"state_dict": changed(visual__proj=torch.zeros(160, 8))}, r"differ in \['visual_projection.weight'\]"),
        ({"state_dict": changed(ln_final__bias=None)}, r"differ in \['text_model.final_layer_norm.bias'\]"),
        ({"state_dict": changed(score_predictor=torch.zeros(2))}, r"differ in \['score_predictor'\]"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        HPSReward.from_pretrained(tmp_path / "other.pt")


def test_files_that_are_broken(file: Path, tmp_path: Path) -> None:
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"", file.read_bytes()[:1000]):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete file of torch weights"):
            HPSReward.from_pretrained(tmp_path)


def test_folders_of_something_else(file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is a checkpoint of 'siglip', not of 'clip'"):
        HPSReward.from_pretrained(tmp_path)
    HPSReward.from_pretrained(file, tokenizer=file.parent / "tokenizer").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"is not the CLIPModel .* 16 weights are missing .* such as \['text_model.enc"
    ):
        HPSReward.from_pretrained(tmp_path)


def test_other_arguments_that_are_wrong(file: Path, tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["one more"])
    words = {**tokenizer.get_vocab()}
    type(tokenizer)(
        vocab={w: i for w, i in words.items() if i < 500} | {"<|startoftext|>": 500, "<|endoftext|>": 501}
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer does not fit the model, whose last of 522 tokens .* is 501"):
        HPSReward.from_pretrained(file, tokenizer=tmp_path)
    for dtype in ("float31", "int8", torch.int64):
        with pytest.raises(ValueError, match="reward 'hps' cannot compute in"):
            HPSReward.from_pretrained(file, dtype=dtype)
