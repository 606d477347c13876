"""Rows to their storage dtype: what is kept, how far it is from the teacher's, and what never lands."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from olavlm.cache import Layout, StoreError
from olavlm.cache.codec import CODECS, LEVELS, rotate

FLOATS = ("float16", "float32")
QUANTISED = ("int8", "int4")


def row(*values: float, shape=None) -> np.ndarray:
    return np.array(values, np.float32).reshape(shape or (1, len(values)))


def measured(values: np.ndarray, back: np.ndarray) -> tuple[float, float, float]:
    """Cosine, relative L2 error and norm, in float64."""
    a, b = values.astype(np.float64).ravel(), back.astype(np.float64).ravel()
    return a @ b / math.sqrt((a @ a) * (b @ b)), math.sqrt(((a - b) ** 2).sum() / (a @ a)), math.sqrt(a @ a)


def token_cosines(values: np.ndarray, back: np.ndarray) -> np.ndarray:
    a, b = values.astype(np.float64), back.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def test_a_row_that_fits_is_exact():
    for name in FLOATS:
        codec = CODECS[name]
        parts, reason, fidelity = codec.encode(row(3, -4, 0, 0, shape=(2, 2)))
        assert list(parts) == ["features"]
        stored = parts["features"]
        assert (stored.dtype, stored.tolist(), reason) == (codec.dtype, [[3, -4], [0, 0]], None)
        assert (fidelity.cosine, fidelity.relative_error, fidelity.norm) == (1, 0, 5)
        assert codec.decode(parts).dtype == np.float32
        assert codec.decode(parts).tolist() == [[3, -4], [0, 0]]


def test_fidelity_by_hand():
    """float16 has 10 bits after the point: 2049 becomes 2048, and 1 stays."""
    parts, _, fidelity = CODECS["float16"].encode(row(2049, 1))
    assert parts["features"].tolist() == [[2048, 1]]
    norm = math.sqrt(2049**2 + 1)
    assert fidelity.norm == pytest.approx(norm, rel=1e-7)
    assert fidelity.relative_error == pytest.approx(1 / norm, rel=1e-6)
    assert fidelity.cosine == pytest.approx((2049 * 2048 + 1) / (norm * math.sqrt(2048**2 + 1)), rel=1e-7)


@pytest.mark.parametrize(("name", "least", "most"), [("float16", 0, 1e-7), ("int8", 1e-5, 1e-3), ("int4", 1e-3, 0.01)])
def test_fidelity_of_a_row_of_the_papers_size_is_as_exact_as_the_rounding_it_measures(rng, name, least, most):
    codec, values = CODECS[name], rng.standard_normal((576, 1024)).astype(np.float32)
    parts, _, fidelity = codec.encode(values)
    cosine, error, norm = measured(values, codec.decode(parts))
    assert least < 1 - cosine < most
    assert fidelity.cosine == pytest.approx(cosine, abs=1e-7)
    assert fidelity.relative_error == pytest.approx(error, rel=1e-5)
    assert fidelity.norm == pytest.approx(norm, rel=2e-8)


def test_all_zero_and_all_underflow():
    _, _, fidelity = CODECS["float16"].encode(row(0, 0))
    assert (fidelity.cosine, fidelity.relative_error, fidelity.norm) == (1, 0, 0)
    parts, _, fidelity = CODECS["float16"].encode(row(1e-30, -1e-30))
    assert parts["features"].tolist() == [[0, 0]]
    assert (fidelity.cosine, fidelity.relative_error) == (0, 1)
    assert fidelity.norm == pytest.approx(math.sqrt(2) * 1e-30)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_lands(name, value):
    for values in (row(1, value, 2, 3), row(0, 0, 0, value, shape=(2, 2))):
        assert CODECS[name].encode(values) == (None, "non-finite", None)


def test_overflow_begins_where_float16_rounds_to_infinity():
    """The largest float16 is 65504; up to 65520, half a step further, is rounded down to it."""
    below, codec = np.nextafter(np.float32(65520), np.float32(0)), CODECS["float16"]
    assert codec.encode(row(below, -65504))[0]["features"].tolist() == [[65504, -65504]]
    for value in (65520, -65520, 1e30):
        assert codec.encode(row(1, value)) == (None, "overflow", None)


def test_large_values_in_float32_have_a_norm():
    """Their squares overflow float32."""
    _, reason, fidelity = CODECS["float32"].encode(row(3e30, 4e30))
    assert reason is None
    assert fidelity.norm == pytest.approx(5e30)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e4, 1e30, 1e36])
def test_quantised_rows_of_any_size_are_as_faithful(rng, name, size):
    """Up to 1e36: the rotation of int4 sums 64 values before it divides, and float32 ends at 3.4e38."""
    codec, values = CODECS[name], rng.standard_normal((4, 64)).astype(np.float32)
    parts, reason, fidelity = codec.encode(values * np.float32(size))
    assert reason is None
    assert fidelity.cosine == pytest.approx(codec.encode(values)[2].cosine, abs=1e-6)
    assert np.isfinite(parts["scales"]).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_what_overflows_while_it_is_quantised_never_lands(name):
    """The rotation of int4 adds up many large values; int8 loses nothing up to the largest float32 but an ulp."""
    largest = np.finfo(np.float32).max
    parts, reason, fidelity = CODECS[name].encode(np.full((2, 64), largest, np.float32))
    if reason is None:
        assert np.isfinite(CODECS[name].decode(parts)).all()
        assert fidelity.cosine > 0.98
    else:
        assert (parts, reason, fidelity) == (None, "overflow", None)
    assert name == "int8" or reason == "overflow"


def test_a_quarantined_row_decodes_to_nan_and_touches_no_other():
    values = np.random.default_rng(0).standard_normal((3, 2, 6)).astype(np.float32)
    for codec in CODECS.values():
        rows = [codec.encode(v)[0] for v in values]
        batch = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        codec.mark_invalid(batch, 1)
        back = codec.decode(batch)
        assert np.isnan(back[1]).all(), codec.name
        for i in (0, 2):
            np.testing.assert_array_equal(back[i], codec.decode(rows[i]))


@pytest.mark.parametrize("name", CODECS)
def test_rows_decode_alike_alone_in_a_batch_and_in_parts(rng, name):
    """A trainer decodes a batch at once, and a test row by row; both get the same bits."""
    codec, values = CODECS[name], rng.standard_normal((5, 7, 24)).astype(np.float32)
    rows = [codec.encode(v)[0] for v in values]
    batch = codec.decode({part: np.stack([r[part] for r in rows]) for part in rows[0]})
    assert (batch.shape, batch.dtype) == ((5, 7, 24), np.float32)
    for i, parts in enumerate(rows):
        assert codec.decode(parts).tobytes() == batch[i].tobytes()
        assert sum(p.nbytes for p in parts.values()) == codec.row_bytes(7, 24)
    token = {part: values[3] for part, values in rows[0].items()}
    assert codec.decode(token).tobytes() == batch[0, 3].tobytes()
    none = codec.decode({part: np.empty((0, *values.shape), values.dtype) for part, values in rows[0].items()})
    assert (none.shape, none.dtype) == ((0, 7, 24), np.float32)


# int8


def test_int8_by_hand():
    """Of the first token the largest is 254: scale 2. 3 / 2 and -5 / 2 lie half-way: to the even neighbour."""
    parts, reason, _ = CODECS["int8"].encode(row(254, -254, 3, -5, 0, 1.27, 0.005, 0.015, shape=(2, 4)))
    assert reason is None
    assert (parts["features"].dtype, parts["scales"].dtype) == (np.int8, np.float32)
    assert parts["scales"].tolist() == [2, float(np.float32(1.27) / np.float32(127))]
    assert parts["features"].tolist() == [[127, -127, 2, -2], [0, 127, 0, 2]]
    back = CODECS["int8"].decode(parts)
    assert back.dtype == np.float32
    assert back[0].tolist() == [254, -254, 4, -4]
    np.testing.assert_allclose(back[1], [0, 1.27, 0, 0.02], rtol=1e-6)


def test_int8_rounds_half_to_even():
    """With a scale of exactly 1 every half is seen."""
    halves = np.arange(-126.5, 127, 1, dtype=np.float32)
    parts, _, _ = CODECS["int8"].encode(np.concatenate([[127], halves]).astype(np.float32)[None])
    assert parts["scales"].tolist() == [1]
    assert parts["features"][0, 1:].tolist() == [round(float(h)) for h in halves]  # Python rounds half to even


def test_int8_is_symmetric_and_never_minus_128(rng):
    codec = CODECS["int8"]
    values = (rng.standard_normal((64, 256)) * np.exp(rng.normal(0, 10, (64, 1)))).astype(np.float32)
    parts, mirrored = codec.encode(values)[0], codec.encode(-values)[0]
    np.testing.assert_array_equal(parts["features"], -mirrored["features"])
    np.testing.assert_array_equal(parts["scales"], mirrored["scales"])
    assert np.abs(parts["features"].astype(int)).max(axis=1).tolist() == [127] * 64
    error = np.abs(codec.decode(parts) - values)
    assert (error <= parts["scales"][:, None] * 0.50001).all()


def test_int8_scales_every_token_by_itself(rng):
    values = rng.standard_normal((3, 64)).astype(np.float32) * np.float32([[1e-6], [1], [1e6]])
    parts = CODECS["int8"].encode(values)[0]
    assert parts["scales"].tolist() == [float(m / np.float32(127)) for m in np.abs(values).max(axis=1)]
    assert (token_cosines(values, CODECS["int8"].decode(parts)) > 0.9999).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_token_of_zeros_stays_exactly_zero_beside_others(rng, name):
    values = rng.standard_normal((3, 64)).astype(np.float32)
    values[1] = 0
    parts, _, _ = CODECS[name].encode(values)
    assert parts["scales"][1] == 0
    back = CODECS[name].decode(parts)
    assert (back[1] == 0).all()
    assert (back[[0, 2]] != 0).any(axis=1).all()
    parts, reason, fidelity = CODECS[name].encode(np.zeros((2, 64), np.float32))
    assert (reason, fidelity.cosine, fidelity.relative_error, fidelity.norm) == (None, 1, 0, 0)
    assert (CODECS[name].decode(parts) == 0).all()


def test_int8_keeps_a_token_of_the_smallest_numbers():
    """Their largest over 127 would be scale 0, and the token all zero."""
    smallest = np.float32(1e-45)
    assert smallest > 0
    assert np.float32(smallest) / np.float32(127) == 0  # the control
    parts = CODECS["int8"].encode(np.array([[smallest, 0, -smallest, 0]], np.float32))[0]
    assert parts["scales"][0] > 0
    assert CODECS["int8"].decode(parts).tolist() == [[float(smallest), 0, float(-smallest), 0]]
    # Of 190 times the smallest the scale is rounded down to it, and no value may leave -127 ... 127.
    parts = CODECS["int8"].encode(np.array([[-190 * smallest, 190 * smallest]], np.float32))[0]
    assert parts["scales"].tolist() == [smallest]
    assert parts["features"].tolist() == [[-127, 127]]


# int4


def documented_rotation(dim: int) -> np.ndarray:
    """The matrix that codec.py's docstring describes, in float64, made of Kronecker products."""
    power = dim & -dim
    stream = hashlib.shake_256(b"olavlm int4 rotation 1").digest((dim + 7) // 8)
    signs = np.array([-1.0 if stream[i // 8] >> (i % 8) & 1 else 1.0 for i in range(dim)])
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    count = dim // power
    angles = [[math.pi * (2 * n + 1) * k / (2 * count) for n in range(count)] for k in range(count)]
    across = np.cos(angles) * np.sqrt([[1 / count]] + [[2 / count]] * (count - 1))
    return np.kron(across, hadamard / math.sqrt(power)) * signs


@pytest.mark.parametrize("dim", [2, 6, 8, 10, 96, 768, 1024, 1536])
def test_the_rotation_is_the_documented_one_and_orthonormal(rng, dim):
    matrix = documented_rotation(dim)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
    ours = rotate(np.eye(dim, dtype=np.float32)).T  # the columns of the matrix are what the unit vectors become
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, matrix, atol=2e-7)
    values = rng.standard_normal((5, 3, dim)).astype(np.float32)
    rotated = rotate(values)
    np.testing.assert_allclose(rotated, values.astype(np.float64) @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(rotate(rotated, back=True), values, atol=1e-5)
    np.testing.assert_allclose(rotate(values, back=True), values.astype(np.float64) @ matrix, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(values, axis=-1), rtol=1e-5)
    assert rotate(values).tobytes() == rotated.tobytes()


def test_the_rotation_leaves_what_it_is_given():
    values = np.ones((2, 12), np.float32)
    for back in (False, True):
        rotate(values, back)
        assert (values == 1).all()


def test_the_rotation_never_changes():
    """It is part of the format: stores of years ago are decoded with it."""
    x = np.arange(1, 13, dtype=np.float32)[None]
    matrix = documented_rotation(12)
    signs = "".join("-" if s < 0 else "+" for s in matrix[0])
    assert signs == "---+-++++---"
    np.testing.assert_allclose(rotate(x)[0, :3], matrix[:3] @ x[0], rtol=1e-5)


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def normal_density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_the_levels_are_lloyd_max_s():
    """Every level is the centroid of its cell under a unit Gaussian, and the cells end half-way between levels."""
    assert (len(LEVELS), LEVELS.dtype) == (16, np.float32)
    assert (np.diff(LEVELS) > 0).all()
    np.testing.assert_array_equal(LEVELS, -LEVELS[::-1])
    bounds = [-math.inf, *((LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2).tolist(), math.inf]
    error = 0.0
    for level, low, high in zip(LEVELS.tolist(), bounds, bounds[1:], strict=False):
        x = np.linspace(max(low, -12), min(high, 12), 200_001)
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        mass = np.trapezoid(density, x)
        assert mass == pytest.approx(normal_cdf(high) - normal_cdf(low), abs=1e-9)
        centroid = np.trapezoid(x * density, x) / mass
        assert centroid == pytest.approx((normal_density(low) - normal_density(high)) / mass, abs=1e-6)
        assert level == pytest.approx(centroid, abs=1e-3)
        error += np.trapezoid((x - level) ** 2 * density, x)
    assert error == pytest.approx(0.009501, abs=1e-6)  # Max 1960, table I, by hand: 0.009497


def quantised_4_bits(x: np.ndarray) -> np.ndarray:
    """What int4 does without a rotation, by an exhaustive search, float64: the nearest level, the best scale."""
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True))
    levels = LEVELS.astype(np.float64)[np.abs(unit[..., None] - LEVELS.astype(np.float64)).argmin(-1)]
    return levels * ((x * levels).sum(-1) / (levels**2).sum(-1))[..., None]


@pytest.mark.parametrize("dim", [2, 6, 10, 64, 768, 1024, 1536])
def test_int4_is_what_its_documentation_says(rng, dim):
    codec, matrix = CODECS["int4"], documented_rotation(dim)
    values = (rng.standard_normal((16, dim)) * np.exp(rng.normal(0, 3, (16, 1)))).astype(np.float32)
    parts, _, fidelity = codec.encode(values)
    assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {
        "features": ((16, dim // 2), np.uint8),
        "scales": ((16,), np.float32),
    }
    expected = quantised_4_bits(values.astype(np.float64) @ matrix.T) @ matrix
    back = codec.decode(parts)
    # A value on the border of two cells may fall to either side in float32.
    same = np.isclose(back, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(-1, keepdims=True)).all(-1)
    assert same.mean() > 0.8
    assert fidelity.cosine == pytest.approx(measured(values, expected)[0], abs=1e-3)
    low, high = parts["features"] & 15, parts["features"] >> 4  # even channels are the low half of a byte
    unrotated = np.empty((16, dim), np.float32)
    unrotated[:, 0::2], unrotated[:, 1::2] = LEVELS[low], LEVELS[high]
    again = (unrotated * parts["scales"][:, None]) @ matrix
    np.testing.assert_allclose(again, back, rtol=1e-4, atol=1e-4 * np.abs(back).max())


def gaussian(rng, dim: int) -> np.ndarray:
    return rng.standard_normal((256, dim)).astype(np.float32)


def with_outliers(rng, dim: int) -> np.ndarray:
    """A few channels 60 times as large as the others, the same in every token, as vision transformers have them."""
    values = gaussian(rng, dim)
    values[:, rng.choice(dim, 4, replace=False)] *= 60
    return values


@pytest.mark.parametrize("tokens", [gaussian, with_outliers])
@pytest.mark.parametrize("dim", [768, 1024, 1536])
def test_int4_keeps_the_direction_of_a_token_in_a_quarter_of_the_bytes(rng, dim, tokens):
    values, codec = tokens(rng, dim), CODECS["int4"]
    parts, _, _ = codec.encode(values)
    cosines = token_cosines(values, codec.decode(parts))
    print(f"mean {cosines.mean():.5f}, worst {cosines.min():.5f}")
    assert cosines.mean() >= 0.99
    assert cosines.min() >= 0.98
    assert sum(p.nbytes for p in parts.values()) == codec.row_bytes(256, dim) == Layout(1, 256, dim, "int4").row_bytes
    assert codec.row_bytes(256, dim) <= 0.2543 * CODECS["float16"].row_bytes(256, dim)


def test_without_the_rotation_outliers_take_all_levels(rng):
    """The control: the same four bits fail where there are outliers, and only there."""
    values, easy = with_outliers(rng, 1024), gaussian(rng, 1024)
    plain = token_cosines(values, quantised_4_bits(values.astype(np.float64))).mean()
    rotated = token_cosines(values, CODECS["int4"].decode(CODECS["int4"].encode(values)[0])).mean()
    print(f"plain {plain:.4f}, rotated {rotated:.4f}")
    assert plain < 0.9 < 0.99 <= rotated
    assert token_cosines(easy, quantised_4_bits(easy.astype(np.float64))).mean() >= 0.99


def test_int4_of_an_odd_dim_is_refused():
    with pytest.raises(StoreError, match="packs 2 channels, dim is 7"):
        Layout(4, 3, 7, "int4")
    Layout(4, 3, 7, "int8")  # the control


def test_what_is_measured_does_not_depend_on_the_number_of_threads():
    """Records of two runs are compared, and BLAS sums in another order with other threads."""
    program = (
        "import hashlib; import numpy as np; from olavlm.cache.codec import CODECS\n"
        "row = np.random.default_rng(0).standard_normal((576, 1536)).astype('f4')\n"
        "stored = [codec.encode(row) for codec in CODECS.values()]\n"
        "back = [codec.decode(parts) for codec, (parts, _, _) in zip(CODECS.values(), stored)]\n"
        "print([f for _, _, f in stored], *[hashlib.md5(x.tobytes()).hexdigest()"
        " for parts, _, _ in stored for x in [*parts.values(), *back]])\n"
        "print(np.linalg.norm(row.astype('f8').ravel()).hex())"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for threads in ("1", "2")
    ]
    assert answers[0][0] == answers[1][0]
    print("the control, BLAS:", answers[0][1], answers[1][1])
