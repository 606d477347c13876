import pytest
import torch

from olavlm.student.predictor import EmbeddingPredictor, match_queries


def load_golden(golden, name):
    """The golden arrays of a variant as a predictor; `in`, a Python keyword, is the attribute `in_proj`."""
    arrays = {key.split("/")[1]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith(f"{name}/")}
    keys, expected = arrays.pop("keys"), arrays.pop("expected")
    queries = arrays.pop("queries", None)
    width, llm_width = arrays["in.weight"].shape
    predictor = EmbeddingPredictor(
        llm_width, expected.shape[2], expected.shape[1], width=width, latent="latents" in arrays
    )
    state = {f"in_proj{key[2:]}" if key.startswith("in.") else key: value for key, value in arrays.items()}
    predictor.load_state_dict(state)
    return predictor, keys, queries, expected


@pytest.mark.parametrize("name", ["gen", "depth", "seg", "probe"])
def test_golden(golden_predictor, name):
    predictor, keys, queries, expected = load_golden(golden_predictor, name)
    torch.testing.assert_close(predictor(keys, queries), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gen", "depth", "seg", "probe"])
def test_bfloat16_stays_near(golden_predictor, name):
    predictor, keys, queries, expected = load_golden(golden_predictor, name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(predictor(keys, queries).float(), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["depth", "probe"])
def test_masked_keys_equal_dropped_keys(golden_predictor, name):
    predictor, keys, queries, _ = load_golden(golden_predictor, name)
    mask = torch.rand(keys.shape[1], generator=torch.Generator().manual_seed(3)) < 0.5
    masked = predictor(keys, queries, mask.expand(len(keys), -1))
    torch.testing.assert_close(masked, predictor(keys[:, mask], queries), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(masked, predictor(keys, queries), atol=1e-3), "the mask must matter"


def test_without_any_key_stays_finite(golden_predictor):
    predictor, keys, queries, _ = load_golden(golden_predictor, "seg")
    none = torch.zeros(keys.shape[:2], dtype=torch.bool)
    predictor(keys, queries, none).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters())


def test_shared_queries_equal_repeated_queries(golden_predictor):
    predictor, keys, queries, _ = load_golden(golden_predictor, "seg")
    shared = predictor(keys, queries[:1])
    torch.testing.assert_close(shared, predictor(keys, queries[:1].repeat(2, 1, 1)), atol=1e-6, rtol=1e-5)


def test_query_count():
    queries = torch.arange(8.0).view(1, 4, 2)
    assert match_queries(queries, 4) is queries
    assert match_queries(queries, 8).tolist() == [queries[0].tolist() * 2]
    assert match_queries(queries, 1).tolist() == [[[3.0, 4.0]]]
    assert match_queries(queries, 6).tolist() == [[[3.0, 4.0]] * 6]


def test_needs_queries_or_latents():
    with pytest.raises(ValueError, match="exactly one"):
        EmbeddingPredictor(8, 4, 2)(torch.zeros(1, 3, 8))


@pytest.mark.parametrize(
    ("llm_width", "width", "num_queries", "out_width", "latent", "expected"),
    [
        (4096, None, 1, 1024, False, 7_874_560),
        (3072, None, 1, 1024, False, 6_825_984),
        (4096, None, 576, 1536, False, 14_171_136),
        (3072, None, 576, 1536, False, 12_598_272),
        (4096, 4096, 576, 1024, False, 56_654_848),
        (3072, 3072, 576, 1024, False, 33_054_720),
        (4096, None, 1, 1024, True, 7_875_584),
        (4096, None, 576, 1536, True, 15_055_872),
        (4096, None, 576, 1024, True, 8_464_384),
    ],
    ids=["gen-8b", "gen-phi", "seg-8b", "seg-phi", "depth-8b", "depth-phi", "probe-gen", "probe-seg", "probe-depth"],
)
def test_parameter_counts(llm_width, width, num_queries, out_width, latent, expected):
    with torch.device("meta"):
        predictor = EmbeddingPredictor(llm_width, out_width, num_queries, width=width, latent=latent)
    assert sum(p.numel() for p in predictor.parameters()) == expected
