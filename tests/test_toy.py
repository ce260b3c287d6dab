"""The toy: its world, its committed checkpoint, and the recipe that makes both from nothing."""

from __future__ import annotations

import json
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TOY
from transformers import AutoTokenizer, JanusForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import logging

from bicot.grpo.data import PromptFile, parse_example
from bicot.model.prompts import PromptEncoder, PromptFormat
from bicot.model.settings import RolloutSettings
from bicot.toy.recipe import SETTINGS, Recipe, make_tokenizer, make_toy
from bicot.toy.reward import SceneReward
from bicot.toy.world import Scene, make_prompts, mistaken, plan_of, random_scene, render

FILES = [
    "bicot.json", "config.json", "generation_config.json", "heldout.jsonl", "model.safetensors",
    "reasoning_prompt.txt",
]  # fmt: skip
FILES += ["tokenizer.json", "tokenizer_config.json", "train.jsonl"]


@pytest.fixture(scope="module")
def toy() -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(TOY).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOY)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[dict, Scene]]:
    rng = random.Random(1)
    prompts = [prompt for part in make_prompts(0) for prompt in part]
    return [(prompt.line, random_scene(prompt.content, rng)) for prompt in prompts]


def test_prompts_are_disjoint_by_content_and_in_the_published_schema() -> None:
    train, heldout = make_prompts(0)
    assert not {p.content for p in train} & {p.content for p in heldout}
    for part, name in ((train, "train.jsonl"), (heldout, "heldout.jsonl")):
        assert [p.line for p in part] == [json.loads(line) for line in (TOY / name).read_text().splitlines()]
        assert len(PromptFile(TOY / name).examples) == len({p.line["prompt"] for p in part}) == len(part)
    for task_type in ("object", "color", "numeracy", "spatial"):
        counts = [sum(p.content.task_type == task_type for p in part) for part in (train, heldout)]
        assert 0.12 < counts[1] / sum(counts) < 0.18


def test_a_picture_is_its_plan(scenes: list[tuple[dict, Scene]]) -> None:
    row, scene = scenes[-1]
    picture = render([scene])[0]
    assert picture.shape == (3, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    assert plan_of(scene).count(".") == len(scene) == len(row["nouns"])
    blank = render([()])[0]
    for cell in range(9):
        top, left = (12 * i for i in divmod(cell, 3))
        part = (slice(None), slice(top, top + 8), slice(left, left + 8))
        assert torch.equal(picture[part], blank[part]) == (cell not in {thing.cell for thing in scene})


def test_a_mistaken_scene_differs_and_scores_less(scenes: list[tuple[dict, Scene]]) -> None:
    rng = random.Random(0)
    wrong = [mistaken(scene, rng) for _, scene in scenes]
    assert all(a != b for a, (_, b) in zip(wrong, scenes, strict=True))
    scores = SceneReward().score(render(wrong), [parse_example(row) for row, _ in scenes])
    assert 0.5 < scores.mean() < 0.9


def test_the_checkpoint_loads_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(f for f in FILES if (TOY / f).is_file()) == FILES
    assert (TOY / "model.safetensors").stat().st_size < 6e6
    logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = JanusForConditionalGeneration.from_pretrained(TOY, output_loading_info=True)
    logging.disable_propagation()
    assert not any(info.values()) and not caplog.records
    assert model.dtype == torch.float32
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert RolloutSettings.load(TOY) == SETTINGS
    assert PromptFormat.from_files("t2i_r1", "", str(TOY / "reasoning_prompt.txt")) == SETTINGS.prompts
    assert model.generation_config.generation_kwargs["boi_token_id"] == 5


def test_reconstructions_score(toy: JanusForConditionalGeneration, scenes: list[tuple[dict, Scene]]) -> None:
    rows, drawn = zip(*scenes[::5], strict=True)
    images = render(drawn)
    with torch.no_grad():
        tokens = toy.model.vqmodel.encode(images * 2 - 1).image_tokens.view(len(images), -1)
        again = (toy.model.vqmodel.decode(tokens) / 2 + 0.5).clamp(0, 1)
    scores = SceneReward().score(again, [parse_example(row) for row in rows])
    assert tokens.shape[1] == 64 and scores.mean() >= 0.95


def test_tokenizer(tokenizer: PreTrainedTokenizerBase, scenes: list[tuple[dict, Scene]]) -> None:
    for template in ("t2i_r1", "janus"):
        encoder = PromptEncoder(tokenizer, replace(SETTINGS.prompts, chat_template=template), 256)
        for row, scene in scenes[::10]:
            plan = plan_of(scene)
            ids = tokenizer(plan, add_special_tokens=False)["input_ids"]
            assert encoder.decode_plan([*ids, tokenizer.eos_token_id]) == plan
            for prompt in (encoder.plan_ids(row["prompt"], 40), encoder.image_ids(row["prompt"], plan, 64)):
                assert prompt.count(tokenizer.bos_token_id) == 1 == (prompt[0] == tokenizer.bos_token_id)
                assert tokenizer.unk_token_id not in prompt
    words = [word for word in tokenizer.get_vocab() if not re.fullmatch("<.*>", word)]
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == words
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_recipe_runs_and_repeats(tmp_path: Path) -> None:
    recipe = Recipe(vq_steps=2, vq_batch=4, policy_steps=2, plan_batch=4, image_batch=2)
    for name in ("a", "b"):
        make_toy(tmp_path / name, seed=3, recipe=recipe)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "a")
    codes = model.model.vqmodel.quantize.embedding.weight
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(codes)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == model.config.text_config.vocab_size
