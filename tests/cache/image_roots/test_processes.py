"""One root read by many threads and processes."""

import multiprocessing
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from olavlm.cache import ImageRoots


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_many_threads_read_one_zip(tmp_path, compression, archive, members):
    roots = ImageRoots([str(archive(tmp_path / "x.zip", members, compression))])
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(roots.read, members)) == list(members.values())


@pytest.mark.parametrize("kind", ["folder", "zip", "S3", "zip on S3", "web"])
def test_forked_and_spawned_processes_and_threads_read_one_root_at_once(kind, behind, start, read_all, members):
    if kind not in ("folder", "zip"):
        members = dict(list(members.items())[:40])  # those servers are slow
    roots = ImageRoots([behind(kind, members)])
    assert read_all(roots, members)  # a connection and its event loop are open when the children fork

    def child(_):
        assert read_all(roots, members)

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        spawned = [pool.apply_async(ImageRoots.read, (roots, name)) for name in members]
        children = [start(child) for _ in range(3)]
        assert read_all(roots, members)  # a shared file position would mix them up
        assert [child.wait() for child in children] == [0, 0, 0]
        assert [r.get(60) for r in spawned] == list(members.values())


def test_a_child_forked_while_threads_read_is_never_stuck(tmp_path, start, archive, read_all, members):
    """There is no lock that it could inherit taken."""
    roots = ImageRoots([str(archive(tmp_path / "x.zip", members))])
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            roots.read(next(iter(members)))

    readers = [threading.Thread(target=busy) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        children = [start(lambda _: read_all(roots) or os._exit(3)) for _ in range(10)]
        assert [child.wait() for child in children] == [0] * 10
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_a_zip_is_opened_once_and_a_member_is_one_read(tmp_path, start, monkeypatch, archive, members):
    roots = ImageRoots([str(archive(tmp_path / "x.zip", members, zipfile.ZIP_STORED))])
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: reads.append(length) or pread(fd, length, at))
    for name, content in members.items():
        assert roots.read(name) == content
    # its header, its name and 64 bytes for an extra field are read with it
    assert reads == [30 + len(name) + 64 + len(content) for name, content in members.items()]

    def child(_):
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened again"))
        assert roots.read("000/00000.jpg") == members["000/00000.jpg"]

    assert start(child).wait() == 0
