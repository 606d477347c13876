"""Features as pictures: tokens as colours, vectors as bars, values as a heat map.

Tokens become colours by their first three principal components, as is customary for dense features. `PcaColours` is
fitted on one set of tokens and can colour others in the same basis, which is how a prediction is put beside its target
and one image beside another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

TIMES = "\N{MULTIPLICATION SIGN}"
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)  # blue and vermilion, told apart by every kind of colour vision
_PERCENTILES = (2, 98)
_FLAT = 1e-3  # a component this much smaller than the first is rounding noise, and stays grey


@dataclass(frozen=True)
class PcaColours:
    """Red, green and blue as the first three principal components of one image's tokens.

    The sign of a component is fixed by its largest loading being positive, and 0 to 255 spans the 2nd to the 98th
    percentile of the tokens it was fitted on, so the same features always give the same colours.
    """

    mean: np.ndarray
    """(dim,) float64"""
    components: np.ndarray
    """(3, dim) float64, orthonormal rows; a row of zeros where the tokens have no such component"""
    low: np.ndarray
    """(3,) float64, the score that is 0"""
    high: np.ndarray
    """(3,) float64, the score that is 255"""

    @classmethod
    def fit(cls, tokens: np.ndarray) -> PcaColours:
        """The basis of `tokens` (tokens, dim), any float dtype; ValueError if they are not finite."""
        x = _finite(tokens)
        mean = x.mean(axis=0)
        x = x - mean
        tall = x.shape[0] >= x.shape[1]
        values, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)  # the smaller of the two, ascending
        size = np.sqrt(np.maximum(values[::-1][:3], 0))
        vectors = vectors[:, ::-1][:, :3].T
        components = np.zeros((3, x.shape[1]))
        for i in range(len(size)):
            if size[i] > max(_FLAT * size[0], 1e-12):
                row = vectors[i] if tall else vectors[i] @ x / size[i]
                components[i] = row * np.sign(row[np.abs(row).argmax()])
        low, high = np.percentile(x @ components.T, _PERCENTILES, axis=0)
        return cls(mean, components, low, high)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Colours uint8 (tokens, 3) of tokens (tokens, dim) in this basis; ValueError if they are not finite."""
        scores = (_finite(tokens) - self.mean) @ self.components.T
        span = self.high - self.low
        flat = span <= 1e-12
        share = np.where(flat, 0.5, (scores - self.low) / np.where(flat, 1, span))
        return np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _finite(tokens: np.ndarray) -> np.ndarray:
    x = np.asarray(tokens, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"tokens of shape {x.shape}: only finite (tokens, dim) features have colours")
    return x


def token_map(tokens: np.ndarray, grid: Sequence[int] | None, colours: PcaColours | None = None) -> Image.Image:
    """Tokens (tokens, dim) as a picture of one RGB pixel a token, `grid` = (rows, columns), row-major.

    `colours` are those of the tokens themselves by default. Tokens that do not fill `grid` (a class token kept, or no
    grid on the card) are one row of pixels.
    """
    rows, columns = grid if fills_grid(len(tokens), grid) else (1, len(tokens))
    pixels = (colours or PcaColours.fit(tokens))(tokens)
    return Image.fromarray(pixels.reshape(rows, columns, 3))


def fills_grid(tokens: int, grid: Sequence[int] | None) -> bool:
    """Whether `grid` (rows, columns) is the place of each of so many tokens."""
    return grid is not None and len(grid) == 2 and math.prod(grid) == tokens


def heat_map(values: np.ndarray, grid: Sequence[int] | None, limits: tuple[float, float]) -> Image.Image:
    """Values (tokens,) as a picture of one RGBA pixel a token, laid out as by `token_map`.

    From dark blue at `limits[0]` to yellow at `limits[1]` (viridis); transparent where a value is NaN.
    """
    values = np.asarray(values, np.float64)
    rows, columns = grid if fills_grid(len(values), grid) else (1, len(values))
    low, high = limits
    share = (values - low) / (high - low)
    pixels = matplotlib.colormaps["viridis"](np.clip(np.nan_to_num(share), 0, 1), bytes=True)
    pixels[np.isnan(values), 3] = 0
    return Image.fromarray(pixels.reshape(rows, columns, 4))


def vector_bars(vector: np.ndarray, size: tuple[int, int], limit: float | None = None) -> Image.Image:
    """A vector (dim,) as bars up (blue) and down (vermilion) from the middle: RGBA of `size`, transparent behind.

    `limit` is the value of a full bar, by default `bar_limit(vector)`. A column of several dimensions spans them all.
    """
    values = np.asarray(vector, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("a vector with values that are not finite cannot be drawn")
    width, height = size
    limit = limit or bar_limit(values)
    middle = height // 2
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    edges = np.linspace(0, len(values), width + 1)
    for x in range(width):
        part = values[int(edges[x]) : max(math.ceil(edges[x + 1]), int(edges[x]) + 1)]
        up, down = (round(min(1.0, max(0.0, v) / limit) * (middle - 1)) for v in (part.max(), -part.min()))
        if up:
            draw.line((x, middle - up, x, middle - 1), fill=POSITIVE)
        if down:
            draw.line((x, middle + 1, x, middle + down), fill=NEGATIVE)
    draw.line((0, middle, width, middle), fill=(128, 128, 128))
    return picture


def bar_limit(*vectors: np.ndarray) -> float:
    """The 99.5th percentile of the values' sizes, so that one extreme dimension does not flatten the others."""
    sizes = np.abs(np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in vectors]))
    return float(np.percentile(sizes, 99.5)) or 1.0
