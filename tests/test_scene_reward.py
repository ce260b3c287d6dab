"""The scene reward: what it pays for, in the points its docstring promises. Scenes are drawn by the toy's world."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from bicot.grpo.data import parse_example
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo
from bicot.toy.reward import SceneRelation, SceneReward
from bicot.toy.world import POSITIONS, Scene, SceneObject, make_prompts, random_scene, render


def scene(*things: str) -> Scene:
    """`"red circle at top-left"`, … -> a scene."""
    parts = [thing.split(maxsplit=3) for thing in things]
    return tuple(SceneObject(colour, shape, POSITIONS.index(place)) for colour, shape, _, place in parts)


def color(*names: str) -> Example:
    return Example("p", "color", tuple(name.split()[-1] for name in names), names)


def numeracy(*counts: tuple[int, str]) -> Example:
    return Example("p", "numeracy", numeracy_info=tuple(NumeracyInfo(*count) for count in counts))


def spatial(first: str, locality: str, second: str) -> Example:
    return Example("p", "spatial", spatial_info=SpatialInfo(first, second, locality))


def score(example: Example, *things: str) -> float:
    return SceneReward().score(render([scene(*things)]), [example]).item()


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, list[Example]]:
    """A right picture for every prompt of the toy."""
    prompts = [prompt for part in make_prompts(0) for prompt in part]
    rng = random.Random(0)
    scenes = [random_scene(prompt.content, rng) for prompt in prompts]
    return render(scenes), [parse_example(prompt.line) for prompt in prompts]


def test_right_pictures_score_one(world: tuple[Tensor, list[Example]]) -> None:
    images, examples = world
    assert {e.task_type for e in examples} == {"object", "color", "numeracy", "spatial"}
    torch.testing.assert_close(SceneReward().score(images, examples), torch.ones(len(examples)))
    relation = SceneRelation().score(images, examples)
    for held, example in zip(relation.tolist(), examples, strict=True):
        assert held == 1 if example.spatial_info else held != held


def test_a_batch_scores_as_its_pictures_do_alone(world: tuple[Tensor, list[Example]]) -> None:
    images, examples = world[0][::29], world[1][::29]
    images = (images + 0.3 * torch.randn(images.shape, generator=torch.manual_seed(0))).clamp(0, 1)
    alone = [SceneReward().score(image[None], [e]) for image, e in zip(images, examples, strict=True)]
    together = SceneReward().score(images, examples)
    assert torch.equal(together, torch.cat(alone)) and 0 < together.mean() < 1


def test_size_and_dtype_do_not_matter(world: tuple[Tensor, list[Example]]) -> None:
    images, examples = world[0][::40], world[1][::40]
    for size, least in ((64, 0.999), (384, 0.999), (100, 0.9)):  # 100: cells no longer fall on whole pixels
        larger = torch.nn.functional.interpolate(images, (size, size), mode="nearest")
        assert SceneReward().score(larger.bfloat16(), examples).min() > least


def test_noise_and_blank_pictures_earn_nothing(world: tuple[Tensor, list[Example]]) -> None:
    examples = world[1][::20]
    generator = torch.manual_seed(0)
    shape = (len(examples), 3, 32, 32)
    corners = torch.rand(shape, generator=generator).round()
    blocks = torch.rand(len(examples), 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for images, most in (
        (torch.zeros(shape), 0.0),
        (torch.ones(shape), 0.0),
        (torch.rand(shape, generator=generator), 0.0),
        (corners, 0.0),
        (blocks, 0.1),
    ):
        scores = SceneReward().score(images, examples)
        assert scores.min() >= 0 and scores.mean() <= most


def test_color_binding() -> None:
    example = color("red circle", "blue square")
    assert score(example, "red circle at top", "blue square at left") == 1
    assert score(example, "red circle at top") == 0.5
    assert score(example, "green circle at top", "blue square at left") == 0.75
    assert score(example, "red triangle at top", "blue square at left") == 0.75
    assert score(example, "blue circle at top", "red square at left") == 0.5  # attributes swapped
    assert score(example, "yellow triangle at top", "green triangle at left") == 0
    assert score(example, "red circle at top", "blue square at left", "blue square at right") == pytest.approx(2 / 3)


def test_a_plain_name_takes_any_colour_and_the_best_assignment() -> None:
    example = Example("p", "color", ("circle", "circle"), ("red circle",))
    assert score(example, "red circle at top", "blue circle at left") == 1
    assert score(example, "red circle at top", "red square at left") == 0.75  # the circle, and half a red circle


def test_object() -> None:
    example = Example("p", "object", ("circle", "square"))
    assert score(example, "red circle at top", "red square at left") == 1
    assert score(example, "red circle at top", "red triangle at left") == 0.5
    assert score(example, *(f"red circle at {place}" for place in POSITIONS)) == pytest.approx(1 / 9)


def test_numeracy_falls_with_the_count_error() -> None:
    example = numeracy((3, "red circles"))
    places = ("top-left", "center", "bottom", "right", "top-right", "left", "bottom-right")
    got = [score(example, *(f"red circle at {place}" for place in places[:n])) for n in range(1, 8)]
    # matched / max(required, detected) times 1 - error / required
    want = [1 / 3 * 1 / 3, 2 / 3 * 2 / 3, 1, 3 / 4 * 2 / 3, 3 / 5 * 1 / 3, 0, 0]
    assert got == pytest.approx(want)
    two = numeracy((2, "circle"), (1, "blue square"))
    assert score(two, "red circle at top", "green circle at left", "blue square at right") == 1
    assert score(two, "red circle at top", "blue square at left", "blue square at right") == pytest.approx(2.0 / 3 / 3)


@pytest.mark.parametrize(
    ("words", "place", "opposite"),
    [
        ("left of,on the left of,to the left of", "left", "right"),
        ("right of,on the right of", "right", "left"),
        ("above,on top of,on the top of,over", "top", "bottom"),
        ("below,under,beneath,underneath,on the bottom of", "bottom", "top"),
    ],
)
def test_relations(words: str, place: str, opposite: str) -> None:
    for locality in words.split(","):
        example = spatial("red circle", locality, "square")
        assert score(example, f"red circle at {place}", "blue square at center") == 1
        assert score(example, f"red circle at {opposite}", "blue square at center") == pytest.approx(0.3)
        # a relation needs both objects: with a wrong colour half of one object's points are gone too
        assert score(example, f"green circle at {place}", "blue square at center") == pytest.approx(0.3 * 0.75)
        assert score(example, f"red circle at {place}") == pytest.approx(0.15)
        # an object everywhere makes every relation hold, and does not pay
        crowd = (f"red circle at {place}", f"red circle at {opposite}", "blue square at center")
        assert score(example, *crowd) == pytest.approx(2 / 3)


def test_a_diagonal_satisfies_both_relations_and_a_knight_move_one() -> None:
    diagonal = ("red circle at top-left", "blue square at center")
    assert score(spatial("circle", "left of", "square"), *diagonal) == 1
    assert score(spatial("circle", "above", "square"), *diagonal) == 1
    knight = ("red circle at top-left", "blue square at bottom")
    assert score(spatial("circle", "above", "square"), *knight) == 1
    assert score(spatial("circle", "left of", "square"), *knight) == pytest.approx(0.3)


def test_stray_paint_costs() -> None:
    image = render([scene("red circle at top")])
    image[:, :, 24:26, 0:6] = torch.tensor([0.1, 0.2, 0.8]).view(1, 3, 1, 1)  # too small for an object
    got = SceneReward().score(image, [color("red circle")]).item()
    assert got == pytest.approx(52 / 64)


def test_what_it_cannot_judge_is_missing() -> None:
    image = render([scene("red circle at top")])
    for example in (
        Example("p", "non"),
        Example("p", "object", ("circle", "dog")),
        numeracy((2, "dogs")),
        spatial("circle", "near", "square"),
    ):
        assert SceneReward().score(image, [example]).isnan().all() and not SceneReward().applies(example)
    assert SceneReward().score(image[:0], []).shape == (0,)


def test_wrong_shape_of_images() -> None:
    with pytest.raises(ValueError, match=r"images must be \[S, 3, H, H\], got \[1, 3, 32, 16\]"):
        SceneReward().score(torch.rand(1, 3, 32, 16), [color("red circle")])
