"""FID: the Fréchet distance between two folders of pictures in the features of an Inception network (arXiv 1706.08500).

The network is torch-fidelity's port of the TensorFlow one (the extra `fid`), its weights a file of yours: nothing is
fetched. Saved statistics are pytorch-fid's: an .npz with `mu` (2048,) and `sigma` (2048, 2048). Pictures drawn by
unCLIP and photographs are made the same size in the same way, 256 x 256 by Lanczos, ahead of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from olavlm.pipelines.cli import JobFailed

if TYPE_CHECKING:
    import torch

SIDE = 256  # of a picture that is compared
FEATURES = 2048  # of the network's last pooling
BATCH = 50
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians with means (D,) and covariances (D, D), in float64.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is that of (A^(1/2) B A^(1/2))^(1/2), which is
    symmetric, so that covariances of few pictures, which have no inverse, need no correction.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    mu_a, sigma_a, mu_b, sigma_b = (np.asarray(x, np.float64) for x in (mu_a, sigma_a, mu_b, sigma_b))
    size = len(mu_a)
    shapes = [x.shape for x in (mu_a, mu_b, sigma_a, sigma_b)]
    if shapes != [(size,), (size,), (size, size), (size, size)]:
        raise ValueError(f"statistics of shapes {shapes}: give two means (D,) and two covariances (D, D)")
    if not all(np.isfinite(x).all() for x in (mu_a, sigma_a, mu_b, sigma_b)):
        raise ValueError("statistics that are not finite have no distance")
    values, vectors = np.linalg.eigh(sigma_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ sigma_b @ root), 0)).sum()
    return float(((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * shared)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), unbiased, of features (pictures, D), in float64."""
    if len(features) < 2:
        raise JobFailed(f"{len(features)} pictures have no covariance; compare two at least, better thousands")
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def read_statistics(file: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """`mu` and `sigma` of an .npz; JobFailed if it lacks them."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            return saved["mu"], saved["sigma"]
    except (ValueError, KeyError) as e:
        raise JobFailed(f"{file}: no statistics of pytorch-fid, mu and sigma ({e}); save them again") from e


def save_statistics(file: str | Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    np.savez_compressed(file, mu=mu, sigma=sigma)


def pictures_in(folder: str | Path) -> list[Path]:
    """The pictures below a folder, in order of their names; JobFailed if there are none."""
    found = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    if not found:
        raise JobFailed(f"{folder}: no pictures in it ({', '.join(SUFFIXES)})")
    return found


def compared_size(picture: Image.Image, *, square: bool = True) -> Image.Image:
    """A picture as it is compared: RGB, 256 x 256, by Lanczos.

    `square` cuts the centre square first, the part that unCLIP's image encoder sees; without it the whole is squashed.
    """
    picture = picture.convert("RGB")
    if square and picture.width != picture.height:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


class Inception:
    """Pictures to the 2048 features of the network's last pooling.

    Args:
        weights: torch-fidelity's file `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        JobFailed: torch-fidelity is not installed, or the file holds something else.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        import torch

        if find_spec("torch_fidelity") is None:
            raise JobFailed("FID needs the package torch-fidelity; install it with: pip install 'olavlm[fid]'")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # The library unpickles whatever the file holds; this refuses all but tensors, and goes first.
            torch.load(weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=str(weights)
            )
        except OSError:
            raise
        except Exception as e:  # pickle's, torch's and the library's errors share no base class
            raise JobFailed(
                f"{weights}: not the Inception weights that FID takes ({' '.join(str(e).split())[:200]})"
            ) from e
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def __call__(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Features float64 (pictures, 2048), in batches of 50; pictures of any size, RGB."""
        import torch

        rows = []
        with torch.inference_mode():
            for batch in _batches(pictures):
                pixels = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in batch])
                rows.append(self.network(pixels.to(self.device))[0].double().cpu().numpy())
        return np.concatenate(rows) if rows else np.empty((0, FEATURES))


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    """Batches of pictures of one size each, 50 at most."""
    batch: list[Image.Image] = []
    for picture in pictures:
        if batch and (len(batch) == BATCH or picture.size != batch[0].size):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def statistics_of(place: str | Path, network: Inception | None) -> tuple[np.ndarray, np.ndarray, int | None]:
    """`mu`, `sigma` and the number of pictures of a folder; of an .npz file, whose number nobody knows, None.

    Pictures of a folder are taken as they are; `compared_size` is what makes them alike.
    """
    if Path(place).suffix == ".npz":
        return *read_statistics(place), None
    return statistics_of_pictures(pictures_in(place), network)


def statistics_of_pictures(files: Sequence[Path], network: Inception | None) -> tuple[np.ndarray, np.ndarray, int]:
    """`mu`, `sigma` and the number of these pictures; JobFailed without a network, or for fewer than two."""
    if network is None:
        raise JobFailed("features of pictures need --inception, the network's weights")
    return *statistics(network(_opened(files))), len(files)


def _opened(files: Iterable[Path]) -> Iterator[Image.Image]:
    for file in files:
        with Image.open(file) as picture:
            yield picture.convert("RGB")
