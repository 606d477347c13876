import pytest

from olavlm.teachers import TEACHERS, TeacherError, load_teacher, store_key


@pytest.mark.parametrize(
    ("name", "recipe", "key"),
    [
        ("depth", None, "depth"),
        ("depth", "mean4", "depth"),
        ("depth", "last", "depth-last"),
        ("seg", "stage4-768", "seg-stage4-768"),
        ("gen", None, "gen"),
    ],
)
def test_store_key(name, recipe, key):
    assert store_key(name, recipe) == key


def test_store_key_replaces_other_characters(monkeypatch):
    monkeypatch.setitem(TEACHERS, "family:some/model.v2_x", TEACHERS["depth"])
    assert store_key("family:some/model.v2_x") == "family-some-model.v2_x"


@pytest.mark.parametrize("call", [store_key, load_teacher])
def test_an_unknown_name_lists_the_valid_ones(call):
    with pytest.raises(TeacherError, match=r"'dpeth'.*depth, seg, gen"):
        call("dpeth")


@pytest.mark.parametrize("call", [store_key, load_teacher])
def test_an_unknown_recipe_lists_the_valid_ones(call):
    with pytest.raises(TeacherError, match=r"'stage4'.*depth.*mean4, last"):
        call("depth", recipe="stage4")


@pytest.mark.parametrize(
    ("option", "valid"),
    [
        ({"geometry": "crop"}, "reference, square, pad"),
        ({"compute_dtype": "float8"}, "float32, bfloat16, float16"),
        ({"device": "gpu"}, "auto, cpu, cuda"),
    ],
)
def test_an_unknown_option_lists_the_valid_ones(option, valid, tiny):
    with pytest.raises(TeacherError, match=valid):
        load_teacher("depth", model=tiny["depth"], **option)


def test_cuda_where_there_is_none(tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TeacherError, match="no CUDA device; use auto or cpu"):
        load_teacher("depth", model=tiny["depth"], device="cuda")
