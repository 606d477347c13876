"""The torch twin of the codec: the same bits, the same reasons, the same fidelity, for any row there is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from olavlm.cache.codec import CODECS
from olavlm.pipelines.extraction import encoding
from olavlm.pipelines.extraction.encoding import encode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ODD = [0.0, -0.0, 1.0, 2049.0, -0.5, 65504.0, 65519.996, 65520.0, -65520.0, 5.96e-8, 2.98e-8, 2.99e-8, 6.1e-5, 6.2e-5,
       1e-45, -3e-45, 2.66e-43, 1.1754944e-38, 1e-20, 1e-16, 1e15, 1.8e19, 1e30, 3.4028235e38, math.inf, -math.inf,
       math.nan]  # fmt: skip
ANY = st.sampled_from([float(np.float32(x)) for x in ODD]) | st.floats(width=32)
STORABLE = (
    st.floats(-65504, 65504, width=32)
    | st.floats(-9, 9, width=32)
    | st.floats(-(2.0**-24), 2.0**-24, width=32)
    | st.integers(-254, 254).map(lambda n: n / 2)
)
BATCHES = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 6, 8])), st.sampled_from([ANY, STORABLE])
).flatmap(lambda how: arrays.arrays(np.float32, how[0], elements=how[1], fill=st.nothing()))


def of_codec(name: str, batch: np.ndarray) -> list:
    return [CODECS[name].encode(row) for row in batch]


def on_host(name: str, batch: np.ndarray, device: str = "cpu"):
    encoded = encode(CODECS[name], torch.from_numpy(batch).to(device)).to_host()
    if device != "cpu":
        torch.cuda.synchronize()
    return encoded.rows(len(batch))


def same(name: str, batch: np.ndarray, device: str = "cpu") -> None:
    parts, reasons, fidelity = on_host(name, batch, device)
    expected = of_codec(name, batch)
    assert reasons == [reason for _, reason, _ in expected]
    for i, (of_row, reason, theirs) in enumerate(expected):
        if reason is not None:
            assert fidelity[i] is None
            continue
        assert parts.keys() == of_row.keys()
        for array, part in of_row.items():
            assert (parts[array].dtype, parts[array][i].shape) == (part.dtype, part.shape)
            assert parts[array][i].tobytes() == part.tobytes(), (array, batch[i])
        assert fidelity[i].cosine == pytest.approx(theirs.cosine, abs=1e-6)
        assert fidelity[i].relative_error == pytest.approx(theirs.relative_error, abs=1e-6)
        assert fidelity[i].norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=200, deadline=None)
@given(batch=BATCHES)
def test_as_the_codec_for_adversarial_rows(name, device, batch):
    with np.errstate(all="ignore"):
        same(name, batch, device)


@pytest.mark.parametrize("longest_dot", [8192, 1023])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CODECS)
def test_as_the_codec_for_rows_of_the_papers_size(name, device, longest_dot, monkeypatch):
    monkeypatch.setattr(encoding, "_LONGEST_DOT", longest_dot)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((2, 576, 1024), np.float32) * np.exp(rng.normal(0, 3, (2, 576, 1))).astype(np.float32)
    batch[0, 5] = 0
    batch[1, 7] *= np.float32(1e-30)
    same(name, batch, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CODECS)
def test_as_the_codec_for_odd_tokens_beside_ordinary_ones(name, device):
    tokens = [[1.5, -2], [1e-45, 0], [-2.66e-43, 2.66e-43], [0, -0.0], [1e-30, 1e-38], [6e-8, 65504]]
    same(name, np.array([tokens, tokens[::-1]], np.float32), device)


@pytest.mark.parametrize("name", ["float16", "float32", "int8"])
def test_a_row_is_the_same_alone_in_a_batch_in_pieces_and_again(name, monkeypatch):
    batch = np.random.default_rng(1).standard_normal((3, 5, 16)).astype(np.float32)
    parts, _, fidelity = on_host(name, batch)
    monkeypatch.setattr(encoding, "_PIECE", 2 * 16)  # two tokens at a time
    again, _, fidelity_again = on_host(name, batch)
    assert fidelity_again == fidelity
    for array in parts:
        assert again[array].tobytes() == parts[array].tobytes()
    for i in range(3):
        alone, _, fidelity_alone = on_host(name, batch[i : i + 1])
        assert fidelity_alone == fidelity[i : i + 1]
        assert all(alone[array].tobytes() == parts[array][i].tobytes() for array in parts)


def test_ordinary_rows_do_not_need_the_codec_and_odd_ones_do(monkeypatch):
    """So that what is quick is, and what decides on rejection is one."""
    asked = []
    codec = type(CODECS["float16"])
    of_row = codec.encode
    monkeypatch.setattr(codec, "encode", lambda self, row: asked.append(row) or of_row(self, row))
    batch = np.ones((4, 2, 4), np.float32)
    batch[1] *= 1e20
    batch[2, 1, 3] = np.nan
    batch[3, 0, 0] = 65520
    _, reasons, fidelity = on_host("float16", batch)
    assert reasons == [None, "overflow", "non-finite", "overflow"]
    assert [f is None for f in fidelity] == [False, True, True, True]
    assert len(asked) == 3


def test_padding_is_not_looked_at():
    batch = np.full((4, 2, 4), np.nan, np.float32)
    batch[:3] = 1
    encoded = encode(CODECS["float16"], torch.from_numpy(batch))
    parts, reasons, fidelity = encoded.rows(3)
    assert (parts["features"].shape, reasons, len(fidelity)) == ((3, 2, 4), [None] * 3, 3)


def test_features_that_are_no_contiguous_memory():
    batch = np.random.default_rng(2).standard_normal((2, 4, 6)).astype(np.float32)
    turned = torch.from_numpy(batch).transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    parts, _, _ = encode(CODECS["float16"], turned).rows(2)
    np.testing.assert_array_equal(parts["features"], batch.astype(np.float16))
