"""Previews, comparisons, tables and notebook reprs: what cannot be shown is said, not painted."""

import base64
import io
import json
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from olavlm.cache import (
    BadImage,
    CacheError,
    DatasetError,
    FeatureStore,
    MissingExtra,
    MissingFeatures,
    StoreBuilder,
    display,
    preview,
)
from olavlm.cache.colours import PcaColours, heat_map, token_map
from olavlm.cache.recorded_roots import extracted_from, recorded_roots
from olavlm.cache.wording import printable

IMAGES = ["a.png", "b/é.jpg", "c.png", "d.png"]
GRID = (6, 8)
DIM = 20


def card(tokens, dim, grid, **more):
    fields = {"name": "depth", "tokens": tokens, "dim": dim, "grid": grid, "fingerprint": f"{tokens}-{dim}", **more}
    return fields if grid else {k: v for k, v in fields.items() if k != "grid"}


@pytest.fixture
def store(tmp_path):
    """Four images: row 1 quarantined for `map`, row 3 not committed; photographs of the first three under images/."""
    builder = StoreBuilder(tmp_path / "here" / "store")
    plan, _ = builder.extend_plan(pa.array(IMAGES, pa.large_string()))
    rng = np.random.default_rng(5)
    for key, tokens, grid in (("map", 48, GRID), ("one", 1, (1, 1)), ("loose", 7, None)):
        group = builder.ensure_teacher(
            key, card(tokens, DIM, grid, model="<script>alert(1)</script>"), dtype="float32", shard_rows=1
        )
        for row in range(3):
            with builder.writer(group).begin(row, (row, row + 1), plan.segments[0].hash) as shard:
                if (key, row) == ("map", 1):
                    shard.append(None, image_sha256=None, reason="truncated", detail="ends in the middle")
                else:
                    shard.append(rng.standard_normal((tokens, DIM)).astype(np.float32), image_sha256="0" * 64)
                shard.commit()
    for name, size in zip(IMAGES[:3], ((60, 30), (30, 60), (40, 40)), strict=True):
        file = tmp_path / "here" / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10, 200, 30)).save(file)
    return FeatureStore(builder.path)


def damage(store, key="map"):
    """Flip a bit in the features of row 0."""
    file = store.path / key / "features/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


@pytest.fixture
def panels(monkeypatch):
    """What `preview` puts into its panels: (content, title, subtitle)."""
    seen, original = [], preview.panel

    def spy(*content):
        seen.append(content)
        return original(*content)

    monkeypatch.setattr(preview, "panel", spy)
    return seen


def record_run(store, name, /, **arguments):
    (store.path / "runs").mkdir(exist_ok=True)
    (store.path / "runs" / f"{name}.json").write_text(json.dumps({"arguments": arguments}))


def test_a_preview_shows_the_photograph_and_every_teacher(store, tmp_path, panels):
    sheet = store.preview("a.png", roots=[str(tmp_path / "here/images")])
    assert sheet.mode == "RGB"
    titles = [(title, subtitle) for _, title, subtitle in panels]
    times = display.TIMES
    expected = [("loose", f"7 {times} 20"), ("map", f"48 {times} 20"), ("one", f"1 {times} 20")]
    assert titles == [("a.png", "row 0"), *expected]
    photograph, loose, tokens, one = (content for content, _, _ in panels)
    assert photograph.getpixel((5, 5)) == (10, 200, 30)
    assert tokens.size == (280, 210)
    small = token_map(store["map"][0], GRID)
    assert tokens.getpixel((100, 100)) == small.getpixel((100 * 8 // 280, 100 * 6 // 210))
    assert loose.size == (280, 70)
    assert one.mode == "RGBA"
    place = preview._MARGIN + 2 * (preview.SIDE + preview._MARGIN)
    assert sheet.getpixel((place + 100, preview._MARGIN + 35 + 100)) == tokens.getpixel((100, 100))
    assert list(store.preview(0, [str(tmp_path / "here/images")]).tobytes()) == list(sheet.tobytes())


def test_what_is_missing_is_an_empty_panel_that_says_so(store, tmp_path, panels):
    roots = [str(tmp_path / "here/images")]
    store.preview(1, roots)
    content = {title: content for content, title, _ in panels}
    assert content["map"] == "quarantined: truncated (ends in the middle)"
    assert isinstance(content["one"], Image.Image)
    panels.clear()
    store.preview("d.png", roots)
    content = {title: content for content, title, _ in panels}
    assert content["d.png"].startswith("photograph: missing")
    assert {content[key] for key in store.teachers} == {"missing: not extracted yet"}
    damage(store)
    panels.clear()
    FeatureStore(store.path).preview(0, roots)
    assert {title: content for content, title, _ in panels}["map"].startswith("damaged: ")


def test_roots_are_those_of_all_extractions_wherever_they_were_started(store, tmp_path, panels, monkeypatch):
    store.preview(0)
    assert "give roots=" in panels[0][0]  # no extraction on record
    record_run(store, "20250101T000000Z-1", images=["elsewhere"], store="store")
    record_run(store, "20250102T000000Z-1", images=["gone", "images"], store="store")
    (store.path / "runs" / "20250103T000000Z-1.json").write_text("cut sho")
    assert extracted_from(store) == [str(tmp_path / "here/images")]
    panels.clear()
    store.preview(0)
    assert isinstance(panels[0][0], Image.Image)
    record_run(store, "20250104T000000Z-1", images=["b=images/b"], store="store")
    both = [f"b={tmp_path / 'here/images/b'}", str(tmp_path / "here/images")]
    assert extracted_from(store) == both  # the newest first
    record_run(store, "20250105T000000Z-1", images=["images"], store=str(store.path))
    assert extracted_from(store) == both  # an absolute store does not tell where
    assert [root.spec for root in recorded_roots(store) if root.here is None] == ["images", "gone", "elsewhere"]
    monkeypatch.chdir(tmp_path / "here")
    assert extracted_from(store)[0] == "images"


def test_errors_of_the_caller_are_raised(store):
    with pytest.raises(MissingFeatures, match="nowhere"):
        store.preview("nowhere.png")
    with pytest.raises(MissingFeatures, match="row 9"):
        store.preview(9)
    with pytest.raises(DatasetError, match="/nowhere"):
        store.preview(0, ["/nowhere"])


def test_a_root_may_be_given_by_itself(store, tmp_path, panels):
    folder = tmp_path / "here/images"
    sheets = {store.preview(0, roots).tobytes() for roots in (folder, str(folder), [folder], [str(folder)])}
    assert len(sheets) == 1
    assert isinstance(panels[0][0], Image.Image)


def test_what_the_file_system_refuses_is_an_empty_panel_too(store, panels, monkeypatch):
    def refuse(self, row):
        raise PermissionError(13, "Permission denied", "features/c/0")

    monkeypatch.setattr(type(store["map"]), "__getitem__", refuse)
    store.preview(0)
    assert {content for content, *_ in panels[1:]} == {"cannot be read: [Errno 13] Permission denied: 'features/c/0'"}


def test_many_teachers_take_several_lines(store, tmp_path):
    one = store.preview(0)
    group = store.path / "map"
    for key in ("map-last", "zoo"):
        (store.path / key).symlink_to(group)
    many = FeatureStore(store.path).preview(0)
    assert many.width == one.width  # the photograph and three teachers
    assert many.height == 2 * one.height - preview._MARGIN
    step = preview._MARGIN + preview.SIDE

    def panel(sheet, left, top):
        return sheet.crop((left, top, left + preview.SIDE, top + preview.SIDE)).tobytes()

    assert panel(many, preview._MARGIN, one.height) == panel(one, preview._MARGIN + 3 * step, preview._MARGIN)


@pytest.mark.parametrize("name", ["two\nlines.jpg", "\x1b[31mred.jpg", "\u202egpj.exe", "a\tb\0c.jpg", "x" * 2000, ""])
def test_any_name_can_be_a_label(name):
    """Pillow fails on a label of two lines, and a terminal or page would obey some characters."""
    panel = preview.panel(f"photograph: missing ({name})", name, "row 1")
    assert panel.size == (preview.SIDE, preview.SIDE + 46)
    assert printable(name).isprintable()


class Balanced(HTMLParser):
    """Fails on tags that do not close in order; collects tags and text."""

    VOID = frozenset({"br", "hr", "img", "link", "meta", "input"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_notebook_reprs_are_whole_escaped_and_leave_text_colours_to_the_notebook(store):
    for html in (store._repr_html_(), store["map"]._repr_html_()):
        page = Balanced(html)
        assert "script" not in {tag for tag, _ in page.tags}
        assert "<script>alert(1)</script>" in page.text
        styles = ";".join(attrs.get("style", "") for _, attrs in page.tags).split(";")
        assert {s.partition(":")[2] for s in styles if s.startswith("color:")} <= {"inherit"}
        assert "3 of 4 images: 2 valid, 1 quarantined (1 truncated), 1 missing" in page.text
    assert all(word in Balanced(store._repr_html_()).text for word in ("loose", "map", "one", "4 images", "float32"))


def test_bars_of_coverage_are_its_shares(store):
    page = Balanced(store["map"]._repr_html_())
    widths = [attrs["style"] for _, attrs in page.tags if attrs.get("style", "").startswith("width:")]
    assert [w.partition("%")[0] for w in widths] == ["width:50.000", "width:25.000"]


def test_the_size_is_that_of_the_files_and_damage_is_counted(store):
    stored = sum(f.stat().st_size for f in (store.path / "one/features/c").rglob("*") if f.is_file())
    assert f"float32, {stored} B, 1 rows a shard" in Balanced(store["one"]._repr_html_()).text
    record = store.path / "one/commits/000001.0.json"
    record.write_bytes(record.read_bytes()[:-5])
    text = Balanced(FeatureStore(store.path)["one"]._repr_html_()).text
    assert "2 of 4 images: 2 valid, 0 quarantined, 2 missing, 1 shard damaged" in text


def test_a_store_without_teachers_or_plan_says_so(tmp_path):
    builder = StoreBuilder(tmp_path / "empty")
    page = Balanced(FeatureStore(builder.path)._repr_html_())
    assert "no plan, 0 teachers" in page.text
    assert "table" not in {tag for tag, _ in page.tags}
    builder.extend_plan(pa.array(IMAGES, pa.large_string()))
    assert "4 images, 1 segment, 0 teachers" in Balanced(FeatureStore(builder.path)._repr_html_()).text


def test_a_teacher_that_cannot_be_read_does_not_hide_the_others(store):
    metadata = store.path / "one" / "zarr.json"
    metadata.write_text("{}")
    page = Balanced(FeatureStore(store.path)._repr_html_())
    assert "cannot be read" in page.text
    assert "3 of 4 images" in page.text


# Comparisons.


def test_a_comparison_holds_the_numbers_of_every_teacher(store):
    a, b = (store["map"][row].astype(np.float64) for row in (0, 2))
    compared = store.compare("a.png", 2)
    assert (compared.rows, compared.images) == ((0, 2), ("a.png", "c.png"))
    assert list(compared) == ["loose", "map", "one"]
    of = compared["map"]
    assert of.problem is None
    assert of.cosine == pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    by_token = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(of.token_cosine, by_token)
    assert (of.mean, of.worst) == pytest.approx((by_token.mean(), by_token.min()))
    assert of.worst_token == by_token.argmin()
    assert of.relative_difference == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert of.norms == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)))
    lines = repr(compared).splitlines()
    assert lines[0] == "Comparison of A, row 0 (a.png), with B, row 2 (c.png)"
    assert lines[2].startswith(
        f"  map: cosine {of.cosine:.4f}, tokens' mean {of.mean:.4f}, worst (token {of.worst_token})"
    )
    assert "token" not in lines[3]  # of one


def test_a_row_is_like_itself(store):
    for agreement in store.compare(0, 0).values():
        assert (agreement.cosine, agreement.mean, agreement.worst) == pytest.approx((1, 1, 1))
        assert agreement.relative_difference == 0


def test_zeros_are_like_nothing():
    zeros, tokens = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
    half = tokens * [[0], [1], [1], [0]]

    class Rows(list):
        @property
        def card(self):
            return {"grid": (2, 2)}

    for rows, worst in (([zeros, tokens], None), ([tokens, zeros], None), ([half, tokens], 1), ([zeros, zeros], None)):
        of = display.Agreement.of({"x": Rows(rows)}, "x", (0, 1))
        assert of.problem is None
        assert of.worst_token == worst
        assert np.isnan(of.cosine) == np.isnan(of.mean) == np.isnan(of.worst) == (worst is None)
        assert np.isnan(of.token_cosine).tolist() == [True, worst is None, worst is None, True]
        assert np.isnan(of.relative_difference) == (not rows[0].any())
        assert "nan" in str(of) or worst == 1
        Balanced("".join(display._agreement_cells(of)))


def test_what_cannot_be_compared_says_why(store):
    compared = store.compare("b/é.jpg", "d.png")
    assert compared["map"].problems == ("quarantined: truncated (ends in the middle)", "missing: not extracted yet")
    assert compared["one"].problem == "B missing: not extracted yet"
    assert np.isnan(compared["one"].cosine)
    assert compared["one"].norms == pytest.approx((np.linalg.norm(store["one"][1]), np.nan), nan_ok=True)
    damage(store)
    (store.path / "loose/zarr.json").write_text("{}")
    compared = FeatureStore(store.path).compare(2, 0)
    assert compared["map"].problem.startswith("B damaged: ")
    assert compared["loose"].problem.startswith("cannot be read: ")
    assert compared["one"].problem is None
    assert "loose: cannot be read" in repr(compared)
    text = Balanced(compared._repr_html_()).text
    assert text.count("cannot be read") == 2
    assert text.count(compared["map"].problems[1]) == 1
    with pytest.raises(MissingFeatures, match="nowhere"):
        store.compare(0, "nowhere.png")
    with pytest.raises(MissingFeatures, match="row 9"):
        store.compare(9, 0)


def pictures(html):
    """The pictures inside, by their alternative text."""
    return {
        attrs["alt"]: Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition("base64,")[2])))
        for tag, attrs in Balanced(html).tags
        if tag == "img"
    }


def test_a_comparison_shows_both_photographs_and_the_tokens_in_one_basis(store):
    record_run(store, "20250101T000000Z-1", images=["images"], store="store")
    shown = pictures(store.compare(0, 2)._repr_html_())
    assert {"a.png", "c.png", "map of A", "map of B", "map, A against B", "one of A", "one, A against B"} <= set(shown)
    red, green, blue = shown["a.png"].getpixel((5, 5))
    assert green > 150 > red + blue
    a, b = store["map"][0], store["map"][2]
    colours = PcaColours.fit(a)
    side = display.COMPARED_SIDE
    for letter, tokens in (("A", a), ("B", b)):
        expected = token_map(tokens, GRID, colours).resize((side, side * 6 // 8), Image.Resampling.NEAREST)
        assert shown[f"map of {letter}"].convert("RGB").tobytes() == expected.tobytes()
    cosine = store.compare(0, 2)["map"].token_cosine
    expected = heat_map(cosine, GRID, (cosine.min(), cosine.max()))
    heat = shown["map, A against B"].convert("RGBA")
    assert heat.getpixel((100, 100)) == expected.getpixel((100 * 8 // side, 100 * 6 // (side * 6 // 8)))
    assert shown["one, A against B"].size == (side, side // 2)


def test_a_comparison_is_escaped_and_small(tmp_path):
    names = ['<img src=x onerror="alert(1)">.jpg', "two\nlines\x1b[31m.jpg"]
    builder = StoreBuilder(tmp_path / "store")
    plan, _ = builder.extend_plan(pa.array(names, pa.large_string()))
    group = builder.ensure_teacher("map", card(576, 32, (24, 24)), dtype="float16", shard_rows=2)
    with builder.writer(group).begin(0, (0, 2), plan.segments[0].hash) as shard:
        for seed in range(2):
            features = np.random.default_rng(seed).standard_normal((576, 32)).astype(np.float32)
            shard.append(features, image_sha256="0" * 64)
        shard.commit()
    compared = FeatureStore(builder.path).compare(0, 1)
    html = compared._repr_html_()
    page = Balanced(html)
    assert names[0] in page.text
    assert "two\\nlines\\x1b[31m.jpg" in page.text
    assert {attrs["src"][:11] for tag, attrs in page.tags if tag == "img"} == {"data:image/"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert len(html) < 40_000
    assert len(repr(compared).splitlines()) == 2


# Tables.


def test_the_plan_as_a_table_has_a_line_a_row_and_a_column_a_teacher(store):
    frame = store.to_pandas()
    assert frame.columns.tolist() == ["row", "image", "loose", "map", "one"]
    assert frame["row"].tolist() == [0, 1, 2, 3]
    assert frame["image"].tolist() == IMAGES
    assert frame["map"].tolist() == ["valid", "truncated", "valid", "missing"]
    assert frame["one"].tolist() == ["valid"] * 3 + ["missing"]
    assert frame["one"].cat.categories.tolist() == ["valid", "missing", "truncated"]
    assert (frame["one"] == frame["map"]).tolist() == [True, False, True, True]  # one kind of category, comparable
    for key in store.teachers:
        coverage = store[key].coverage()
        assert (frame[key] == "valid").sum() == coverage.valid
        assert (frame[key] == "missing").sum() == coverage.missing


def test_a_missing_image_is_not_a_missing_row(small):
    store = FeatureStore(small().fill({3: "missing", 5: "truncated"}, limit=8).path)
    frame = store.to_pandas()
    assert (
        frame["depth"].tolist()
        == ["valid"] * 3 + ["missing image", "valid", "truncated"] + ["valid"] * 2 + ["missing"] * 2
    )
    failures = store["depth"].to_pandas()
    assert failures.to_dict("list") == {
        "row": [3, 5],
        "image": ["photos/00003.jpg", "photos/00005.jpg"],
        "reason": ["missing", "truncated"],
        "detail": ["detail of 3", "detail of 5"],
    }
    assert failures["row"].dtype == np.int64
    assert failures["reason"].dtype == "category"
    assert "1 missing image, 1 truncated" in store._repr_html_()


def test_tables_of_a_plan_that_has_grown_and_of_nothing(small, tmp_path):
    grown = small(rows=6)
    grown.fill()
    grown.builder.extend_plan(pa.array([f"photos/{i:05d}.jpg" for i in range(9)], pa.large_string()))
    frame = FeatureStore(grown.path).to_pandas()
    assert frame["row"].tolist() == [*range(6), *range(4096, 4099)]
    assert frame["depth"].tolist() == ["valid"] * 6 + ["missing"] * 3
    assert FeatureStore(grown.path)["depth"].to_pandas().shape == (0, 4)
    empty = FeatureStore(StoreBuilder(tmp_path / "empty").path).to_pandas()
    assert (len(empty), list(empty)) == (0, ["row", "image"])


def test_a_teacher_that_cannot_be_opened_is_damaged_in_every_row(store):
    (store.path / "one/zarr.json").write_text("{}")
    frame = FeatureStore(store.path).to_pandas()
    assert set(frame["one"]) == {"damaged"}
    assert frame["map"].tolist() == ["valid", "truncated", "valid", "missing"]


def test_a_teacher_may_be_called_as_a_column_is(store):
    (store.path / "map").rename(store.path / "image")
    frame = FeatureStore(store.path).to_pandas()
    assert frame.columns.tolist() == ["row", "image", "image (teacher)", "loose", "one"]
    assert frame["image"].tolist() == IMAGES


def test_without_pandas_a_table_is_one_line_of_advice(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for table in (store.to_pandas, store["map"].to_pandas):
        with pytest.raises(MissingExtra, match=r"^tables need pandas.*: pip install 'olavlm\[notebook\]'$") as caught:
            table()
        assert isinstance(caught.value, CacheError)
        assert isinstance(caught.value, ImportError)


class ManyRows:
    """As many rows as LLaVA-558K, three teachers, some missing and quarantined: what tables ask of a store."""

    teachers = ("depth", "gen", "seg")

    def __init__(self, count):
        images = pa.array([f"{i // 1000:05d}/{i:09d}.jpg" for i in range(count)], pa.large_string())
        self.plan = pa.table({"row": pa.array(np.arange(count)), "image": images})
        self.rows = type("Rows", (), {"rows": np.arange(count)})
        self.failed = [(row, BadImage(f"{row}.jpg", "truncated")) for row in range(0, count, 500)]

    def __getitem__(self, key):
        return self

    def missing_rows(self):
        return np.arange(1, len(self.plan), 100)

    def failures(self):
        return self.failed


def test_a_table_of_558_thousand_rows_takes_no_loop_over_rows():
    store = ManyRows(558_128)
    display.plan_frame(ManyRows(10))  # pandas imported
    began = time.process_time()
    frame = display.plan_frame(store)
    took = time.process_time() - began
    assert frame["seg"].value_counts().to_dict() == {"valid": 551_429, "missing": 5_582, "truncated": 1_117}
    assert took < 2
