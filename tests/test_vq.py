"""The picture decoder against the VQ model that it copies."""

from __future__ import annotations

import torch
from tiny import tiny_policy

from bicot.model.vq import ImageDecoder


def test_pictures_are_those_of_the_vq_model() -> None:
    policy = tiny_policy()
    decoder = ImageDecoder(policy)
    decoder.refresh(policy.model.model.vqmodel)
    tokens = torch.randint(0, 37, (5, 16))
    raw = policy.model.model.vqmodel.decode(tokens)
    whole = decoder(tokens)
    torch.testing.assert_close(whole, ((raw + 1) / 2).clamp(0, 1))
    assert raw.min() < -1 or raw.max() > 1 or raw.std() > 0.01, "the pictures are not all grey"
    decoder.chunk = 2
    torch.testing.assert_close(decoder(tokens), whole)


def test_refresh_follows_the_vq_model() -> None:
    policy = tiny_policy()
    decoder = ImageDecoder(policy)
    decoder.refresh(policy.model.model.vqmodel)
    tokens = torch.randint(0, 37, (2, 16))
    before = decoder(tokens)
    with torch.no_grad():
        policy.model.model.vqmodel.decoder.conv_out.bias.add_(0.2)
    assert torch.equal(decoder(tokens), before)
    decoder.refresh(policy.model.model.vqmodel)
    torch.testing.assert_close(decoder(tokens), (before + 0.1).clamp(0, 1))


def test_memory_bounds_the_chunk() -> None:
    """Janus-Pro's decoder: 384 x 384 pixels, 128 channels, bfloat16."""
    policy = tiny_policy()
    policy.model.bfloat16()
    vq = policy.config.vq_config
    vq.num_patches, vq.base_channels, vq.channel_multiplier = 24, 128, [1, 1, 2, 2, 4]
    assert 2 <= ImageDecoder(policy).chunk <= 8
