"""GIT's answers, all questions of all pictures at once, against one picture and one question at a time as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_git import SIZE, git_model, git_tokenizer, make_git
from torch import Tensor
from transformers import CLIPImageProcessorPil, GitForCausalLM

from bicot.rewards.base import Example
from bicot.rewards.checkpoints import MissingCheckpoint
from bicot.rewards.git_vqa import GitReward, clip_preprocess
from bicot.rewards.preprocess import CLIP_MEAN, CLIP_STD, MAX_ERROR, Preprocess

TOLERANCE: dict[str, Any] = dict(rtol=0, atol=1e-5)  # of probabilities; float32 sums in another order
EXAMPLES = (
    *[Example("p", "color", ("apple", "bench"), ("red apple", "blue bench"))] * 3,
    Example("p", "texture", ("bench",), ("a tall wooden bench", "cats", "zebra-striped dog's", "no dog", "red")),
    Example("p", "object", ("cat",)),
    Example("p", "non", ("dog", "tall cat", "x")),
    Example("p", "complex", ("Red Apple", "dog")),
)
SPATIAL, NUMERACY = Example("p", "spatial", ("cat", "dog")), Example("p", "numeracy", ("cat",))
BARE = Example("p", "non")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_git(tmp_path_factory.mktemp("git"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> GitReward:
    return GitReward.from_pretrained(folder)


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """[count, 3, height, width] of 8-bit values, each picture with its own tint."""
    generator = torch.manual_seed(1)
    tint, noise = (torch.rand(count, 3, *size, generator=generator) for size in ((1, 1), (height, width)))
    return (tint * (0.5 + 0.5 * noise) * 255).round() / 255


@torch.no_grad()
def published(folder: Path, image: Tensor, example: Example) -> float:
    """The published loop: PIL, one question at a time, the softmax of the whole vocabulary."""
    model = GitForCausalLM.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), git_tokenizer()
    yes, no = (tokenizer.encode(word)[1] for word in ("yes", "no"))
    array = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    pixels = processor(Image.fromarray(array), return_tensors="pt").pixel_values
    scores = []
    for phrase in example.attr_nouns or example.nouns:
        ids = [tokenizer.cls_token_id, *tokenizer(f"{phrase}?", add_special_tokens=False).input_ids]
        p = model(pixel_values=pixels, input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        scores.append((p[yes] / (p[yes] + p[no])).item())
    return sum(scores) / len(scores)


def test_scores_as_the_published_code_does_one_at_a_time(folder: Path, reward: GitReward) -> None:
    images = pictures(len(EXAMPLES))
    scores = reward.score(images, EXAMPLES)
    expected = torch.tensor([published(folder, i, e) for i, e in zip(images, EXAMPLES, strict=True)])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, **TOLERANCE)
    for image, example, score in zip(images.split(1), EXAMPLES, scores, strict=True):
        torch.testing.assert_close(reward.score(image, [example])[0], score, **TOLERANCE)


def test_scores_tell_pictures_and_questions_apart(reward: GitReward) -> None:
    images = pictures(4)
    of_pictures = reward.score(images, EXAMPLES[:1] * 4)
    of_questions = torch.stack([reward.score(images[:1], [e])[0] for e in EXAMPLES[2:]])
    for scores in (of_pictures, of_questions):
        gaps = (scores[:, None] - scores).abs() + torch.eye(len(scores))
        assert gaps.min() > 100 * TOLERANCE["atol"]


def test_a_question_is_not_changed_by_its_neighbours(reward: GitReward) -> None:
    """Each alone, all together, and in another order."""
    image, asked = pictures(1), ("red apple", "dog", "a tall wooden bench")
    alone = torch.stack([reward.score(image, [Example("p", "color", (), (q,))])[0] for q in asked])
    for order in (asked, asked[::-1]):
        together = reward.score(image, [Example("p", "color", (), order)])[0]
        torch.testing.assert_close(together, alone.mean(), **TOLERANCE)


@pytest.mark.parametrize("size", [(40, 40), (20, 20), (48, 36)])
def test_pictures_of_other_sizes(folder: Path, reward: GitReward, size: tuple[int, int]) -> None:
    """PIL rounds what it resamples to 8 bits; noise of that size measures how much a score may follow."""
    images = pictures(3, *size)
    scores = reward.score(images, EXAMPLES[:3])
    expected = torch.tensor([published(folder, image, e) for image, e in zip(images, EXAMPLES, strict=False)])
    generator = torch.manual_seed(2)
    noise = [MAX_ERROR * (2 * torch.rand(images.shape, generator=generator) - 1) for _ in range(8)]
    follows = max((reward.score((images + n).clamp(0, 1), EXAMPLES[:3]) - scores).abs().max().item() for n in noise)
    assert (scores - expected).abs().max() < 2 * follows
    assert scores.std() > 10 * follows


def test_rows_without_a_question_have_no_score(reward: GitReward) -> None:
    rows = [SPATIAL, EXAMPLES[0], BARE, NUMERACY, EXAMPLES[4]]
    assert [reward.applies(e) for e in rows] == [False, True, False, False, True]
    images = pictures(5)
    scores = reward.score(images, rows)
    assert scores.isnan().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(scores[[1, 4]], reward.score(images[[1, 4]], [rows[1], rows[4]]), **TOLERANCE)
    assert reward.score(images[:2], [SPATIAL, BARE]).isnan().all()


def test_nouns_that_cannot_be_asked_about_are_refused(reward: GitReward) -> None:
    for example in (*EXAMPLES, SPATIAL, BARE):
        reward.check(example)
    reward.check(Example("p", "object", ("a" * 62,)))
    for noun, words in (("\u200b", "no token for the noun '.u200b'"), ("a" * 63, "64 tokens, the model reads 63")):
        with pytest.raises(ValueError, match=words):
            reward.check(Example("p", "object", ("cat", noun)))


def test_compat_scores_rows_as_published(folder: Path, reward: GitReward) -> None:
    compat = GitReward.from_pretrained(folder, t2i_r1_compat=True)
    rows = [SPATIAL, EXAMPLES[0], BARE, NUMERACY]
    assert all(compat.applies(e) for e in rows)
    images = pictures(4)
    expected = [0.0, reward.score(images[1:2], rows[1:2]).item(), 1.0, 0.0]
    torch.testing.assert_close(compat.score(images, rows), torch.tensor(expected), **TOLERANCE)


def test_images_are_encoded_once_and_only_if_asked_about(reward: GitReward) -> None:
    seen: list[int] = []
    hook = reward.model.git.image_encoder.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    reward.score(pictures(4), [EXAMPLES[3], SPATIAL, EXAMPLES[5], BARE])
    hook.remove()
    assert seen == [2]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_ends_in_float32(folder: Path, reward: GitReward, dtype: Any) -> None:
    half = GitReward.from_pretrained(folder, dtype=dtype)
    images = pictures(len(EXAMPLES))
    scores, exact = half.score(images, EXAMPLES), reward.score(images, EXAMPLES)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.to(half.model.dtype).float())
    assert (scores - exact).abs().max() < 8 * torch.finfo(half.model.dtype).eps


def test_files_that_are_missing_or_of_something_else(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            MissingCheckpoint, match="hf download microsoft/git-large-vqav2\n.*rewards.options.git.path"
        ):
            GitReward.from_pretrained(path)
    make_git(tmp_path)
    tokenizer = (tmp_path / "tokenizer.json").rename(tmp_path / "moved.json")
    with pytest.raises(MissingCheckpoint, match="it has neither tokenizer.json nor vocab.txt\n.*\n.*hf download"):
        GitReward.from_pretrained(tmp_path)
    tokenizer.rename(tmp_path / "tokenizer.json")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del weights["git.encoder.layer.2.output.dense.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"1 weights are missing .*'git.encoder.layer.2.output.dense.weight'"):
        GitReward.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match="is a checkpoint of 'blip', not of 'git'"):
        GitReward.from_pretrained(tmp_path)


def test_yes_and_no_must_be_single_tokens() -> None:
    tokenizer = git_tokenizer()
    vocab = {w: i for w, i in tokenizer.get_vocab().items() if w != "no"}
    with pytest.raises(ValueError, match=r"'no' must be one known token, but the tokenizer gives \[\d+, \d+\]"):
        GitReward(git_model(), type(tokenizer)(vocab=vocab), Preprocess(SIZE, CLIP_MEAN, CLIP_STD))


def test_preprocessing_from_the_checkpoint(tmp_path: Path) -> None:
    made = GitReward.from_pretrained(
        make_git(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 1.0, 2.0], resample=2)
    )
    assert made.preprocess == Preprocess(SIZE, (0.1, 0.2, 0.3), (1.0, 1.0, 2.0), "bilinear")
    good: dict[str, Any] = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    assert clip_preprocess(good) == clip_preprocess({"size": 8, "crop_size": 8}) == Preprocess(8, CLIP_MEAN, CLIP_STD)
    for bad in (
        {"crop_size": {"height": 6, "width": 6}},
        {"size": {"height": 8, "width": 16}},
        {"size": {}},
        {"size": None, "crop_size": None},
        {"do_center_crop": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 0},
    ):
        with pytest.raises(ValueError, match="cannot prepare pictures as this preprocessor_config.json asks"):
            clip_preprocess(good | bad)
