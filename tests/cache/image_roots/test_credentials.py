"""Secrets of a URL are used, and shown nowhere."""

import pickle
import traceback

import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots
from olavlm.cache.images import redacted


def test_user_password_and_signature_of_a_url_are_used(guarded, folder, reason):
    name = "ü #1?&+%20;=.jpg"
    (folder / name).write_bytes(b"odd")
    roots = ImageRoots([f"coco={guarded.url('images')}"])
    assert roots.read("coco/sub/b.jpg") == b"b"
    assert roots.read(f"coco/{name}") == b"odd"  # a path goes before the query, and is none of it
    assert reason(roots, "coco/nothing.jpg") == "missing"
    assert pickle.loads(pickle.dumps(roots)).read("coco/a.jpg") == b"a"
    for wrong in (guarded.url("images", password="wrong"), guarded.url("images", query="X-Amz-Signature=wrong")):
        assert reason(ImageRoots([wrong]), "a.jpg") == "unreadable"


def everything(error: Exception) -> str:
    return f"{error} {error.args} {vars(error)} {''.join(traceback.format_exception(error))}"


def test_no_bad_image_shows_a_credential(guarded):
    """Neither in our words nor in those of the client and of the server."""
    shown = {}
    for name, root in {
        "images": guarded.url("images"),
        "broken": guarded.url("broken"),
        "wrong": guarded.url("images", query="token=" + guarded.signature),
    }.items():
        with pytest.raises(BadImage) as e:
            ImageRoots([f"coco={root}"]).read("coco/x.jpg")
        shown[name] = e.value
    assert shown["images"].detail == f"not under coco=http://{guarded.host}/images"
    assert shown["broken"].detail == (
        f"ClientResponseError: 500, message='Broken for *** (***), ***', url='http://{guarded.host}/broken/x.jpg'"
    )
    assert shown["wrong"].detail.startswith(
        "ClientResponseError: 403, message='Not /images/x.jpg?*** /images/x.jpg?***"
    )
    for error in shown.values():
        assert not [s for s in guarded.secrets if s in everything(error)]


def test_no_dataset_error_shows_a_credential(guarded, nobody):
    there, away = guarded.host, [guarded.url(path, host=nobody) for path in ("images", "images.zip", "x", "x" * 300)]
    wrong = {
        f"coco={away[0]}": f"image root http://{nobody}/images cannot be opened: ClientConnectorError",
        guarded.url("images.zip", password="no"): f"image root http://{there}/images.zip cannot be opened: ",
        f"zip://::{away[1]}": f"image root http://{nobody}/images.zip cannot be opened: ",
        f"ftp{away[0][4:]}": f"image root ftp://{nobody}/images cannot be opened: ConnectionRefusedError",
        f"nosuch{away[2][4:]}": f"image root nosuch://{nobody}/x cannot be opened: ValueError: Protocol not",
        f"coco=file://{away[3][7:]}": "image root ",
    }
    for root, words in wrong.items():
        with pytest.raises(DatasetError) as e:
            ImageRoots([root])
        assert str(e.value).startswith(words)
        assert not [s for s in guarded.secrets if s in everything(e.value)]


REDACTED = {
    "https://user:pw@host:8443/a/b": "https://host:8443/a/b",
    "https://token@host/a": "https://host/a",
    "https://user:p@w/x": "https://w/x",
    "https://user:p?w@host/a": "https://host/a",
    "https://host/a.zip?X-Amz-Signature=0a&X-Amz-Date=1": "https://host/a.zip",
    "https://host/a?sig=1#2": "https://host/a",
    "coco/val=s3://key:secret@bucket/a@b/c": "coco/val=s3://bucket/a@b/c",
    "a?b=https://u:p@host/x?q": "a?b=https://host/x",
    "ray://user:pw@head:10001": "ray://head:10001",
    "zip://in::simplecache::https://u:p@host/a.zip?sig=1": "zip://in::simplecache::https://host/a.zip",
    "simplecache::https://u:p@h/a?sig=1::file://x": "simplecache::https://h/a::file://x",
    "http://u:p@[::1]:80/x?y=1": "http://[::1]:80/x",
}
LEFT_ALONE = [
    *("images", "", "/data/a?b=c@d", "coco=/data/me@home", "auto", "127.0.0.1:6379", "depth=org/model", "memory://x"),
    *("s3://bucket/a b/c@d", "file:///a/b", "http://[::1]:80/x", "zip://::s3://bucket/a.zip"),
]


def test_redacted_takes_user_password_and_query_and_nothing_else():
    assert {url: redacted(url) for url in REDACTED} == REDACTED
    assert [redacted(url) for url in LEFT_ALONE] == LEFT_ALONE
