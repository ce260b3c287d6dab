"""The plan reward against cases worked out by hand, and against prompts, which say what they ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PUBLISHED_PROMPTS, TOY

from bicot.grpo.data import PromptFile
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo
from bicot.rewards.config import RewardConfig
from bicot.rewards.plan import PlanReward, words

COLOR = Example("a red apple and a blue bench", "color", ("apple", "bench"), ("red apple", "blue bench"))
SPATIAL = Example("", "spatial", ("dog", "chair"), spatial_info=SpatialInfo("dog", "chair", "left of"))
ABOVE = replace(SPATIAL, spatial_info=SpatialInfo("dog", "chair", "above"))
NEAR = replace(SPATIAL, spatial_info=SpatialInfo("dog", "chair", "next to"))
BEHIND = replace(SPATIAL, spatial_info=SpatialInfo("dog", "chair", "behind"))
PAIR = Example("", "spatial", spatial_info=SpatialInfo("red ball", "blue ball", "below"))
BOTTLES = Example("", "numeracy", ("bottle",), numeracy_info=(NumeracyInfo(3, "bottle"),))
MIXED = Example("", "numeracy", ("knife", "glass"), numeracy_info=(NumeracyInfo(2, "knife"), NumeracyInfo(1, "glass")))
CAKE = Example("", "shape", ("cake", "topper"), ("round cake", "square cake topper"))


@pytest.mark.parametrize(
    ("example", "plan", "both", "asked", "said"),
    [  # facts of both, of the annotations, of the plan
        (COLOR, "", 0, 4, 0),
        (COLOR, "A meadow in the evening sun.", 0, 4, 0),
        (COLOR, "Red apples lie on a blue, wooden bench.", 3, 4, 3),  # "blue" does not stand by "bench"
        (COLOR, "One RED APPLE on each of two blue benches", 4, 4, 4),
        (COLOR, "a blue apple and a red bench", 2, 4, 4),
        (COLOR, "a red apple, a green apple, a blue bench", 4, 4, 5),
        (COLOR, "a red apple, a shiny apple, a blue bench, a green tree", 4, 4, 4),
        (COLOR, "pineapples", 0, 4, 0),
        (CAKE, "a round cake and a square cake topper", 4, 4, 4),
        (CAKE, "a square cake and a topper", 2, 4, 3),
        (BOTTLES, "Three bottles stand on a shelf. A bottle is green, one of the bottles is open.", 2, 2, 2),
        (BOTTLES, "3 tall glass bottles", 2, 2, 2),
        (BOTTLES, "three very tall glass bottles", 1, 2, 1),  # too far away
        (BOTTLES, "two bottles, and one more bottle", 1, 2, 3),
        (BOTTLES, "three. bottles", 1, 2, 1),
        (MIXED, "two knives and a glass", 4, 4, 4),
        (MIXED, "two knives, glasses", 3, 4, 3),  # no number counts two things
        (MIXED, "one knife and two glasses", 2, 4, 4),
        (SPATIAL, "The dog sits to the left of the chair.", 3, 3, 3),
        (SPATIAL, "A chair stands on the right side of two dogs", 3, 3, 3),
        (SPATIAL, "a dog near and left of a chair", 3, 3, 3),
        (SPATIAL, "a dog right of a chair", 2, 3, 3),
        (SPATIAL, "a dog above and left of a chair", 3, 3, 4),
        (SPATIAL, "A dog on the left. Of course a chair", 2, 3, 2),
        (SPATIAL, "There is a dog. Left of it is a chair.", 2, 3, 2),
        (ABOVE, "a chair underneath a dog", 3, 3, 3),
        (ABOVE, "a dog on top of a chair", 3, 3, 3),
        (NEAR, "a chair beside a dog", 3, 3, 3),
        (NEAR, "a chair on the side of a dog", 3, 3, 3),
        (BEHIND, "a dog behind a chair", 3, 3, 3),
        (BEHIND, "a chair behind a dog", 2, 3, 3),
        (BEHIND, "a chair, and behind it a dog", 2, 3, 2),
        (PAIR, "a blue ball over a red ball", 3, 3, 3),
        (PAIR, "a red ball and a blue ball", 2, 3, 2),
    ],
)  # fmt: skip
def test_cases_by_hand(example: Example, plan: str, both: int, asked: int, said: int) -> None:
    score = PlanReward().score(torch.zeros(1, 3, 4, 4), [replace(example, plan=plan)])
    assert score.tolist() == [pytest.approx(2 * both / (asked + said))]


def test_singular_and_plural_are_one_word() -> None:
    pairs = (
        "apple apples, box boxes, house houses, bus buses, glass glasses, knife knives, butterfly butterflies, "
        "toy toys, shoe shoes, eye eyes, tomato tomatoes, woman women, person people, child children, tv tvs, "
        "cookie cookies, ski skis, horse horses, leaf leaves, watch watches, zebra zebras, foot feet, lens lenses, "
        "canvas canvases, thermos thermoses"
    )
    for pair in pairs.split(", "):
        one, other = words(pair)
        assert one == other, pair
    assert len(set(words("bee be buss bus glass gas grass cat cart"))) == 9


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_it_trains_and_monitors(schedule: str) -> None:
    samples = [replace(COLOR, plan="a red apple, a blue bench"), Example("it rains", "non", plan="rain"), COLOR]
    images = torch.rand(3, 3, 4, 4)
    for config in (RewardConfig("plan", schedule=schedule), RewardConfig("scene", monitor="plan", schedule=schedule)):
        scores = config.build().submit(images, samples).result()[:, -1]
        torch.testing.assert_close(scores, torch.tensor([1.0, torch.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize(("path", "share"), [(TOY / "train.jsonl", 1.0), (PUBLISHED_PROMPTS, 0.97)])
def test_a_prompt_says_what_it_asks_for(path: Path, share: float) -> None:
    if not path.exists():
        pytest.skip("the published prompts are not here")
    examples = [replace(example, plan=example.prompt) for example in PromptFile(path).examples]
    assert all(map(PlanReward().applies, examples))
    scores = PlanReward().score(torch.zeros(1), examples)
    assert (scores == 1).float().mean() >= share and scores.mean() > 0.98  # the others' annotations have typing errors


def test_a_plan_of_one_word_takes_no_time() -> None:
    for plan in ("bottle " * 4000, "3" * 5000, "²³ bottles", "!?" * 4000):
        assert PlanReward().score(torch.zeros(1), [replace(BOTTLES, plan=plan)]).isfinite().all()
