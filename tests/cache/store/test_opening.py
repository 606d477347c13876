"""Stores that have grown, are empty, are damaged, or are none."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import BadImage, CacheError, FeatureStore, MissingFeatures, PlanError, StoreError, pending


def test_a_plan_that_has_grown_since_the_store_was_opened(small):
    store = small(rows=10).fill()
    depth = store.group
    images = pa.concat_arrays([depth.plan.images, pa.array(["new"], pa.large_string())])
    store.builder.extend_plan(images)
    store.features = np.concatenate([store.features, np.zeros((4087, 3, 4), np.float32)])
    store.fill()
    assert depth.coverage().complete  # of the plan it knows
    assert len(depth.failures()) == 0
    assert depth.missing_rows().tolist() == []
    assert store.group.coverage().images == 11
    np.testing.assert_array_equal(store.group["new"], 0)
    with pytest.raises(MissingFeatures):
        store.group[10]  # between the segments


def test_unicode_image_paths(small):
    names = ["ünï/日本 語.jpg", "e\u0301.jpg", "é.jpg", "🐘 a%20b?.png", "a\nb.jpg"]
    store = small(rows=0)
    store.builder.extend_plan(pa.array(names, pa.large_string()))
    store.features = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    store.fill({4: "missing"})
    for row, name in enumerate(names[:4]):
        np.testing.assert_array_equal(store.group[name], store.features[row])
    assert store.group.failure(names[4]).image == names[4]


def test_an_empty_plan(small):
    store = small(rows=0)
    depth = store.group
    assert depth.shape == (0, 3, 4)
    assert depth.coverage().images == 0
    assert pending(depth) == []
    assert depth.failures() == []
    assert len(FeatureStore(store.path).plan) == 0
    with pytest.raises(MissingFeatures):
        depth[0]


def test_a_path_that_is_no_store(tmp_path, store):
    zarr_group = tmp_path / "group"
    zarr_group.mkdir()
    (zarr_group / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    file = tmp_path / "file"
    file.write_text("x")
    for path, rule in (
        (tmp_path / "absent", "is not a feature store: it has no zarr.json; make one with olavlm-extract"),
        (tmp_path, "is not a feature store"),
        (file, "is not a feature store"),
        (zarr_group, "is a Zarr group but not a feature store"),
    ):
        with pytest.raises(StoreError, match=rule) as e:
            FeatureStore(path)
        assert str(path) in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b'{"zarr_format": 2}', b"null",
                                     b'{"zarr_format": 3, "attributes": null}', b'{"zarr_format": 3, "attributes": 5}',
                                     b'{"zarr_format": 3}', b"[" * 99999])  # fmt: skip
@pytest.mark.parametrize("node", ["", "depth", "depth/features"])
def test_damaged_metadata(store, node, content):
    (store.path / node / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError) as e:
        FeatureStore(store.path)["depth"]
    assert str(store.path / node) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("node", "type_"), [("", "group"), ("depth", "group"), ("depth/features", "array")])
def test_a_node_that_no_zarr_reader_would_open_is_damaged(store, node, type_):
    """A flipped bit in the name of its type alone."""
    file = store.path / node / "zarr.json"
    content = file.read_text()
    assert content.count(f'"{type_}"') == 1
    file.write_text(content.replace(f'"{type_}"', f'"{type_.capitalize()}"'))
    with pytest.raises(StoreError, match=f"{file} is not Zarr v3 metadata"):
        FeatureStore(store.path)["depth"]


def test_a_damaged_plan(store):
    file = store.path / "plan" / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PlanError, match=r"00000\.parquet is damaged"):
        FeatureStore(store.path)


def test_every_error_is_the_cache_s_and_the_builtin_s():
    import olavlm.cache as cache

    errors = [e for e in vars(cache).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) >= 9
    for e in errors:
        assert issubclass(e, CacheError)
        assert e is CacheError or issubclass(e, (ValueError, KeyError, RuntimeError, ImportError))
    again = pickle.loads(pickle.dumps(BadImage("x.jpg", "missing", "why")))
    assert (str(again), again.reason) == ("x.jpg: missing (why)", "missing")
    assert str(pickle.loads(pickle.dumps(MissingFeatures("row 1")))) == "row 1"
