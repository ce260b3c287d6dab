"""Preprocessing of tensors is the models' own preprocessing of PIL pictures, but for PIL's rounding to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bicot.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, MAX_ERROR, Preprocess

CLIP = Preprocess(224, CLIP_MEAN, CLIP_STD)
DETECTOR = Preprocess(800, IMAGENET_MEAN, IMAGENET_STD, resample="bilinear", fit="keep", max_size=1333)
LLAVA = Preprocess(384, (0.5,) * 3, (0.5,) * 3, fit="pad")
SIZES = [(384, 384), (224, 224), (800, 800), (64, 64), (300, 512), (257, 190), (97, 64)]
PICTURES = ["smooth", "noise", "binary", "checks", "blocks"]


def picture(kind: str, height: int, width: int) -> Image.Image:
    """Binary pictures make bicubic overshoot; a constant that is added or a shift of a pixel shows on smooth ones."""
    random = np.random.default_rng(0)
    y, x, colour = np.mgrid[:height, :width, :3]
    pixels = {
        "smooth": 127 + 120 * np.sin(x / 17 + y / 23 + colour),
        "noise": random.integers(0, 256, (height, width, 3)),
        "binary": 255 * random.integers(0, 2, (height, width, 3)),
        "checks": 255 * ((x + y) % 2),
        "blocks": 255 * ((x // 5 + y // 3 + colour) % 2),
    }[kind]
    return Image.fromarray(pixels.round().astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def square(image: Image.Image) -> Image.Image:
    """LLaVA: in the middle of a square of SigLIP's mean colour."""
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), (127, 127, 127))
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def reference(preprocess: Preprocess, image: Image.Image) -> Tensor:
    processor: Any = CLIPImageProcessorPil() if preprocess is CLIP else GroundingDinoImageProcessorPil()
    if preprocess is LLAVA:
        processor, image = SiglipImageProcessorPil(size={"height": 384, "width": 384}), square(image)
    return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])


def levels(preprocess: Preprocess, ours: Tensor, theirs: Tensor) -> Tensor:
    """Difference before normalisation."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (ours - theirs).abs() * torch.tensor(preprocess.std).view(3, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocess", [CLIP, DETECTOR, LLAVA], ids=["clip", "detector", "llava"])
def test_equals_the_processor_on_pil_pictures(preprocess: Preprocess, size: tuple[int, int]) -> None:
    for kind in PICTURES[:3] if preprocess is DETECTOR else PICTURES:  # bilinear does not overshoot
        for height, width in {size, size[::-1]}:
            image = picture(kind, height, width)
            error = levels(preprocess, preprocess(tensor(image)), reference(preprocess, image))
            assert error.max() <= MAX_ERROR, f"{kind}: {error.max() * 255} levels"
            assert error.mean() <= 0.5 / 255  # rounding; a bias would stand out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preprocess", [CLIP, DETECTOR, LLAVA], ids=["clip", "detector", "llava"])
def test_a_gpu_gives_the_same(preprocess: Preprocess) -> None:
    for kind, size in [("binary", (384, 384)), ("smooth", (300, 512)), ("noise", (97, 64))]:
        image = picture(kind, *size)
        error = levels(preprocess, preprocess(tensor(image).cuda()).cpu(), reference(preprocess, image))
        assert error.max() <= MAX_ERROR


def test_the_bound_is_no_larger_than_it_must_be() -> None:
    worst = max(
        levels(CLIP, CLIP(tensor(image)), reference(CLIP, image)).max()
        for image in (picture(kind, 384, 384) for kind in PICTURES)
    )
    assert MAX_ERROR / 1.5 < worst <= MAX_ERROR


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((384, 384), (800, 800)),
        ((300, 500), (800, 1333)),
        ((500, 1334), (500, 1334)),  # the processor lets a picture be whose shortest edge is right already
        ((61, 1000), (81, 1333)),
    ],
)
def test_size_of_the_detector(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for turn in (1, -1):
        image = picture("smooth", *size[::turn])
        assert DETECTOR(tensor(image)).shape == reference(DETECTOR, image).shape == (1, 3, *expected[::turn])


def test_a_picture_of_the_right_size_only_changes_its_scale() -> None:
    for preprocess in (CLIP, LLAVA, DETECTOR):
        images = torch.rand(2, 3, preprocess.size, preprocess.size)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
        assert torch.equal(preprocess(images), (images - mean) / std)


@pytest.mark.parametrize(
    ("preprocess", "colour"),
    [(CLIP, [0.1, 0.5, 1.0]), (DETECTOR, [0.1, 0.5, 1.0]), (LLAVA, [127 / 255] * 3)],  # LLaVA's own, which it pads with
)
def test_one_colour_stays(preprocess: Preprocess, colour: list[float]) -> None:
    out = preprocess(torch.tensor(colour).view(3, 1, 1).expand(2, 3, 97, 300))
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    expected = ((torch.tensor(colour) - mean) / std).view(3, 1, 1).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


def test_batch_equals_one_at_a_time_and_leaves_the_pictures_alone() -> None:
    for preprocess in (CLIP, DETECTOR, LLAVA):
        images = torch.rand(3, 3, 90, 120)
        before = images.clone()
        torch.testing.assert_close(preprocess(images), torch.cat([preprocess(image[None]) for image in images]))
        assert torch.equal(images, before)
        torch.testing.assert_close(preprocess(images.double()), preprocess(images))


@pytest.mark.parametrize("size", [224, 500])
def test_without_clip_it_is_bicubic_on_floats(size: int) -> None:
    """What torchvision does with float tensors, overshoot and all: both directions at once, no clip."""
    preprocess = Preprocess(size, (0.0,) * 3, (1.0,) * 3, clip=False)
    image = tensor(picture("binary", 384, 384))
    ours = preprocess(image)
    torch.testing.assert_close(
        ours, F.interpolate(image, (size, size), mode="bicubic", antialias=True), rtol=0, atol=2e-6
    )
    assert ours.max() > 1.1 and ours.min() < -0.1


def test_bad_pictures() -> None:
    for images in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be float \[S, 3, H, W\] in \[0, 1\], got torch"):
            CLIP(images)
