import dataclasses
import hashlib
import json

import pytest

from olavlm.teachers import Card, TeacherError

CARD = Card(
    name="depth",
    model="some/model",
    weights_sha256="ab" * 32,
    recipe={"name": "last", "layers": [3]},
    geometry="reference",
    size=(336, 336),
    mean=(0.5, 0.25, 0.125),
    std=(0.5, 0.5, 1.0),
    tokens=576,
    dim=32,
    grid=(24, 24),
    revision="main",
    versions={"torch": "2"},
)

HASHED = {
    "weights_sha256": "cd" * 32,
    "recipe": {"name": "last", "layers": [2]},
    "geometry": "pad",
    "size": (336, 350),
    "mean": (0.5, 0.25, 0.126),
    "std": (0.5, 0.5, 1.1),
    "channel_order": "BGR",
    "compute_dtype": "bfloat16",
    "tokens": 575,
    "dim": 33,
    "grid": (12, 48),
}
RECORDED = {"name": "other", "model": "other/model", "revision": None, "versions": {"torch": "3"}}


def test_every_field_is_tried():
    assert HASHED.keys() | RECORDED.keys() == {field.name for field in dataclasses.fields(Card)}


@pytest.mark.parametrize("field", HASHED)
def test_fingerprint_depends_on(field):
    assert dataclasses.replace(CARD, **{field: HASHED[field]}).fingerprint() != CARD.fingerprint()


@pytest.mark.parametrize("field", RECORDED)
def test_fingerprint_does_not_depend_on(field):
    assert dataclasses.replace(CARD, **{field: RECORDED[field]}).fingerprint() == CARD.fingerprint()


def test_fingerprint_is_the_hash_of_this_text():
    text = (
        '{"channel_order":"RGB","compute_dtype":"float32","dim":32,"geometry":"reference","grid":[24,24],'
        '"mean":[0.5,0.25,0.125],"recipe":{"layers":[3],"name":"last"},"size":[336,336],"std":[0.5,0.5,1.0],'
        f'"tokens":576,"weights_sha256":"{"ab" * 32}"}}'
    )
    assert CARD.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_dict_is_json_and_comes_back():
    values = CARD.to_dict()
    assert values["fingerprint"] == CARD.fingerprint()
    assert json.loads(json.dumps(values)) == values
    assert Card.from_dict(values) == CARD


def test_an_edited_card_is_refused():
    values = CARD.to_dict() | {"geometry": "pad"}
    with pytest.raises(TeacherError, match="not that of its fields"):
        Card.from_dict(values)


def test_an_unknown_field_is_refused():
    with pytest.raises(TeacherError, match="colour"):
        Card.from_dict(CARD.to_dict() | {"colour": "red"})
