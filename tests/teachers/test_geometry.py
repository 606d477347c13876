import io

import numpy as np
import pytest
from PIL import Image

from olavlm.cache import decode_rgb
from olavlm.teachers import TeacherError, geometry
from olavlm.teachers.geometry import Resizing, frame, long_edge_fit, short_edge_crop

MEAN = (0.48145466, 0.4578275, 0.40821073)


def columns(width: int, height: int) -> Image.Image:
    """A picture whose red value is the column and green value the row."""
    rows, cols = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([cols, rows, 0 * cols], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_are_shown_as_a_store_decodes_them(mode):
    samples = np.array([[0, 255, 256, 30000], [40000, 65279, 65280, 65535]], dtype=np.uint16)
    whole = Image.fromarray(samples)
    image = {"I;16": whole, "I;16B": Image.frombytes("I;16B", (4, 2), samples.astype(">u2").tobytes()),
             "I": Image.fromarray(samples.astype(np.int32))}[mode]  # fmt: skip
    assert image.mode == mode
    whole.save(file := io.BytesIO(), "png")
    expected = np.asarray(decode_rgb(file.getvalue()))
    assert expected[:, :, 0].tolist() == [[0, 0, 1, 117], [156, 254, 255, 255]]
    np.testing.assert_array_equal(np.asarray(frame(image, "reference", MEAN)), expected)


def test_float_samples_are_refused():
    with pytest.raises(TeacherError, match=r"mode 'F'.*scale them to 8 bits"):
        frame(Image.new("F", (2, 2), 0.5), "reference", MEAN)


def test_reference_leaves_the_picture():
    image = columns(5, 3)
    assert frame(image, "reference", MEAN) is image


@pytest.mark.parametrize(("size", "first"), [((7, 4), (1, 0)), ((4, 7), (0, 1)), ((6, 4), (1, 0)), ((4, 4), (0, 0))])
def test_square_is_the_centre(size, first):
    squared = np.asarray(frame(columns(*size), "square", MEAN))
    assert squared.shape == (4, 4, 3)
    assert tuple(squared[0, 0, :2]) == first
    assert tuple(squared[3, 3, :2]) == (first[0] + 3, first[1] + 3)


def test_pad_fills_with_the_integer_part_of_the_mean():
    padded = np.asarray(frame(columns(6, 3), "pad", MEAN))
    assert padded.shape == (6, 6, 3)
    assert (padded[0] == (122, 116, 104)).all()  # one row above, two below: half of three, rounded down
    assert (padded[4:] == (122, 116, 104)).all()
    assert (padded[1:4] == np.asarray(columns(6, 3))).all()


def test_a_tall_picture_is_padded_left_and_right():
    padded = np.asarray(frame(columns(3, 6), "pad", MEAN))
    assert (padded[:, 1:4] == np.asarray(columns(3, 6))).all()
    assert (padded[:, [0, 4, 5]] == (122, 116, 104)).all()


def test_an_unknown_geometry_lists_the_valid_ones():
    with pytest.raises(TeacherError, match=r"'crop'.*reference, square, pad"):
        frame(columns(2, 2), "crop", MEAN)


def test_short_edge_crop_rounds_down():
    # 5x3 to a short edge of 4: the long edge is int(4 * 5 / 3) = 6, and (6 - 4) // 2 = 1 column goes on the left.
    image = columns(5, 3)
    whole = np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(short_edge_crop(image, 4)), whole[:, 1:5])


@pytest.mark.parametrize(("cut", "left"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_half_a_pixel_to_the_even_number(cut, left):
    image = columns(4 + cut, 4)
    assert short_edge_crop(image, 4, half="even").getpixel((0, 0))[0] == left
    assert short_edge_crop(image, 4).getpixel((0, 0))[0] == cut // 2


@pytest.mark.parametrize("half", ["down", "even"])
@pytest.mark.parametrize("size", [(400, 30), (30, 400), (401, 37)])
def test_resizing_only_what_is_kept_is_the_same(size, half, monkeypatch):
    image = columns(*size)
    whole = np.asarray(short_edge_crop(image, 50, half=half)).astype(int)
    monkeypatch.setattr(geometry, "LONGEST_SIDE", 50)
    part = np.asarray(short_edge_crop(image, 50, half=half))
    assert abs(part - whole).max() <= 1


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1)])
def test_a_picture_one_pixel_wide_fits_in_memory(size):
    assert max(frame(Image.new("RGB", size), "pad", MEAN).size) == 8192
    assert short_edge_crop(Image.new("RGB", size, (1, 2, 3)), 224).getcolors() == [(224 * 224, (1, 2, 3))]


def test_a_longer_edge_than_the_side_is_cut_on_all_sides():
    # 12x6 to an edge of 6 (twice that long), of which the middle 4x4 is kept: 4 columns left and right, 1 row each.
    image = columns(12, 6)
    expected = np.asarray(image.resize((12, 6), Image.Resampling.BILINEAR))[1:5, 4:8]
    got = short_edge_crop(image, 4, edge=6, resample=Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_the_long_edge_is_fitted_and_filled():
    # 8x2 to a long edge of 4 is 4x1; of the three rows to fill one goes above.
    image = columns(8, 2)
    fitted = np.asarray(long_edge_fit(image, 4, edge=4, resample=Image.Resampling.NEAREST, fill=(7, 8, 9)))
    np.testing.assert_array_equal(fitted[1], np.asarray(image.resize((4, 1), Image.Resampling.NEAREST))[0])
    assert (fitted[[0, 2, 3]] == (7, 8, 9)).all()


def test_a_long_edge_beyond_the_side_is_cut():
    image = columns(6, 6)
    for half, at in (("down", 1), ("even", 2)):  # of three
        cut = long_edge_fit(image, 3, edge=6, resample=Image.Resampling.NEAREST, fill=(0, 0, 0), half=half)
        np.testing.assert_array_equal(np.asarray(cut), np.asarray(image)[at : at + 3, at : at + 3])


@pytest.mark.parametrize(
    ("resizing", "text"),
    [
        (
            Resizing("short edge", 224, 248, Image.Resampling.BICUBIC, half="even"),
            "short edge to 248 bicubic, centre crop 224 rounded to even",
        ),
        (Resizing("squash", 336, 336, Image.Resampling.BILINEAR), "squash to 336 bilinear"),
        (
            Resizing("squash", 224, 256, Image.Resampling.BICUBIC),
            "squash to 256 bicubic, centre crop 224",
        ),
        (
            Resizing("long edge", 8, 8, Image.Resampling.LANCZOS, (1, 2, 3)),
            "long edge to 8 lanczos, centred on (1, 2, 3)",
        ),
        (
            Resizing("long edge", 8, 9, Image.Resampling.LANCZOS, half="even"),
            "long edge to 9 lanczos, centred on (0, 0, 0), centre crop 8 rounded to even",
        ),
    ],
)
def test_a_resizing_says_what_it_does(resizing, text):
    assert str(resizing) == text
    assert resizing(columns(20, 10)).size == (resizing.side, resizing.side)
    assert resizing.within("reference") is resizing
    whole = resizing.within("pad")
    assert str(whole) == f"squash to {resizing.side} {resizing.resample.name.lower()}"
    assert whole.within("square") == whole
