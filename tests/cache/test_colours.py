"""Features as pictures: planted structure comes back as colours, values as heights and shades."""

import matplotlib
import numpy as np
import pytest

from olavlm.cache.colours import NEGATIVE, POSITIVE, PcaColours, bar_limit, heat_map, token_map, vector_bars

GRID = (6, 8)
DIM = 20


def planted(seed=0):
    """Tokens (48, 20) of three uncorrelated spatial patterns, strong to weak, in random orthogonal directions."""
    rng = np.random.default_rng(seed)
    patterns = rng.standard_normal((48, 3))
    patterns, _ = np.linalg.qr(patterns - patterns.mean(axis=0))
    directions, _ = np.linalg.qr(rng.standard_normal((DIM, 3)))
    tokens = patterns * [30, 10, 4] @ directions.T + rng.standard_normal(DIM)
    return tokens.astype(np.float32), patterns, directions


def test_colours_are_the_planted_patterns_strongest_first():
    tokens, patterns, directions = planted()
    colours = PcaColours.fit(tokens)
    pixels = colours(tokens)
    assert pixels.shape == (48, 3)
    assert pixels.dtype == np.uint8
    for channel in range(3):
        sign = np.sign(colours.components[channel] @ directions[:, channel])
        low, high = np.percentile(sign * patterns[:, channel], (2, 98))
        expected = np.clip((sign * patterns[:, channel] - low) / (high - low), 0, 1) * 255
        np.testing.assert_allclose(pixels[:, channel], expected, atol=1)


def test_wide_and_tall_tokens_give_the_components_of_an_svd():
    for shape in ((48, 20), (20, 48)):
        tokens = np.random.default_rng(1).standard_normal(shape)
        _, _, rows = np.linalg.svd(tokens - tokens.mean(axis=0), full_matrices=False)
        cosines = np.abs(np.sum(PcaColours.fit(tokens).components * rows[:3], axis=1))
        np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_the_largest_loading_is_positive_so_that_signs_do_not_depend_on_the_solver():
    tokens, _, _ = planted()
    for seed in range(10):
        components = PcaColours.fit(planted(seed)[0]).components
        assert (components[range(3), np.abs(components).argmax(axis=1)] > 0).all()
    np.testing.assert_array_equal(token_map(tokens[::-1], None), np.asarray(token_map(tokens, None))[:, ::-1])


def test_a_prediction_is_coloured_in_the_basis_of_its_target():
    target, _, directions = planted()
    colours = PcaColours.fit(target)
    sign = np.sign(colours.components[0] @ directions[:, 0])
    moved = colours(target + 0.1 * sign * directions[:, 0]).astype(int) - colours(target)
    assert moved[:, 0].max() > 0
    assert moved[:, 0].min() >= 0
    assert np.abs(moved[:, 1:]).max() <= 1
    flat = token_map(target * 0 + target.mean(axis=0), GRID, colours)
    assert len(flat.getcolors()) == 1
    far = token_map(target + 100 * sign * directions[:, 0], GRID, colours)
    assert np.asarray(far)[..., 0].min() == 255


def test_components_that_are_not_there_stay_grey():
    line = np.outer(np.linspace(-1, 1, 48), np.ones(DIM)) + 1e-6 * np.random.default_rng(0).standard_normal((48, DIM))
    pixels = PcaColours.fit(line)(line)
    assert np.ptp(pixels[:, 0]) == 255
    assert (pixels[:, 1:] == 128).all()
    assert (PcaColours.fit(np.ones((5, 3)))(np.ones((5, 3))) == 128).all()
    assert (PcaColours.fit(np.eye(2))(np.eye(2))[:, 2] == 128).all()


def test_features_that_are_not_finite_have_no_colours():
    tokens, _, _ = planted()
    colours = PcaColours.fit(tokens)
    tokens[3, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        PcaColours.fit(tokens)
    with pytest.raises(ValueError, match="finite"):
        colours(tokens)
    with pytest.raises(ValueError, match="finite"):
        vector_bars(tokens[3], (20, 10))


def test_the_map_is_row_major_one_pixel_a_token_and_a_row_without_a_grid():
    tokens, _, _ = planted()
    picture = token_map(tokens, GRID)
    assert picture.size == (8, 6)
    pixels = PcaColours.fit(tokens)(tokens)
    assert picture.getpixel((2, 1)) == tuple(pixels[1 * 8 + 2])
    assert token_map(tokens, (7, 7)).size == (48, 1)
    assert token_map(tokens, None).size == (48, 1)


def test_bars_stand_up_for_positive_and_down_for_negative_values():
    pixels = np.asarray(vector_bars(np.array([1.0, -1.0, 0.5, 0.0]), (40, 21), limit=1.0))
    height = {
        column: [(pixels[rows, column, 3] > 0).sum() for rows in (slice(0, 10), slice(11, 21))]
        for column in (5, 15, 25, 35)
    }
    assert height == {5: [9, 0], 15: [0, 9], 25: [4, 0], 35: [0, 0]}
    assert tuple(pixels[9, 5, :3]) == POSITIVE
    assert tuple(pixels[11, 15, :3]) == NEGATIVE
    many = np.zeros(1000)
    many[500] = 1.0  # one dimension of many is still seen
    assert (np.asarray(vector_bars(many, (50, 21), 1.0))[:10, :, 3] > 0).any()
    assert bar_limit(np.zeros(4)) == 1.0


def test_a_heat_map_goes_from_dark_to_light_and_leaves_out_what_is_not_known():
    picture = heat_map(np.array([-1.0, 0.0, 0.5, 1.0, 2.0, np.nan]), (2, 3), (0, 1))
    assert picture.size == (3, 2)
    pixels = np.asarray(picture).reshape(6, 4)
    dark, middle, light = (matplotlib.colormaps["viridis"](x, bytes=True) for x in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(pixels[:5], [dark, dark, middle, light, light])
    assert pixels[:, 3].tolist() == [255] * 5 + [0]
    assert heat_map(np.zeros(6), (2, 2), (0, 1)).size == (6, 1)
