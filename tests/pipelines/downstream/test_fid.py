"""The distance of two Gaussians by hand, and what is around it."""

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.downstream.fid import (
    Inception,
    compared_size,
    frechet_distance,
    pictures_in,
    read_statistics,
    save_statistics,
    statistics,
    statistics_of,
)


def test_gaussians_by_hand():
    """In one dimension (m - n)^2 + (s - t)^2; diagonal covariances add up; rotating both changes nothing."""
    assert frechet_distance([1.0], [[4.0]], [4.0], [[9.0]]) == pytest.approx(9 + 1)
    mu, a, b = np.zeros(2), np.diag([1.0, 16.0]), np.diag([4.0, 9.0])
    assert frechet_distance(mu, a, [0, 2], b) == pytest.approx(4 + (1 - 2) ** 2 + (4 - 3) ** 2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [turn @ x @ turn.T for x in (a, b)]
    assert frechet_distance(mu, turned[0], turn @ [0, 2.0], turned[1]) == pytest.approx(6)


def test_covariances_that_do_not_commute():
    """Against the square root of the product itself, by its eigenvalues."""
    random = np.random.default_rng(0)
    a, b = (x @ x.T for x in random.normal(size=(2, 5, 5)))
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    assert frechet_distance(np.zeros(5), a, np.zeros(5), b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(np.zeros(5), a, np.zeros(5), a) == pytest.approx(0, abs=1e-9)


def test_fewer_pictures_than_features():
    features = np.random.default_rng(0).normal(size=(3, 8))  # a covariance of rank 2
    mu, sigma = statistics(features)
    np.testing.assert_allclose(sigma, np.cov(features.T))
    assert frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(8, abs=1e-6)
    with pytest.raises(JobFailed, match="1 pictures have no covariance"):
        statistics(features[:1])


def test_statistics_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="two means"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan))


def test_saved_statistics_are_pytorch_fids(tmp_path):
    file = tmp_path / "reference.npz"
    save_statistics(file, np.arange(3.0), np.eye(3))
    with np.load(file) as saved:
        assert sorted(saved) == ["mu", "sigma"]
    mu, sigma = read_statistics(file)
    assert (mu.tolist(), sigma.tolist()) == ([0, 1, 2], np.eye(3).tolist())
    assert statistics_of(file, None)[2] is None
    np.savez(file, mean=mu)
    with pytest.raises(JobFailed, match="mu and sigma"):
        read_statistics(file)
    np.savez(file, mu=np.array([object()]), sigma=sigma)  # a pickle
    with pytest.raises(JobFailed, match="mu and sigma"):
        read_statistics(file)


def test_both_sides_are_made_one_size():
    picture = Image.new("RGB", (400, 200), (0, 0, 0))
    picture.paste((255, 255, 255), (100, 0, 300, 200))  # the centre square is white
    square, whole = compared_size(picture), compared_size(picture, square=False)
    assert square.size == whole.size == (256, 256)
    assert square.getextrema() == ((255, 255),) * 3
    assert whole.getpixel((0, 0)) == (0, 0, 0)
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert compared_size(drawn).tobytes() == drawn.resize((256, 256), Image.Resampling.LANCZOS).tobytes()


def test_folders(tmp_path):
    with pytest.raises(JobFailed, match="no pictures in it"):
        pictures_in(tmp_path)
    for name in ("b/x.png", "a/x.png", "note.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name, "png")
    assert [str(f.relative_to(tmp_path)) for f in pictures_in(tmp_path)] == ["a/x.png", "b/x.png"]
    with pytest.raises(JobFailed, match="need --inception"):
        statistics_of(tmp_path, None)


def test_the_network_of_a_file(tmp_path, monkeypatch):
    library = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="FID runs with torch-fidelity, the extra `fid`"
    )
    weights = tmp_path / "random.pth"
    # Random weights of the library's own network, which it makes only to load some.
    cls = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(cls("inception-v3-compat", ["2048"]).state_dict(), weights)
    network = Inception(weights)
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = random.integers(0, 255, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mu, sigma, count = statistics_of(tmp_path, network)
    assert (mu.shape, sigma.shape, count) == ((2048,), (2048, 2048), 3)
    assert np.isfinite(sigma).all()
    assert sigma.any()


def test_weights_that_would_run_code_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="FID runs with torch-fidelity, the extra `fid`")

    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"weights": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(JobFailed, match="not the Inception weights"):
        Inception(tmp_path / "harm.pth")
    with pytest.raises(FileNotFoundError):
        Inception(tmp_path / "absent.pth")
