"""Prepares the policy's pictures for a reward model, on the device: make square, resample, normalise.

This follows the models' own processors, which work on PIL pictures. PIL resamples rows, then columns, and stores 8 bits
after each, which clips the overshoot of bicubic and rounds. This clips after each too, and does not round. For a
picture that is exact in 8 bits, a pixel then differs from PIL's, before normalisation, by at most

    MAX_ERROR = (0.5 L + 0.5 + c) / 255.

The rounding after the rows is half a level. The weights of the columns, whose magnitudes sum to at most L = 1.27
(bicubic, the maximum over pairs of sizes; bilinear 1), multiply it. The rounding of the result is another half a level.
c = 0.06 is for positions in float32 at edges of up to 1,000 pixels. The measured maximum is 1.11 / 255. Clipping only
the result would differ by up to 31 / 255 at an edge between 0 and 1.

Shapes: S pictures, [S, 3, H, W] float in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..kernels.host import upload

MAX_ERROR = 1.2 / 255

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of one model.

    Args:
        size: length of the shortest edge after resampling, in pixels.
        mean, std: values of each channel.
        resample: bicubic or bilinear, both antialiased.
        fit: for pictures that are not square. "crop" = take the middle square of the resampled picture; "pad" = before
            resampling, put the picture on a square of colour `mean`, rounded to 8 bits; "keep" = keep their shape.
        max_size: with "keep", maximum length of the longest edge, in pixels.
        clip: clip resampled pixels to [0, 1], as PIL does; torchvision on float tensors does not.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["crop", "pad", "keep"] = "crop"
    max_size: int | None = None
    clip: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """[S, 3, H, W] in [0, 1] -> [S, 3, size, size], with "keep" [S, 3, h, w]; float32, normalised.

        Raises:
            ValueError: another shape, or integers.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float [S, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
        images = images.float()
        mean, std = (upload(value, images.device).view(3, 1, 1) for value in (self.mean, self.std))
        if self.fit == "pad" and images.shape[-2] != images.shape[-1]:
            images = _square(images, upload([int(255 * value) / 255 for value in self.mean], images.device))
        height, width = self._size(*images.shape[-2:])
        for size in ((images.shape[-2], width), (height, width)):
            if size != images.shape[-2:]:
                images = F.interpolate(images, size, mode=self.resample, antialias=True)
                images = images.clamp_(0, 1) if self.clip else images
        if self.fit == "crop":
            top, left = (height - self.size) // 2, (width - self.size) // 2
            images = images[..., top : top + self.size, left : left + self.size]
        return (images - mean) / std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resampling: the shortest edge is `size`, unless the longest would exceed max_size."""
        shortest, longest = min(height, width), max(height, width)
        size: float = self.size
        if self.max_size is not None and longest / shortest * size > self.max_size:
            size = self.max_size * shortest / longest
        if round(size) == shortest:
            return height, width
        short, long = round(size), int(size * longest / shortest)
        return (short, long) if height < width else (long, short)


def _square(images: Tensor, colour: Tensor) -> Tensor:
    samples, _, height, width = images.shape
    edge = max(height, width)
    square = colour.view(3, 1, 1).expand(samples, 3, edge, edge).clone()
    top, left = (edge - height) // 2, (edge - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square
