"""mIoU by hand on files in COCO's own form."""

import json

import numpy as np
import pytest
from PIL import Image

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.downstream.miou import VOID, MiouScore, PanopticLabels, match_classes

CATEGORIES = [
    {"supercategory": "person", "isthing": 1, "id": 1, "name": "person", "color": [220, 20, 60]},
    {"supercategory": "animal", "isthing": 1, "id": 90, "name": "toothbrush", "color": [1, 2, 3]},
    {"supercategory": "textile", "isthing": 0, "id": 92, "name": "banner", "color": [4, 5, 6]},
]


@pytest.fixture
def labels(tmp_path):
    """One image of 2 x 3: a person, a crowd of them, a banner, and void."""
    segments = np.array([[7, 7, 300], [300, 70000, 0]])
    rgb = np.stack([segments % 256, segments // 256 % 256, segments // 256**2], axis=-1).astype(np.uint8)
    (tmp_path / "panoptic_val2017").mkdir()
    Image.fromarray(rgb).save(tmp_path / "panoptic_val2017" / "000000000139.png")
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 2, "width": 3, "license": 2}],
        "annotations": [
            {
                "image_id": 139,
                "file_name": "000000000139.png",
                "segments_info": [
                    {"id": 7, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 2, 1], "area": 2},
                    {"id": 300, "category_id": 92, "iscrowd": 0, "bbox": [0, 0, 3, 2], "area": 2},
                    {"id": 70000, "category_id": 1, "iscrowd": 1, "bbox": [1, 1, 1, 1], "area": 1},
                ],
            }
        ],
        "categories": CATEGORIES,
    }
    (tmp_path / "panoptic_val2017.json").write_text(json.dumps(content))
    return PanopticLabels.read(tmp_path / "panoptic_val2017.json", tmp_path / "panoptic_val2017")


def test_the_published_form(labels):
    """Categories are numbered in the file's order, ids of segments have three bytes, 0 is void."""
    assert labels.names == ["person", "toothbrush", "banner"]
    assert labels.semantic(labels.images[0]).tolist() == [[0, 0, 2], [2, 0, VOID]]


def test_dataset_and_per_image_means_by_hand():
    """Image 1: a is 1 of 1, b 0 of 1. Image 2: a is 7 of 9, b not in the truth."""
    score = MiouScore(["a", "b", "c"])
    score.add(np.array([[0, 1, VOID]]), np.array([[0, 2, 2]]))
    score.add(np.zeros((3, 3), int), np.array([[0, 0, 0], [0, 0, 0], [0, 1, 1]]))
    result = score.result()
    # a: 8 right of 10; b: 0 right, truth 1, predicted 2: union 3; c: not in the truth, so it has no IoU
    assert result["classes"] == {"a": 0.8, "b": 0.0, "c": None}
    assert result["miou"] == pytest.approx((0.8 + 0) / 2)
    assert result["miou_per_image"] == pytest.approx(((1 + 0) / 2 + 7 / 9) / 2)
    assert result["images"] == 2


def test_void_counts_nowhere():
    score = MiouScore(["a", "b"])
    score.add(np.array([[0, VOID, VOID]]), np.array([[0, 0, 1]]))
    assert score.result()["classes"] == {"a": 1.0, "b": None}


def test_what_does_not_fit_is_refused(labels, tmp_path):
    score = MiouScore(["a", "b"])
    with pytest.raises(ValueError, match="differ in size"):
        score.add(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="2 exist"):
        score.add(np.zeros((1, 1), int), np.full((1, 1), 2))
    png = tmp_path / "panoptic_val2017" / "000000000139.png"
    Image.new("RGB", (3, 2), (9, 0, 0)).save(png)
    with pytest.raises(JobFailed, match="segment 9 is not in its JSON"):
        labels.semantic(labels.images[0])
    Image.new("RGB", (4, 2)).save(png)
    with pytest.raises(JobFailed, match="fetch both again"):
        labels.semantic(labels.images[0])
    (tmp_path / "other.json").write_text('{"images": []}')
    with pytest.raises(JobFailed, match="not COCO's panoptic annotations"):
        PanopticLabels.read(tmp_path / "other.json", tmp_path)


def test_classes_are_matched_by_name_and_by_order_where_there_is_none():
    names = ["person", "toothbrush", "banner"]
    assert match_classes(["banner", "person", "toothbrush"], names).tolist() == [2, 0, 1]
    assert match_classes(["LABEL_0", "LABEL_1", "LABEL_2"], names).tolist() == [0, 1, 2]
    for other in (["LABEL_0", "LABEL_1"], ["person", "toothbrush"], ["person", "toothbrush", "wall"]):
        with pytest.raises(JobFailed, match="same categories"):
            match_classes(other, names)
