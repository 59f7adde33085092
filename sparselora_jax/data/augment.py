"""Crop and flip training images at random, as the public training code does (`blip2_image_train` of LAVIS)."""

import math

import numpy as np
from jaxtyping import UInt8

LEAST_AREA = 0.5  # share of an image's pixels that a crop keeps at least
WIDEST = 4 / 3  # largest ratio of the crop's sides
TRIES = 10  # crops that are drawn before the whole image, or its middle, is taken


def crop_and_flip(
    image: UInt8[np.ndarray, 'height width 3'], rng: np.random.Generator
) -> UInt8[np.ndarray, 'crop_height crop_width 3']:
    """Return a part of an image, mirrored half of the time; the model's processor then resizes it.

    The area is uniform in 0.5 to 1 of the image's, and the logarithm of the ratio of width to height is uniform between
    those of 3/4 and 4/3, as torchvision's `RandomResizedCrop` draws them. The result is a copy without gaps in memory.

    Args:
      image: the image.
      rng: draws the crop.
    """
    top, left, height, width = draw_crop(*image.shape[:2], rng)
    crop = image[top : top + height, left : left + width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)


def draw_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a crop: its top, its left, its height and its width.

    Args:
      height: height of the image.
      width: width of the image.
      rng: draws it.
    """
    for _ in range(TRIES):
        area = rng.uniform(LEAST_AREA, 1.0) * height * width
        ratio = math.exp(rng.uniform(-math.log(WIDEST), math.log(WIDEST)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    # No crop of a very long image fits: take as much of its middle as the ratio allows.
    crop_width = max(1, min(width, round(height * WIDEST)))
    crop_height = max(1, min(height, round(width * WIDEST)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
