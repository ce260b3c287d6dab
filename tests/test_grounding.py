"""The grounding reward against GroundingDINO itself, driven one PIL picture at a time, and plain Python rules."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny_grounding import MAX_TOKENS, SIZE, make_grounding, plain_score, published_masks, span_map
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, BertConfig, BertTokenizer, GroundingDinoForObjectDetection
from transformers.models.grounding_dino import modeling_grounding_dino as modeling
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo
from bicot.rewards.checkpoints import MissingCheckpoint
from bicot.rewards.grounding import DeformableAttention, GroundingReward
from bicot.rewards.layout import phrases
from bicot.rewards.preprocess import MAX_ERROR

# Float32 sums in another order (a batch, padding); the scores are in [0, 1] and so are the boxes.
TOLERANCE = 1e-5


def spatial(first: str, locality: str, second: str, *more: str, task: str = "spatial") -> Example:
    return Example(
        f"{first} {locality} {second}", task, (first, second, *more), spatial_info=SpatialInfo(first, second, locality)
    )


def counting(*entries: tuple[int, str]) -> Example:
    return Example(
        "p", "numeracy", tuple(name for _, name in entries), numeracy_info=tuple(NumeracyInfo(*e) for e in entries)
    )


EXAMPLES = (
    *[Example("a cat and a dog", "object", ("cat", "dog"))] * 3,  # three samples of one prompt
    Example("p", "color", ("stop sign", "TV", "post-it")),
    Example("p", "complex", ("ball", "a red sports ball", "sports ball")),  # one in the other; four words
    Example("p", "shape", ("Frisbee",)),
    *[counting((2, "cat"), (1, "dog"))] * 3,
    counting((1, "sports ball"), (2, "stop sign"), (3, "car"), (1, "kid's toy")),
    counting((4, "dog")),
    *[spatial("dog", "on the left of", "cat")] * 3,
    spatial("stop sign", "below", "car"),
    spatial("Dog", "above", "post-it"),
    spatial("ball", "near", "sports ball", "car", task="complex"),
    spatial("TV", "on the top of", "cat"),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deformable_attention_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Places lie outside of the picture too. No tensor holds the samples of all levels."""
    generator = torch.Generator().manual_seed(0)
    S, H, E, Q, P, sizes = 2, 3, 16, 13, 4, [(7, 4), (3, 5), (1, 1)]
    values = torch.randn(S, sum(h * w for h, w in sizes), H, E, generator=generator, dtype=dtype)
    places = 1.4 * torch.rand(S, Q, H, len(sizes), P, 2, generator=generator, dtype=dtype) - 0.2
    weights = torch.randn(S, Q, H, len(sizes) * P, generator=generator, dtype=dtype).softmax(-1).view(S, Q, H, -1, P)
    inputs = (values, torch.tensor(sizes), sizes, torch.zeros(3, dtype=torch.int64), places, weights, 64)
    theirs = modeling.MultiScaleDeformableAttention()(*inputs)
    with Largest() as seen:
        ours = DeformableAttention()(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    assert ours.shape == (S, Q, H * E) and ours.is_contiguous() and seen.elements <= S * H * E * Q * P


def test_every_deformable_attention_is_replaced(folder: Path) -> None:
    model = GroundingReward.from_pretrained(folder).model
    kinds = {type(m) for m in model.modules() if isinstance(m, modeling.MultiScaleDeformableAttention)}
    assert kinds == {DeformableAttention}


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(result)))
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grounding(tmp_path_factory.mktemp("grounding"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> GroundingReward:
    return GroundingReward.from_pretrained(folder)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """A picture for each example, noise of several grains, exact in 8 bits and of the model's own size."""
    return noise(len(EXAMPLES), SIZE, SIZE)


def noise(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    grains = [torch.rand(1, 3, cells, cells, generator=generator) for cells in ((4, 8, 24) * count)[:count]]
    pictures = torch.cat([F.interpolate(grain, (height, width), mode="nearest") for grain in grains])
    return (pictures * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def alone(folder: Path, image: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Corners [Q, 4] and scores [P, Q] of one picture, through the model's own processors."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    pixels = GroundingDinoImageProcessorPil.from_pretrained(folder)(pil(image), return_tensors="pt")
    text = tokenizer(" . ".join(names) + ".", return_tensors="pt")
    sine = modeling.encode_sinusoidal_position_embedding
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        # what releases of transformers differ in
        patch.setattr(modeling, "generate_masks_with_special_tokens_and_transfer_map", published_masks)
        patch.setattr(modeling, "encode_sinusoidal_position_embedding", lambda p, **more: sine(p.float(), **more))
        seen = model(**pixels, **text)
    x, y, w, h = seen.pred_boxes[0].unbind(1)
    corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=1)
    return corners, span_map(tokenizer, names) @ seen.logits[0].sigmoid().T


@pytest.fixture(scope="module")
def published(folder: Path, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the model sees in each picture, one at a time."""
    return [alone(folder, image, phrases(example)) for image, example in zip(images, EXAMPLES, strict=True)]


def test_sees_what_the_model_sees_in_one_picture_at_a_time(
    reward: GroundingReward, images: Tensor, published: list[tuple[Tensor, Tensor]]
) -> None:
    seen = reward.detect(images, [phrases(example) for example in EXAMPLES])
    best = []
    for (boxes, scores), (their_boxes, their_scores) in zip(seen, published, strict=True):
        torch.testing.assert_close(boxes, their_boxes, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(scores, their_scores, rtol=0, atol=TOLERANCE)
        best += scores.amax(1).tolist()
    assert min(best) < 0.2 and max(best) > 0.6  # on both sides of the threshold
    boxes = torch.stack([boxes for boxes, _ in seen])
    assert boxes.std(dim=(0, 1)).min() > 0.1 and (boxes[0] - boxes[1]).abs().max() > 0.1


@pytest.mark.parametrize("compat", [False, True])
def test_scores_are_the_plain_rules_on_what_the_model_sees(
    folder: Path, images: Tensor, published: list[tuple[Tensor, Tensor]], compat: bool
) -> None:
    want = [
        plain_score(example, boxes.tolist(), scores.tolist(), compat)
        for example, (boxes, scores) in zip(EXAMPLES, published, strict=True)
    ]
    scores = GroundingReward.from_pretrained(folder, t2i_r1_compat=compat).score(images, EXAMPLES)
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(want, abs=TOLERANCE)
    assert len(set(scores.tolist())) >= 6  # a constant, or the score of another row, does not pass
    for samples in (scores[:3], scores[6:9], scores[11:14]):
        assert len(set(samples.tolist())) > 1  # nor does the same score for all pictures of a prompt


def test_published_code_looks_for_the_nouns_as_they_come(folder: Path, images: Tensor) -> None:
    """A noun that comes twice is in its caption twice, and an object that is not among the nouns is never found."""
    compat = GroundingReward.from_pretrained(folder, t2i_r1_compat=True)
    twice = Example("p", "complex", ("cat", "stop sign", "cat"))
    for image in images[:6]:
        boxes, scores = alone(folder, image, list(twice.nouns))
        want = plain_score(twice, boxes.tolist(), scores.tolist(), compat=True)
        assert compat.score(image[None], [twice]).item() == pytest.approx(want, abs=TOLERANCE)
    unnamed = Example("p", "spatial", ("dog",), (), SpatialInfo("cat", "dog", "near"))
    seen = [
        reward.score(images, [unnamed] * len(images)).max()
        for reward in (compat, GroundingReward.from_pretrained(folder))
    ]
    assert seen == pytest.approx([0.2, 1.0])


def test_a_batch_scores_as_its_pictures_do_alone(reward: GroundingReward, images: Tensor) -> None:
    names = [phrases(example) for example in EXAMPLES]
    together = reward.detect(images, names)
    for s in range(len(EXAMPLES)):
        for batch, single in zip(together[s], reward.detect(images[s : s + 1], names[s : s + 1])[0], strict=True):
            torch.testing.assert_close(batch, single, rtol=0, atol=TOLERANCE)
    scores = reward.score(images, EXAMPLES)
    backwards = reward.score(images.flip(0), EXAMPLES[::-1]).flip(0)
    singly = torch.cat([reward.score(images[s : s + 1], EXAMPLES[s : s + 1]) for s in range(len(EXAMPLES))])
    torch.testing.assert_close(scores, singly, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(scores, backwards, rtol=0, atol=TOLERANCE)


def test_the_caption_matters(reward: GroundingReward, images: Tensor) -> None:
    one, two = (reward.detect(images[:1], [names])[0] for names in (["cat", "dog"], ["cat", "stop sign"]))
    assert (one[1][0] - two[1][0]).abs().max() > 0.01  # the cat's score depends on what else is asked for
    upper = Example("p", "object", ("CAT", " Dog "))
    assert reward.score(images[:1], [upper]) == reward.score(images[:1], EXAMPLES[:1])


@pytest.mark.parametrize(
    "names",
    [
        ["cat"],
        ["stop sign", "post-it", "kid's toy"],
        ["ball", "sports ball", "a red sports ball"],
        ["café", "t.v.", "x"],
    ],
)
def test_phrase_maps_are_the_published_ones(folder: Path, reward: GroundingReward, names: list[str]) -> None:
    """A phrase of more than two words has all its words here; the published map is taken from its first to its last."""
    if "t.v." in names:  # which is read as "tv" otherwise
        reward = GroundingReward.from_pretrained(folder, t2i_r1_compat=True)
    ids, mask, maps = reward._encode([names, ["a very long list of words", "dog"]])
    assert len(maps[0]) == max(len(names), 2) and not any(sum(map(abs, row)) for row in maps[0][len(names) :])
    ours = torch.tensor(maps[0][: len(names)])
    want = span_map(reward.tokenizer, names)[:, : ours.shape[1]]
    assert torch.equal(ours > 0, want > 0)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-6)
    assert not ours[:, torch.tensor(mask[0]) == 0].any() and (torch.tensor(ids[0])[ours.sum(0) > 0] != 102).all()


@pytest.mark.parametrize(
    ("noun", "words"),
    [
        ("St. Bernard", "st bernard"),
        ("cat?", "cat"),
        ("cat, dog", "cat dog"),
        ("T.V.", "tv"),
        ("a u.s.a. sign", "a usa sign"),
        ("cat.dog", "cat dog"),
        ("3.5 a", "3 5 a"),
        ("?.cat ,", "cat"),
        ("[SEP] cat [CLS]", "[sep] cat [cls]"),
    ],
)
def test_marks_do_not_cut_a_noun(reward: GroundingReward, images: Tensor, noun: str, words: str) -> None:
    """At full stops and question marks the model cuts its caption; what it reads of a noun is one piece."""
    example = Example("p", "object", ("dog", noun, "car"))
    ids, mask, maps = reward._encode([phrases(example)])
    assert (ids, mask, maps) == reward._encode([["dog", words, "car"]])
    sees, _ = published_masks(torch.tensor(ids))
    spans = torch.tensor(maps[0]) > 0
    for p in range(3):
        assert sees[0][spans[p]][:, spans[p]].all() and not sees[0][spans[p]][:, spans[p - 1]].any()
    assert spans.sum() + 5 == len(ids[0])  # CLS, three full stops and SEP; no other token is left out
    plain = Example("p", "object", ("dog", words, "car"))
    assert torch.equal(reward.score(images, [example] * len(images)), reward.score(images, [plain] * len(images)))
    counted, same = counting((1, noun), (2, "dog")), counting((1, words), (2, "dog"))
    assert torch.equal(reward.score(images[:4], [counted] * 4), reward.score(images[:4], [same] * 4))
    with pytest.raises(ValueError, match="no token for the noun '. .'"):
        reward.check(Example("p", "object", (noun, ". ?")))


@pytest.mark.parametrize("height, width", [(64, 64), (120, 168), (240, 96)])
def test_other_sizes_are_resampled_as_pil_does(reward: GroundingReward, folder: Path, height: int, width: int) -> None:
    image = noise(1, height, width)
    pixels = GroundingDinoImageProcessorPil.from_pretrained(folder)(pil(image[0]), return_tensors="pt").pixel_values
    ours = reward.preprocess(image)
    assert ours.shape == pixels.shape
    assert (ours - pixels).abs().max() <= MAX_ERROR / 0.224 + 1e-5  # 8-bit rounding, over the smallest deviation


def test_rows_with_nothing_to_look_for(folder: Path, reward: GroundingReward, images: Tensor) -> None:
    nothing = Example("p", "non")
    rows, pictures = (EXAMPLES[0], nothing, EXAMPLES[3]), images[[0, 1, 3]]
    assert not reward.applies(nothing) and all(map(reward.applies, EXAMPLES))
    scores = reward.score(pictures, rows)
    assert math.isnan(scores[1])
    assert torch.equal(scores[::2], reward.score(images[[0, 3]], [EXAMPLES[0], EXAMPLES[3]]))
    assert reward.score(images[:1], [nothing]).isnan().all()
    compat = GroundingReward.from_pretrained(folder, t2i_r1_compat=True)
    assert compat.applies(nothing) and compat.score(pictures, rows)[1] == 1
    annotated = Example("p", "spatial", (), (), SpatialInfo("cat", "dog", "near"), (NumeracyInfo(1, "tv"),))
    assert reward.applies(annotated) and 0 <= reward.score(images[:1], [annotated]) <= 1


def test_bad_rows_have_clear_errors(folder: Path, reward: GroundingReward, images: Tensor) -> None:
    behind = spatial("cat", "behind", "dog")
    with pytest.raises(ValueError, match="'cat behind dog': unknown locality 'behind'; known are left of, .* near"):
        reward.score(images[:2], [EXAMPLES[0], behind])
    assert GroundingReward.from_pretrained(folder, t2i_r1_compat=True).score(images[:1], [behind]) <= 0.4
    long = Example("p", "object", tuple(f"thing{i}" for i in range(10)))
    with pytest.raises(ValueError, match=f"make .* tokens, the model reads {MAX_TOKENS}: 'thing0 . thing1"):
        reward.score(images[:2], [EXAMPLES[0], long])
    empty = Example("p", "object", ("cat", "\u200b"))
    with pytest.raises(ValueError, match="no token for the noun"):
        reward.score(images[:1], [empty])
    for example, words in (
        (behind, "unknown locality 'behind'"),
        (long, "the model reads"),
        (empty, "no token for the noun"),
    ):
        with pytest.raises(ValueError, match=words):
            reward.check(example)
    for example in (*EXAMPLES, Example("p", "non")):
        reward.check(example)
    GroundingReward.from_pretrained(folder, t2i_r1_compat=True).check(behind)


def test_half_precision_keeps_coordinates_in_float32(folder: Path, reward: GroundingReward, images: Tensor) -> None:
    names = [phrases(example) for example in EXAMPLES]
    exact = reward.detect(images, names)
    half = GroundingReward.from_pretrained(folder, dtype="float16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    off: list[float] = []  # of each query; a rounding may swap two proposals of nearly equal rank, which moves both
    for (boxes, scores), (their_boxes, their_scores) in zip(half.detect(images, names), exact, strict=True):
        assert boxes.dtype == scores.dtype == torch.float32
        off += torch.maximum((boxes - their_boxes).abs().amax(1), (scores - their_scores).abs().amax(0)).tolist()
    assert 1e-6 < sorted(off)[len(off) // 2] < 5e-3 and sum(error < 0.02 for error in off) > 0.8 * len(off)
    brain = GroundingReward.from_pretrained(folder, dtype=torch.bfloat16).score(images, EXAMPLES)
    assert brain.dtype == torch.float32 and ((brain >= 0) & (brain <= 1)).all()
    with pytest.raises(ValueError, match="not in 'int8'"):
        GroundingReward.from_pretrained(folder, dtype="int8")


def test_published_names_of_weights(folder: Path) -> None:
    """Those of IDEA-Research/grounding-dino-tiny, so that what these tests load is what users have."""
    names = load_file(folder / "model.safetensors")
    for name in (
        "bbox_embed.0.layers.2.weight",
        "model.backbone.conv_encoder.model.encoder.layers.0.blocks.0.attention.self.query.weight",
        "model.decoder.layers.1.encoder_attn_text.out_proj.weight",
        "model.encoder.layers.0.fusion_layer.vision_param",
        "model.encoder_output_bbox_embed.layers.0.weight",
        "model.input_proj_vision.3.0.weight",
        "model.query_position_embeddings.weight",
        "model.text_backbone.encoder.layer.0.attention.self.query.weight",
        "model.text_projection.weight",
    ):
        assert name in names


def test_other_files(folder: Path, tmp_path: Path, reward: GroundingReward, images: Tensor) -> None:
    """pytorch_model.bin is as good; without settings for pictures the published ones hold."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = GroundingReward.from_pretrained(str(tmp_path))
    assert torch.equal(again.score(images, EXAMPLES), reward.score(images, EXAMPLES))
    (tmp_path / "preprocessor_config.json").unlink()
    preprocess = GroundingReward.from_pretrained(tmp_path).preprocess
    assert (preprocess.size, preprocess.max_size, preprocess.resample, preprocess.fit) == (
        800,
        1333,
        "bilinear",
        "keep",
    )
    assert preprocess(images[:1, :, :24, :24]).shape[-2:] == (800, 800)


def test_wrong_checkpoints(folder: Path, tmp_path: Path) -> None:
    def without(*names: str) -> Path:
        copy = tmp_path / "-".join(names)
        shutil.copytree(folder, copy)
        for name in names:
            (copy / name).unlink()
        return copy

    for path in (tmp_path / "absent", without("model.safetensors"), without("tokenizer.json")):
        with pytest.raises(MissingCheckpoint, match="hf download IDEA-Research/grounding-dino-tiny"):
            GroundingReward.from_pretrained(path)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a checkpoint of 'bert', not of 'grounding-dino'"):
        GroundingReward.from_pretrained(tmp_path / "bert")
    other = without("preprocessor_config.json", "tokenizer.json")
    BertTokenizer().save_pretrained(other)
    with pytest.raises(ValueError, match="not have the vocabulary of an uncased BERT"):
        GroundingReward.from_pretrained(other)
    other = without("config.json")
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"encoder_ffn_dim": 64}, {"decoder_layers": 3}):
        (other / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match="missing or of another shape"):
            GroundingReward.from_pretrained(other)
