"""DA-2K by hand: ties, places, scenes, and names that two scenes share."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.downstream.da2k import Da2kScore, Pair, is_right, read_pairs, value_at

PUBLISHED = {
    "images/indoor/0.jpg": [
        {"point1": [0, 0], "point2": [3, 7], "closer_point": "point1"},
        {"point1": [3, 7], "point2": [0, 0], "closer_point": "point1"},
    ],
    "images/aerial/0.jpg": [{"point1": [2, 2], "point2": [2, 3], "closer_point": "point2"}],
}


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(PUBLISHED))
    return read_pairs(tmp_path / "annotations.json")


def test_the_published_form(pairs):
    assert list(pairs) == list(PUBLISHED)
    assert pairs["images/indoor/0.jpg"][1] == Pair(closer=(3, 7), farther=(0, 0))
    assert pairs["images/aerial/0.jpg"] == [Pair(closer=(2, 3), farther=(2, 2))]


def test_scenes_by_hand(pairs):
    """Of indoor one of two is right, of aerial one of one; the two files of one name are two images."""
    falling = np.array([[4.0, 3.0], [2.0, 1.0]])  # larger, closer, at the top left
    score = Da2kScore()
    score.add("images/indoor/0.jpg", falling, pairs["images/indoor/0.jpg"], (4, 8))
    score.add("images/aerial/0.jpg", -falling, pairs["images/aerial/0.jpg"], (4, 8))
    assert score.result() == {
        "accuracy": 2 / 3,
        "pairs": 3,
        "scenes": {"aerial": {"accuracy": 1.0, "pairs": 1}, "indoor": {"accuracy": 0.5, "pairs": 2}},
    }


def test_a_constant_map_is_always_wrong():
    """The public code calls a tie point1, which the published file always has closer: 100 %."""
    pair = Pair(closer=(0, 0), farther=(3, 3))
    assert not is_right(np.ones((4, 4)), pair, (4, 4))
    assert not is_right(np.full((4, 4), np.nan), pair, (4, 4))
    assert is_right(np.arange(16.0, 0, -1).reshape(4, 4), pair, (4, 4))


def test_what_8_bits_round_to_a_tie_is_told_apart():
    depth = np.array([[0.0, 0.5001, 0.5, 1.0]])
    pair = Pair(closer=(0, 1), farther=(0, 2))
    assert is_right(depth, pair, (1, 4))
    assert not is_right(np.round(depth * 255), pair, (1, 4))


@pytest.mark.parametrize("size", [(9, 14), (3, 4), (6, 5), (2, 2)])
def test_a_value_is_that_of_the_resized_map(size):
    depth = np.random.default_rng(0).normal(size=(6, 5))
    whole = F.interpolate(torch.from_numpy(depth)[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    for row in range(size[0]):
        for column in range(size[1]):
            assert value_at(depth, (row, column), size) == pytest.approx(float(whole[row, column]), abs=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not an object of image paths"),
        ("{", "not JSON"),
        ('{"a/b.jpg": null}', "a/b.jpg: None is no list of pairs"),
        ('{"a/b.jpg": []}', r"a/b.jpg: \[\] is no list of pairs"),
        ('{"a/b.jpg": {"point1": [1, 2]}}', "is no list of pairs"),
        ('{"a/b.jpg": [null]}', "a/b.jpg: needs point1 and point2"),
        ('{"a/b.jpg": [{"point1": [1, 2], "closer_point": "point1"}]}', "a/b.jpg: needs point1 and point2"),
        ('{"a/b.jpg": [{"point1": [1, 2], "point2": [1, 2], "closer_point": "left"}]}', "'left'"),
    ],
)
def test_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(JobFailed, match=message):
        read_pairs(tmp_path / "a.json")


def test_a_point_outside_is_refused():
    with pytest.raises(JobFailed, match="lies outside an image of 4 x 8"):
        value_at(np.ones((2, 2)), (4, 0), (4, 8))
