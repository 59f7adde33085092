"""Random crops: within the image, of the promised areas and ratios, and a function of the generator alone."""

import numpy as np
import pytest

from sparselora_jax.data.augment import LEAST_AREA, WIDEST, crop_and_flip, draw_crop


@pytest.mark.parametrize('shape', [(480, 640), (224, 224), (333, 500)])
def test_crops_lie_in_the_image_and_have_the_promised_area_and_ratio(shape):
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        top, left, height, width = draw_crop(*shape, rng)
        assert 0 <= top <= top + height <= shape[0]
        assert 0 <= left <= left + width <= shape[1]
        # Sides are rounded to pixels.
        assert 1 / WIDEST * 0.98 <= width / height <= WIDEST * 1.02
        areas.append(height * width / (shape[0] * shape[1]))
    assert min(areas) >= LEAST_AREA * 0.98
    assert max(areas) <= 1.0
    # Over the whole range, and not one half of it; of the longest image, at most 8/9 have the widest ratio.
    assert min(areas) < 0.55
    assert max(areas) > 0.87


def test_the_middle_of_a_very_long_image_is_taken():
    assert draw_crop(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 13)
    assert draw_crop(1, 1, np.random.default_rng(0)) == (0, 0, 1, 1)


def test_half_of_the_crops_are_mirrored():
    # Columns are numbered, so a mirrored crop falls from left to right.
    image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (150, 200, 3))
    crops = [crop_and_flip(image, np.random.default_rng(seed)) for seed in range(400)]
    mirrored = sum(int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops)
    assert 160 < mirrored < 240
    assert all(np.array_equal(np.abs(np.diff(crop[0, :, 0].astype(int))), np.ones(crop.shape[1] - 1)) for crop in crops)
    np.testing.assert_array_equal(crops[3], crop_and_flip(image, np.random.default_rng(3)))
