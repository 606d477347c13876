"""Previews and notebook reprs: planted structure comes back as colours, and what is missing is said, not painted."""

import json
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from olavlm.cache import DatasetError, FeatureStore, MissingFeatures, StoreBuilder, display
from olavlm.cache.display import PcaColours, bar_limit, token_map, vector_bars

IMAGES = ["a.png", "b/é.jpg", "c.png", "d.png"]
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
    assert tuple(pixels[9, 5, :3]) == display.POSITIVE
    assert tuple(pixels[11, 15, :3]) == display.NEGATIVE
    many = np.zeros(1000)
    many[500] = 1.0  # one dimension of many is still seen
    assert (np.asarray(vector_bars(many, (50, 21), 1.0))[:10, :, 3] > 0).any()
    assert bar_limit(np.zeros(4)) == 1.0


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


@pytest.fixture
def panels(monkeypatch):
    """What `preview` puts into its panels: (content, title, subtitle)."""
    seen, original = [], display._panel

    def spy(*content):
        seen.append(content)
        return original(*content)

    monkeypatch.setattr(display, "_panel", spy)
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
    place = display._MARGIN + 2 * (display.SIDE + display._MARGIN)
    assert sheet.getpixel((place + 100, display._MARGIN + 35 + 100)) == tokens.getpixel((100, 100))
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
    shard = next((store["map"].array / "c/0").rglob("0"))
    shard = shard if shard.is_file() else shard / "0"
    shard.write_bytes(shard.read_bytes()[:100])
    panels.clear()
    FeatureStore(store.path).preview(0, roots)
    assert {title: content for content, title, _ in panels}["map"].startswith("damaged: ")


def test_roots_are_those_of_the_newest_extraction_wherever_it_was_started(store, tmp_path, panels, monkeypatch):
    store.preview(0)
    assert "give roots=" in panels[0][0]  # no extraction on record
    record_run(store, "20250101T000000Z-1", images=["elsewhere"], store="store")
    record_run(store, "20250102T000000Z-1", images=["gone", "images"], store="store")
    (store.path / "runs" / "20250103T000000Z-1.json").write_text("cut sho")
    assert display.extracted_from(store) == [str(tmp_path / "here/images")]
    panels.clear()
    store.preview(0)
    assert isinstance(panels[0][0], Image.Image)
    record_run(store, "20250104T000000Z-1", images=["b=images/b"], store="store")
    assert display.extracted_from(store) == [f"b={tmp_path / 'here/images/b'}"]
    record_run(store, "20250105T000000Z-1", images=["images"], store=str(store.path))
    assert display.extracted_from(store) == []  # an absolute store does not tell where
    monkeypatch.chdir(tmp_path / "here")
    assert display.extracted_from(store) == ["images"]


def test_errors_of_the_caller_are_raised(store):
    with pytest.raises(MissingFeatures, match="nowhere"):
        store.preview("nowhere.png")
    with pytest.raises(MissingFeatures, match="row 9"):
        store.preview(9)
    with pytest.raises(DatasetError, match="/nowhere"):
        store.preview(0, ["/nowhere"])


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


def test_a_teacher_that_cannot_be_read_does_not_hide_the_others(store):
    metadata = store.path / "one" / "zarr.json"
    metadata.write_text("{}")
    page = Balanced(FeatureStore(store.path)._repr_html_())
    assert "cannot be read" in page.text
    assert "3 of 4 images" in page.text
