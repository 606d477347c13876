"""Rows to their storage dtype: what is kept, how far it is from the teacher's, and what never lands."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from olavlm.cache.codec import decode, encode

F16, F32 = np.dtype("<f2"), np.dtype("<f4")


def row(*values: float, shape=None) -> np.ndarray:
    return np.array(values, np.float32).reshape(shape or (1, len(values)))


def test_a_row_that_fits_is_exact():
    for dtype in (F16, F32):
        stored, reason, fidelity = encode(row(3, -4, 0, 0, shape=(2, 2)), dtype)
        assert (stored.dtype, stored.tolist(), reason) == (dtype, [[3, -4], [0, 0]], None)
        assert (fidelity.cosine, fidelity.relative_error, fidelity.norm) == (1, 0, 5)
        assert decode(stored).dtype == np.float32
        assert decode(stored).tolist() == [[3, -4], [0, 0]]


def test_fidelity_by_hand():
    """float16 has 10 bits after the point: 2049 becomes 2048, and 1 stays."""
    stored, _, fidelity = encode(row(2049, 1), F16)
    assert stored.tolist() == [[2048, 1]]
    norm = math.sqrt(2049**2 + 1)
    assert fidelity.norm == pytest.approx(norm, rel=1e-7)
    assert fidelity.relative_error == pytest.approx(1 / norm, rel=1e-6)
    assert fidelity.cosine == pytest.approx((2049 * 2048 + 1) / (norm * math.sqrt(2048**2 + 1)), rel=1e-7)


def test_fidelity_of_a_row_of_the_papers_size_is_as_exact_as_the_rounding_it_measures(rng):
    values = rng.standard_normal((576, 1024)).astype(np.float32)
    stored, _, fidelity = encode(values, F16)
    a, b = values.astype(np.float64).ravel(), stored.astype(np.float64).ravel()
    cosine = a @ b / math.sqrt((a @ a) * (b @ b))
    assert 0 < 1 - cosine < 1e-7
    assert fidelity.cosine == pytest.approx(cosine, abs=1e-7)
    assert fidelity.relative_error == pytest.approx(math.sqrt(((a - b) ** 2).sum() / (a @ a)), rel=1e-5)
    assert fidelity.norm == pytest.approx(math.sqrt(a @ a), rel=1e-9)


def test_all_zero_and_all_underflow():
    _, _, fidelity = encode(row(0, 0), F16)
    assert (fidelity.cosine, fidelity.relative_error, fidelity.norm) == (1, 0, 0)
    stored, _, fidelity = encode(row(1e-30, -1e-30), F16)
    assert stored.tolist() == [[0, 0]]
    assert (fidelity.cosine, fidelity.relative_error) == (0, 1)
    assert fidelity.norm == pytest.approx(math.sqrt(2) * 1e-30)


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_lands(dtype, value):
    assert encode(row(1, value, 2), dtype) == (None, "non-finite", None)


def test_overflow_begins_where_float16_rounds_to_infinity():
    """The largest float16 is 65504; up to 65520, half a step further, is rounded down to it."""
    below = np.nextafter(np.float32(65520), np.float32(0))
    assert encode(row(below, -65504), F16)[0].tolist() == [[65504, -65504]]
    for value in (65520, -65520, 1e30):
        assert encode(row(1, value), F16) == (None, "overflow", None)


def test_large_values_in_float32_have_a_norm():
    """Their squares overflow float32."""
    _, reason, fidelity = encode(row(3e30, 4e30), F32)
    assert reason is None
    assert fidelity.norm == pytest.approx(5e30)


def test_what_is_measured_does_not_depend_on_the_number_of_threads():
    """Records of two runs are compared, and BLAS sums in another order with other threads."""
    program = (
        "import numpy as np; from olavlm.cache.codec import encode\n"
        "row = np.random.default_rng(0).standard_normal((576, 1024)).astype('f4')\n"
        "print([encode(row, np.dtype(d))[2] for d in ('<f2', '<f4')])\n"
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
