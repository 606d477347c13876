"""Curves are drawn where their values are, however many they are; many curves in small charts to compare."""

import math
import re

import numpy as np
import pytest

from olavlm.pipelines.reporting.chart import Curve, chart, closing_mean, multiples, smooth
from olavlm.pipelines.reporting.page import number, ranges


def points(html, name="line"):
    path = re.search(rf'class="{name} c0" d="([^"]*)"', html)[1]
    return [tuple(map(float, p.split())) for p in re.split("[ML]", path.rstrip("Z"))[1:]]


def test_a_short_curve_is_drawn_where_its_values_are():
    html = chart("Loss", [Curve("x", [1, 2, 3, 4, 5], [4.0, 3.0, math.nan, 1.0, 0.0])], mark_zeros=True)
    drawn = points(html)
    assert len(drawn) == 4
    x, y = np.array(drawn).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-3)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 0.25, 0.75, 1], atol=2e-3)
    assert y[0] < y[-1]  # large values are high up
    assert html.count('class="mark"') == 2
    assert html.count("<circle") == 4


def test_a_log_axis_gives_equal_ratios_equal_distances():
    y = np.array(points(chart("Time", [Curve("x", [1, 2, 3], [10, 100, 1000])], log=True)))[:, 1]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.15)


def test_a_long_curve_keeps_its_shape_and_its_spikes_in_a_page_of_bounded_size():
    x = np.arange(1, 100_001)
    values = 5 - x / 50_000
    values[40_000] = 9.0
    html = chart("Loss", [Curve("x", x, values)])
    assert len(html) < 40_000
    assert "1 value beyond the frame" in html
    y = np.array(points(html))[:, 1]
    assert (np.diff(y) > -1).all()
    assert y[-1] - y[0] > 100


def test_smoothing_keeps_constants_leaves_gaps_out_and_averages_noise():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3)
    values = np.full(50, 3.0)
    values[20] = np.nan
    np.testing.assert_allclose(smooth(values), 3)
    assert np.isnan(smooth(np.full(20, np.nan))).all()
    noise = np.random.default_rng(0).standard_normal(500)
    assert smooth(noise, 10).std() < 0.3 * noise.std()
    assert len(smooth(np.arange(4.0), 100)) == 4


def test_numbers_are_short_and_say_what_is_not_one():
    shown = {1234567: "1,234,567", 0.00012345: "0.0001234", 12345.6: "12,346", 2.0: "2", math.inf: "inf"}
    assert [number(v) for v in shown] == list(shown.values())
    assert closing_mean([9.0] * 38 + [1.0, 2.0]) == (1.5, 2)
    assert closing_mean([4.0]) == (4.0, 1)
    assert math.isnan(closing_mean([1.0, math.nan])[0])


def test_a_band_is_one_all_along():
    """Among buckets of one value and of two, it would come and go: 460 values, two in each of 230."""
    values = np.where(np.arange(460) % 2, 1.0, 2.0)
    html = chart("Loss", [Curve("x", np.arange(460), values)])
    outline = np.array(points(html, "band"))[:, 1]
    assert len(outline) == 460
    np.testing.assert_allclose(outline[:230] - outline[230:][::-1], outline[0] - outline[-1])
    assert outline[0] - outline[-1] > 50


def test_a_constant_is_a_level_line():
    """Means of equal numbers differ in their last bits."""
    y = np.array(points(chart("Scale", [Curve("x", np.arange(2180), np.full(2180, 14.3))], smoothed=False)))[:, 1]
    assert np.ptp(y) < 0.2


def test_small_charts_share_their_axes_and_leave_gaps_out():
    first = Curve("layer 1", [1, 2, 3, 4, 5], [4.0, 3.0, math.nan, 1.0, 0.0])
    html = multiples([first, Curve("layer <2>", [1, 3, 5], [2.0, 2.0, 2.0])], "Loss")
    drawn = [
        [tuple(map(float, p.split())) for p in re.split("[ML]", d)[1:]] for d in re.findall(r'c0" d="([^"]*)"', html)
    ]
    (x1, y1), (x2, y2) = (np.array(line).T for line in drawn)
    assert x1.tolist() == [0, 33, 99, 132]
    assert x2.tolist() == [0, 66, 132]
    np.testing.assert_allclose((y1 - y1[0]) / (y1[-1] - y1[0]), [0, 0.25, 0.75, 1], atol=0.01)
    assert y2.tolist() == pytest.approx([(y1[0] + y1[-1]) / 2] * 3)
    assert "layer &lt;2&gt; <b>2</b>" in html
    assert "All from 0 to 4, over steps 1 to 5." in html
    assert multiples([Curve("x", [1], [math.nan])], "Loss") == ""
    assert len(multiples([Curve("x", np.arange(10_000), np.arange(10_000))], "Loss")) < 1500


def test_runs_of_layers_are_short():
    assert ranges([1, 2, 3, 8, 10, 11]) == "1-3, 8, 10-11"
