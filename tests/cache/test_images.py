"""Bytes to pictures: every decode rule against values worked out by hand, every reason a picture is refused for."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from olavlm.cache import BadImage, decode_rgb

BASE = [[1, 2, 3], [4, 5, 6]]  # stored rows; what each EXIF orientation makes of them:
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],  # mirrored left to right
    3: [[6, 5, 4], [3, 2, 1]],  # turned by 180 degrees
    4: [[4, 5, 6], [1, 2, 3]],  # mirrored top to bottom
    5: [[1, 4], [2, 5], [3, 6]],  # mirrored at the main diagonal
    6: [[4, 1], [5, 2], [6, 3]],  # turned clockwise
    7: [[6, 3], [5, 2], [4, 1]],  # mirrored at the other diagonal
    8: [[3, 6], [2, 5], [1, 4]],  # turned anticlockwise
}


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> list:
    picture = decode_rgb(data)
    assert picture.mode == "RGB"
    return np.asarray(picture).tolist()


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that its samples are known; colour 0 grey, 2 RGB, 3 palette."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def refused(data: bytes) -> BadImage:
    with pytest.raises(BadImage) as e:
        decode_rgb(data, "folder/x.jpg")
    assert e.value.image == "folder/x.jpg"
    assert e.value.reason in BadImage.REASONS
    assert str(e.value).startswith(f"folder/x.jpg: {e.value.reason}")
    return e.value


def test_grey_is_repeated():
    assert pixels(saved(Image.fromarray(np.array([[0, 200]], np.uint8)), "PNG")) == [[[0, 0, 0], [200, 200, 200]]]


def test_one_bit_is_black_and_white():
    assert pixels(png(3, 1, 1, 0, [bytes([0b10100000])])) == [[[255] * 3, [0] * 3, [255] * 3]]


PALETTE = (b"PLTE", bytes([10, 20, 30, 200, 100, 50]))


def test_a_palette_is_looked_up():
    assert pixels(png(2, 1, 8, 3, [b"\1\0"], PALETTE)) == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize("alpha", [b"\0", b"\x80\0"], ids=["one colour index", "an alpha for each"])
def test_the_colour_under_a_transparent_palette_entry_stays(alpha):
    data = png(2, 1, 8, 3, [b"\1\0"], PALETTE, (b"tRNS", alpha))
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert pixels(data) == [[[200, 100, 50], [10, 20, 30]]]


def test_alpha_is_dropped_and_the_colour_under_it_stays():
    rgba = np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)
    assert pixels(saved(Image.fromarray(rgba), "PNG")) == [[[10, 20, 30], [40, 50, 60]]]
    la = np.array([[[77, 0], [99, 255]]], np.uint8)
    assert pixels(saved(Image.fromarray(la, "LA"), "PNG")) == [[[77] * 3, [99] * 3]]


def cmyk(*inks: tuple[int, int, int, int]) -> Image.Image:
    return Image.frombytes("CMYK", (len(inks), 1), bytes(v for ink in inks for v in ink))


def test_cmyk_is_light_less_ink():
    """R = (255 - C)(255 - K) / 255: C 100, K 55 leaves 200 - 100 * 200 / 255 = 121.6."""
    data = saved(cmyk((0, 255, 255, 0), (0, 0, 0, 255), (100, 0, 0, 55)), "TIFF")
    assert pixels(data) == [[[255, 0, 0], [0, 0, 0], [122, 200, 200]]]


def test_a_cmyk_jpeg_with_adobe_marker_is_stored_inverted_and_read_upright():
    picture = cmyk((0, 255, 255, 0)).resize((16, 16))
    data = saved(picture, "JPEG", quality=100)
    assert b"Adobe" in data
    stored = Image.open(io.BytesIO(data))
    stored.tile = [tile._replace(args=("CMYK", "")) for tile in stored.tile]  # as they lie in the file
    np.testing.assert_allclose(np.asarray(stored), 255 - np.asarray(picture), atol=3)
    np.testing.assert_allclose(np.asarray(decode_rgb(data)), np.full((16, 16, 3), [255, 0, 0]), atol=3)


def test_sixteen_bit_samples_keep_their_high_byte():
    grey = png(4, 1, 16, 0, [bytes.fromhex("0000 00ff 12ff ffff")])
    assert pixels(grey) == [[[0] * 3, [0] * 3, [0x12] * 3, [255] * 3]]
    rgb = png(1, 1, 16, 2, [bytes.fromhex("12ff 80ff 0180")])
    assert pixels(rgb) == [[[0x12, 0x80, 0x01]]]


def test_thirty_two_bit_samples_are_clipped_to_sixteen():
    data = saved(Image.fromarray(np.array([[-5, 0x1234, 70000]], np.int32)), "TIFF")
    assert pixels(data) == [[[0] * 3, [0x12] * 3, [255] * 3]]


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    grey = np.array(BASE, np.uint8) * 10
    for picture in (Image.fromarray(grey), Image.fromarray(np.stack([grey, grey, grey], 2))):
        data = saved(picture, "PNG", exif=exif(orientation))
        assert (np.asarray(decode_rgb(data))[:, :, 0] // 10).tolist() == UPRIGHT[orientation]
    deep = png(
        3, 2, 16, 0, [bytes([1, 0, 2, 0, 3, 0]), bytes([4, 0, 5, 0, 6, 0])], (b"eXIf", exif(orientation).tobytes()[6:])
    )
    assert np.asarray(decode_rgb(deep))[:, :, 0].tolist() == UPRIGHT[orientation]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_costs_neither_the_picture_nor_its_orientation(rng):
    """ImageOps.exif_transpose rewrites the block, and raises where another tag in it is damaged."""
    block = exif(6)
    block[0x010F], block[0x0110], block[0x011A], block[0x9003] = "maker", "model", 72.0, "2020:01:01"
    data = saved(Image.new("RGB", (24, 16)), "JPEG", exif=block)
    start = data.index(b"Exif\0\0") + 6
    stop = start - 8 + int.from_bytes(data[start - 8 : start - 6], "big")
    sizes = set()
    for _ in range(500):
        damaged = bytearray(data)
        for at in rng.integers(start, stop, 4):
            damaged[at] = rng.integers(256)
        sizes.add(decode_rgb(bytes(damaged)).size)
    assert sizes == {(16, 24), (24, 16)}


def test_the_first_frame_of_an_animation():
    frames = [Image.new("P", (2, 2), i) for i in range(2)]
    for frame in frames:
        frame.putpalette([250, 0, 0, 0, 250, 0])
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data) == [[[250, 0, 0]] * 2] * 2


def test_empty_and_foreign_files_are_refused():
    assert refused(b"").reason == "empty"
    assert refused(b"<html>404</html>").reason == "not-an-image"
    assert refused(b"\0" * 5000).reason == "not-an-image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_a_truncated_picture_is_refused(kind, rng):
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = saved(noise, kind)
    decode_rgb(data)
    assert refused(data[: len(data) // 2]).reason == "truncated"
    for cut in range(1, 60):
        assert refused(data[:cut]).reason in ("truncated", "not-an-image")


def test_samples_without_a_defined_white_are_refused():
    assert refused(saved(Image.new("F", (2, 2)), "TIFF")).reason == "unsupported-mode"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [50_000, 9_500], ids=["twice the limit", "just over, where Pillow only warns"])
def test_a_decompression_bomb_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("its pixels were decoded"))
    assert side**2 > Image.MAX_IMAGE_PIXELS
    assert refused(png(side, side, 8, 0, [b"\0"])).reason == "decompression-bomb"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_within_a_small_picture_is_refused():
    """An .ico says its size twice, in its directory and in the PNG within; the second is seen only on decoding."""
    bomb = png(50_000, 50_000, 8, 2, [b"\0"])
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb), 22)
    assert refused(directory + bomb).reason == "decompression-bomb"


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "ICO", "PPM", "DDS"] + (["AVIF"] if features.check("avif") else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_raises_nothing_but_bad_image(kind, rng):
    data = saved(Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)), kind)
    bad = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), rng.choice([150, len(data)])), 3):
            damaged[at] = rng.integers(256)
        try:
            assert decode_rgb(bytes(damaged)).mode == "RGB"
        except BadImage:
            bad += 1
    assert bad  # else nothing was damaged


def test_running_out_of_memory_is_not_the_picture_s_fault(monkeypatch):
    def exhausted(self):
        raise MemoryError

    data = saved(Image.new("RGB", (2, 2)), "PNG")
    monkeypatch.setattr(Image.Image, "load", exhausted)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    with pytest.raises(MemoryError):
        decode_rgb(data)
