"""One of every bad image through an extraction: each row is quarantined for its reason, the others are valid."""

import argparse
import base64
import io
import json
import os
import socket
import threading
import zipfile
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from olavlm.cache import BadImage, FeatureStore, ImageRoots, StoreBuilder, pending
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.pipelines.extraction.record import RunRecord
from olavlm.pipelines.extraction.summary import Tally
from olavlm.teachers import load_teacher


def saved(mode: str, kind: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of one row that says it has 50,000."""
    file = io.BytesIO()
    Image.new("L", (50_000, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[20:24] = (50_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


GOOD = {
    "colour.jpg": saved("RGB", "JPEG"),
    "progressive.jpg": saved("RGB", "JPEG", progressive=True),
    "grey.jpg": saved("L", "JPEG"),
    "cmyk.jpg": saved("CMYK", "JPEG"),
    "palette.png": saved("P", "PNG"),
    "alpha.png": saved("RGBA", "PNG"),
    "bits.png": saved("1", "PNG"),
    "sixteen.png": saved("I;16", "PNG"),
    "a jpeg.png": saved("RGB", "JPEG"),
    "moving.gif": saved("P", "GIF", save_all=True, append_images=[Image.new("P", (48, 40))]),
    "zip/member.webp": saved("RGB", "WEBP"),
}
BAD = {
    "nothing.jpg": "missing",
    "broken link.jpg": "missing",
    "zip/nothing.jpg": "missing",
    "empty.jpg": "empty",
    "404.jpg": "not-an-image",
    "notes.txt": "not-an-image",
    "figure.eps": "not-an-image",
    "half.jpg": "truncated",
    "half.png": "truncated",
    "bomb.png": "decompression-bomb",
    "../outside.jpg": "outside-root",
    "zip/../../outside.jpg": "outside-root",
    "/etc/passwd": "outside-root",
    "sub\\colour.jpg": "outside-root",
    "folder.jpg": "unreadable",
    "fifo.jpg": "unreadable",
    "socket.jpg": "unreadable",
    "device.jpg": "unreadable",
    "loop.jpg": "unreadable",
    "zip/damaged.jpg": "unreadable",
    "float.tif": "unsupported-mode",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """`images`, and beside it `images.zip` (for the prefix zip) and a good picture that must not be reached."""
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "outside.jpg").write_bytes(GOOD["colour.jpg"])
    files = {
        **{name: data for name, data in GOOD.items() if not name.startswith("zip/")},
        "empty.jpg": b"",
        "404.jpg": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n",
        "notes.txt": b"A cat on a table.\n",
        "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n",
        "half.jpg": GOOD["colour.jpg"][: len(GOOD["colour.jpg"]) // 2],
        "half.png": GOOD["alpha.png"][: len(GOOD["alpha.png"]) // 2],
        "bomb.png": bomb(),
        "float.tif": saved("F", "TIFF"),
    }
    for name, data in files.items():
        (images / name).write_bytes(data)
    (images / "folder.jpg").mkdir()
    os.mkfifo(images / "fifo.jpg")
    here = Path.cwd()
    os.chdir(images)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("socket.jpg")
    finally:
        os.chdir(here)
    (images / "device.jpg").symlink_to("/dev/zero")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "broken link.jpg").symlink_to("nothing")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        z.writestr("member.webp", GOOD["zip/member.webp"])
        z.writestr("damaged.jpg", GOOD["colour.jpg"])
    data = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(data.replace(GOOD["colour.jpg"], bytes(len(GOOD["colour.jpg"]))))
    return images


@pytest.fixture
def extract(tiny, tmp_path):
    """extract(images, roots, **options) -> the store, with depth of the rows that were pending."""
    spec = TeacherSpec("depth", "depth", str(tiny["depth"]))

    def work(images: list[str], roots: list[str], **options) -> FeatureStore:
        store = tmp_path / "store"
        builder = StoreBuilder(store)
        builder.extend_plan(pa.array(images, pa.large_string()))
        builder.ensure_teacher("depth", spec.load("cpu").card.to_dict(), dtype="float32", shard_rows=8)
        worker = ShardExtractor(str(store), [spec], roots, batch_size=4, device="cpu", threads=2)
        worker.load()
        results = worker.extract(pending(FeatureStore(store)["depth"], **options))
        assert all(result.outcome == "committed" for result in results)
        return FeatureStore(store)

    return work


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_image_is_quarantined_for_its_reason_and_the_others_are_valid(folder, extract, tiny):
    assert set(BAD.values()) == set(BadImage.REASONS) - {"non-finite", "overflow"}  # those are the features'
    images = [name for pair in zip(GOOD, BAD, strict=False) for name in pair] + list(BAD)[len(GOOD) :]
    roots = [f"zip={folder}.zip", str(folder)]
    store = extract(images, roots)
    depth = store["depth"]
    assert {failure.image: failure.reason for _, failure in depth.failures()} == BAD
    coverage = depth.coverage()
    assert (coverage.valid, coverage.quarantined, coverage.missing) == (len(GOOD), len(BAD), 0)

    teacher = load_teacher("depth", model=tiny["depth"])
    for image in GOOD:
        expected = teacher.encode([ImageRoots(roots).open(image)])[0].numpy()
        np.testing.assert_allclose(depth[image], expected, atol=1e-4)
    for image, reason in BAD.items():
        with pytest.raises(BadImage) as e:
            depth[image]
        assert e.value.reason == reason
    values, valid = depth.read(depth.plan.rows_of(images))
    assert valid.tolist() == [image in GOOD for image in images]
    assert np.isnan(values[~valid]).all()
    assert np.isfinite(values[valid]).all()

    # Control: it was the files. With a picture in each bad one's place, what lies within the root becomes valid.
    (folder.parent / "images.zip").unlink()
    with zipfile.ZipFile(f"{folder}.zip", "w") as z:
        for name in ("member.webp", "nothing.jpg", "damaged.jpg"):
            z.writestr(name, GOOD["zip/member.webp"])
    (folder / "folder.jpg").rmdir()
    mended = [name for name, reason in BAD.items() if reason != "outside-root"]
    for name in mended:
        if not name.startswith("zip/"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(GOOD["colour.jpg"])
    depth = extract(images, roots, retry_failed=True)["depth"]
    assert {failure.image for _, failure in depth.failures()} == set(BAD) - set(mended)
    np.testing.assert_array_equal(depth["fifo.jpg"], depth["colour.jpg"])


PASSWORD, SIGNATURE = "s3cret-Pa55word", "5ignature0123456789"


@pytest.fixture
def guarded(folder):
    """A web server that wants user, password and signature, and names them in its refusals. Its URL, without them."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            wanted = "Basic " + base64.b64encode(f"bob:{PASSWORD}".encode()).decode()
            if self.headers["Authorization"] != wanted or SIGNATURE not in self.path:
                return self.send_error(403)
            if "refused" in self.path:
                return self.send_error(500, f"no {self.path} for bob:{PASSWORD}")
            return super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_holds_no_credentials_of_its_image_roots(guarded, extract, capfd):
    """Neither in commit records nor in the record of the run; the roots stay recognisable."""
    root = f"coco=http://bob:{PASSWORD}@{guarded}?X-Amz-Signature={SIGNATURE}"
    images = ["coco/colour.jpg", "coco/nothing.jpg", "coco/refused.jpg"]
    store = extract(images, [root])
    depth = store["depth"]
    assert np.isfinite(depth["coco/colour.jpg"]).all()  # the server accepted the credentials
    failures = {failure.image: str(failure) for _, failure in depth.failures()}
    assert failures["coco/nothing.jpg"] == f"coco/nothing.jpg: missing (not under coco=http://{guarded})"
    assert failures["coco/refused.jpg"].startswith(
        "coco/refused.jpg: unreadable (ClientResponseError: 500, message='no"
    )

    args = argparse.Namespace(
        images=[root, "plain=/data/images"],
        store=str(store.path),
        address=f"ray://bob:{PASSWORD}@head:10001",
        data=["pt.json"],
        teacher=["depth=tiny/depth"],
        limit=None,
        workers=2,
        retry_failed=False,
    )
    RunRecord(store.path, args, []).end(Tally(), "done")
    (file,) = (store.path / "runs").glob("*.json")
    assert json.loads(file.read_text())["arguments"] == {
        "images": [f"coco=http://{guarded}", "plain=/data/images"],
        "store": str(store.path),
        "address": "ray://head:10001",
        "data": ["pt.json"],
        "teacher": ["depth=tiny/depth"],
        "workers": 2,
        "retry_failed": False,
    }
    written = {str(f): f.read_bytes() for f in store.path.rglob("*") if f.is_file()}
    assert any(b"refused.jpg" in data or b"ClientResponseError" in data for data in written.values())
    printed = "".join(capfd.readouterr())
    for secret in (PASSWORD, SIGNATURE):
        assert args.images[0].count(secret) == 1
        assert not [name for name, data in written.items() if secret.encode() in data]
        assert secret not in printed
