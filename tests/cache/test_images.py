"""Bytes to pictures: every decode rule against values worked out by hand, every reason a picture is refused for."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile, features

from olavlm.cache import BadImage, ImageRoots, decode_rgb

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
    """A PNG written by hand, so that its samples are known; colour 0 grey, 2 RGB, 3 palette, 4 grey
    and alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def tiff(width: int, bits: int, photometric: int, data: bytes, *, order="<", orientation=1, floats=False) -> bytes:
    """A TIFF written by hand, uncompressed; photometric 0 white is zero, 1 black is zero, 2 RGB, 6 YCbCr."""
    samples = 3 if photometric in (2, 6) else 1
    height = len(data) * 8 // (width * bits * samples)
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 274: orientation, 277: samples,
              278: height, 279: len(data), 339: 3 if floats else 1}  # fmt: skip
    bits_at = 8 + 2 + 12 * len(fields) + 4  # the three numbers of bits do not fit the field
    fields[273] = bits_at + 6
    entries = b"".join(
        struct.pack(order + "HHLL", tag, 3, 3, bits_at)
        if tag == 258 and samples == 3
        else struct.pack(order + "HHLHH", tag, 3, 1, number, 0)
        for tag, number in fields.items()
    )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HLH", 42, 8, len(fields))
    return head + entries + bytes(4) + struct.pack(order + "3H", bits, bits, bits) + data


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


def test_sixteen_bit_samples_with_alpha_keep_their_high_byte():
    assert pixels(png(2, 1, 16, 4, [bytes.fromhex("12ff 0000 80ff ffff")])) == [[[0x12] * 3, [0x80] * 3]]
    assert pixels(png(1, 1, 16, 6, [bytes.fromhex("12ff 80ff 0180 0000")])) == [[[0x12, 0x80, 0x01]]]


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_sixteen_bit_tiffs_keep_their_high_byte_too(order):
    grey = struct.pack(order + "4H", 0, 0x00FF, 0x12FF, 0xFFFF)
    assert pixels(tiff(4, 16, 1, grey, order=order)) == [[[0] * 3, [0] * 3, [0x12] * 3, [255] * 3]]
    colour = struct.pack(order + "3H", 0x12FF, 0x80FF, 0x0180)
    assert pixels(tiff(1, 16, 2, colour, order=order)) == [[[0x12, 0x80, 0x01]]]


def test_where_white_is_zero_black_is_white():
    """At 8 bits 255 - v; at 16 bits 65535 - v: 0x12FF becomes 0xED00."""
    assert pixels(tiff(3, 8, 0, bytes([0, 55, 255]))) == [[[255] * 3, [200] * 3, [0] * 3]]
    assert pixels(tiff(3, 16, 0, struct.pack("<3H", 0, 0x12FF, 0xFFFF))) == [[[255] * 3, [0xED] * 3, [0] * 3]]
    assert pixels(tiff(3, 16, 1, struct.pack("<3H", 0, 0x12FF, 0xFFFF))) == [[[0] * 3, [0x12] * 3, [255] * 3]]


def test_ycbcr_is_turned_into_rgb():
    """R = Y + 1.402 Cr', G = Y - 0.344 Cb' - 0.714 Cr', B = Y + 1.772 Cb' (JFIF), Cb' = Cb - 128, Cr' = Cr - 128.

    Of (100, 90, 200), Cb' = -38, Cr' = 72: R = 200.9, G = 100 + 13.1 - 51.4 = 61.7, B = 32.7; of (100, 128, 128) grey.
    """
    flat = Image.new("YCbCr", (16, 16), (100, 90, 200))  # within a JPEG, where one colour survives the compression
    data = saved(flat, "JPEG", quality=100)
    np.testing.assert_allclose(pixels(data), np.full((16, 16, 3), [200.9, 61.7, 32.7]), atol=2)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 takes it for truncated")
def test_ycbcr_of_a_tiff_is_turned_into_rgb():
    """As above."""
    np.testing.assert_allclose(pixels(tiff(2, 8, 6, bytes([100, 90, 200, 100, 128, 128]))),
                               [[[200.9, 61.7, 32.7], [100, 100, 100]]], atol=1)  # fmt: skip


@pytest.mark.parametrize("progressive", [False, True])
def test_a_progressive_jpeg_is_read_as_a_plain_one(progressive):
    """Left half (200, 40, 40), right half (20, 60, 200), each whole blocks of 16: the borders of blocks are sharp."""
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, :16], halves[:, 16:] = (200, 40, 40), (20, 60, 200)
    data = saved(Image.fromarray(halves), "JPEG", quality=100, subsampling=0, progressive=progressive)
    assert (b"\xff\xc2" in data) == progressive  # the frame header of a progressive one
    np.testing.assert_allclose(pixels(data), halves, atol=4)
    assert refused(data[: len(data) * 2 // 3]).reason == "truncated"


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


CORNER = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
"""Where the stored top left corner lies in the upright picture (row, column)."""


@pytest.mark.parametrize("orientation", CORNER)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_marked_corner_lands_where_the_orientation_says(kind, orientation):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :16] = 255
    options = {"exif": exif(orientation), **({"lossless": True} if kind == "WEBP" else {})}
    picture = np.asarray(decode_rgb(saved(Image.fromarray(stored), kind, **options)))
    assert picture.shape == ((64, 32, 3) if orientation >= 5 else (32, 64, 3))
    bright = [(r, c) for r in (0, -1) for c in (0, -1) if picture[r, c].min() > 250]
    assert bright == [CORNER[orientation]]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_of_a_tiff_is_applied_once(orientation, order):
    """Pillow applies it while it decodes; that of 16-bit samples too."""
    eight = tiff(3, 8, 1, bytes([1, 2, 3, 4, 5, 6]), order=order, orientation=orientation)
    sixteen = tiff(
        3, 16, 1, struct.pack(order + "6H", *(256 * v for v in range(1, 7))), order=order, orientation=orientation
    )
    for data in (eight, sixteen):
        assert np.asarray(decode_rgb(data))[:, :, 0].tolist() == UPRIGHT[orientation]


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


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_the_first_frame_of_other_animations(kind):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data) == [[[250, 0, 0]] * 2] * 2


FOREIGN = {
    "nothing but zeros": b"\0" * 5000,
    "a page that says 404": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n",
    "a page with a byte order mark": b"\xef\xbb\xbf<html><body>Access denied</body></html>",
    "an error in XML": b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    "an error in JSON": b'{"error": "not found"}',
    "text": "A cat on a table.\r\nEin Käse.\r\n".encode(),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PDF": b"%PDF-1.4\n1 0 obj\n<</Type/Catalog>>\nendobj\n",
    "a video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 100,
    "a zip": b"PK\3\4" + b"\0" * 100,
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "MPEG, which Pillow only names": b"\0\0\1\xb3\x10\x01\x10" + b"\0" * 100,
    "HDF5, which Pillow only names": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_image_whatever_its_name_is_refused(what):
    assert refused(FOREIGN[what]).reason == "not-an-image"


def test_an_empty_file_is_refused():
    assert refused(b"").reason == "empty"


def test_postscript_is_not_run(monkeypatch):
    """Pillow would hand it to Ghostscript: an interpreter for programs that came with the images."""
    ran = []
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *args, **_: ran.append(args) or Image.new("L", (9, 9)).im
    )
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\n%%EOF\n"
    Image.open(io.BytesIO(program)).load()
    assert len(ran) == 1
    assert refused(program).reason == "not-an-image"
    assert len(ran) == 1


def test_a_file_s_name_says_nothing(tmp_path):
    jpeg = saved(Image.new("RGB", (16, 16), (250, 0, 0)), "JPEG", quality=100)
    files = {
        "really a jpeg.png": jpeg,
        "no suffix": jpeg,
        "a picture.txt": jpeg,
        "a page.jpg": FOREIGN["a page that says 404"],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    roots = ImageRoots([str(tmp_path)])
    for name in list(files)[:3]:
        np.testing.assert_allclose(np.asarray(roots.open(name)), np.full((16, 16, 3), [250, 0, 0]), atol=3)
    with pytest.raises(BadImage, match=r"^a page.jpg: not-an-image"):
        roots.open("a page.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_a_truncated_picture_is_refused(kind, rng, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as a library may leave it
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = saved(noise, kind)
    decode_rgb(data)
    assert refused(data[: len(data) // 2]).reason == "truncated"
    for cut in range(1, 60):
        assert refused(data[:cut]).reason in ("truncated", "not-an-image")


def test_samples_without_a_defined_white_are_refused():
    assert refused(saved(Image.new("F", (2, 2)), "TIFF")).reason == "unsupported-mode"
    floats = struct.pack("<2f", 0.5, 1.0)
    assert refused(tiff(2, 32, 1, floats, floats=True)).reason == "unsupported-mode"
    assert pixels(tiff(2, 32, 1, struct.pack("<2L", 0, 0x12FF))) == [[[0] * 3, [0x12] * 3]]  # whole numbers have one


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
