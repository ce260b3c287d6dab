"""The picture decoder against the VQ model that it copies."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import gpu

from bicot.model.graphs import StepGraphs
from bicot.model.policy import Policy
from bicot.model.vq import ImageDecoder


def decoder_of(policy: Policy) -> ImageDecoder:
    decoder = ImageDecoder(policy)
    decoder.refresh(policy.model.model.vqmodel)
    return decoder


def test_pictures_are_those_of_the_vq_model(policy: Policy) -> None:
    decoder = decoder_of(policy)
    tokens = torch.randint(0, 37, (5, 16))
    raw = policy.model.model.vqmodel.decode(tokens)
    whole = decoder(tokens)
    torch.testing.assert_close(whole, ((raw + 1) / 2).clamp(0, 1))
    assert raw.min() < -1 or raw.max() > 1 or raw.std() > 0.01, "the pictures are not all grey"
    decoder.most = 2
    torch.testing.assert_close(decoder(tokens), whole)


def test_refresh_follows_the_vq_model(policy: Policy) -> None:
    decoder = decoder_of(policy)
    tokens = torch.randint(0, 37, (2, 16))
    before = decoder(tokens)
    with torch.no_grad():
        policy.model.model.vqmodel.decoder.conv_out.bias.add_(0.2)
    assert torch.equal(decoder(tokens), before)
    decoder.refresh(policy.model.model.vqmodel)
    torch.testing.assert_close(decoder(tokens), (before + 0.1).clamp(0, 1))


def test_graphs_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds CUDA graphs, without CUDA; on a GPU the rollouts of other tests have them."""
    captured = []

    def record(self: StepGraphs, step: Callable[[], None]) -> Any:
        captured.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(StepGraphs, "_record", record)
    decoder = decoder_of(policy)
    tokens, more = torch.randint(0, 37, (2, 5, 16))
    decoder.most = 2
    whole = decoder(torch.cat([tokens, more]))
    decoder.graphs = StepGraphs(SimpleNamespace())  # type: ignore[arg-type]
    first, second = decoder(tokens), decoder(more)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    assert len(captured) == 2, "of two pictures, and of the last one"


@gpu
def test_graphs_decode_what_eager_passes_decode(policy: Policy) -> None:
    policy.model.cuda()
    decoder = decoder_of(policy)
    decoder.most, tokens = 2, torch.randint(0, 37, (5, 16), device="cuda")
    eager, stream = decoder(tokens), torch.cuda.Stream()
    decoder.graphs = StepGraphs(stream)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            graphed = decoder(tokens)
    stream.synchronize()
    torch.testing.assert_close(graphed, eager)


def test_memory_bounds_the_chunk(policy: Policy) -> None:
    """Janus-Pro's decoder: 384 x 384 pixels, 128 channels, bfloat16."""
    policy.model.bfloat16()
    vq = policy.config.vq_config
    vq.num_patches, vq.base_channels, vq.channel_multiplier = 24, 128, [1, 1, 2, 2, 4]
    assert 2 <= ImageDecoder(policy).most <= 8
