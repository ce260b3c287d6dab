"""What a step says of its pictures and plans."""

from __future__ import annotations

import pytest
import torch

from bicot.grpo.distributed import Ranks
from bicot.grpo.metrics import image_diversity, plan_diversity

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("side", [8, 64, 96])
def test_the_diversity_of_pictures_is_their_mean_rms_distance(side: int) -> None:
    """Of a group, and not of pictures of different groups; what differs in less than a pixel of 64 counts less."""
    greys = torch.tensor([0.0, 0.5, 1.0, 0.25, 0.25, 0.25])  # two groups
    images = greys.view(-1, 1, 1, 1).expand(-1, 3, side, side)
    mean = image_diversity(images, 3, ALONE)["image_diversity"].item()
    assert mean == pytest.approx(((0.5 + 1.0 + 0.5) / 3 + 0) / 2)
    noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = (noise[0] - noise[1]).square().mean().sqrt().item()
    found = image_diversity(noise, 2, ALONE)["image_diversity"].item()
    assert found == pytest.approx(expected, rel=1e-5) if side <= 64 else 0.3 * expected < found < expected
    close = torch.stack([noise[0], noise[0] + 1e-5])
    assert image_diversity(close, 2, ALONE)["image_diversity"].item() == pytest.approx(1e-5, rel=0.05)
    assert image_diversity(torch.empty(4, 0, 0, 0), 2, ALONE) == {}


def test_the_diversity_of_plans_is_that_of_their_sets_of_tokens() -> None:
    assert plan_diversity([[1, 2, 3], [3, 2, 1, 1]], 2) == 0
    assert plan_diversity([[1, 2], [3, 4], [5], [5]], 2) == 0.5
    assert plan_diversity([[1, 2], [2, 3], [1, 2]], 3) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert plan_diversity([[], []], 2) == 0
