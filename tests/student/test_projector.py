"""The three projectors: parameters at the paper's sizes, what they do to features by hand, and what they refuse."""

import pytest
import torch

from olavlm.student.errors import RecipeError, TargetsError
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.projector import (
    FeatureConcat,
    TokenConcat,
    average_runs,
    make_projector,
    num_image_tokens,
    resample,
)


def teacher(name, grid, dim):
    return FusedTeacher(name, {"tokens": grid[0] * grid[1], "dim": dim, "grid": list(grid), "fingerprint": name})


PAPER = [teacher("gen", (1, 1), 1024), teacher("depth", (24, 24), 1024), teacher("seg", (24, 24), 1536)]
SMALL = [teacher("gen", (1, 1), 3), teacher("depth", (4, 4), 5), teacher("seg", (4, 4), 2)]


@pytest.mark.parametrize(
    ("fusion", "base_width", "parameters"),
    [
        ("none", 1024, 20_979_712),
        ("none", 3072, 29_368_320),
        ("feature_concat", 1024, 35_659_776),
        ("feature_concat", 3072, 6656 * 4096 + 4096 + 4096 * 4096 + 4096),
        ("token_concat", 1024, 3 * 20_979_712 + 1536 * 4096 + 4096 + 4096 * 4096 + 4096),
    ],
)
def test_parameters_for_llama3(fusion, base_width, parameters):
    with torch.device("meta"):
        projector = make_projector(fusion, (24, 24), base_width, PAPER if fusion != "none" else [], 4096)
    assert sum(p.numel() for p in projector.parameters()) == parameters


@pytest.mark.parametrize(("fusion", "tokens"), [("none", 576), ("feature_concat", 576), ("token_concat", 600)])
def test_tokens_of_an_image(fusion, tokens):
    teachers = PAPER if fusion != "none" else []
    assert num_image_tokens(fusion, 576, len(teachers)) == tokens
    projector = make_projector(fusion, (24, 24), 8, teachers, 16)
    out = projector(torch.zeros(2, 576, 8), *(torch.zeros(2, t.tokens, t.dim) for t in teachers))
    assert out.shape == (2, tokens, 16)


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(2, 16, 7), [torch.randn(2, t.tokens, t.dim) for t in SMALL]


def test_feature_concat_by_hand(features):
    base, (gen, depth, seg) = features
    projector = FeatureConcat((4, 4), 7, SMALL, 6)
    out = projector(base, gen, depth, seg)
    for row in range(2):
        for position in range(16):
            side_by_side = torch.cat([base[row, position], gen[row, 0], depth[row, position], seg[row, position]])
            hidden = torch.nn.functional.gelu(projector[0].weight @ side_by_side + projector[0].bias)
            torch.testing.assert_close(out[row, position], projector[2].weight @ hidden + projector[2].bias)


def test_token_concat_by_hand(features):
    base, (gen, depth, seg) = features
    projector = TokenConcat(7, SMALL, 6)
    out = projector(base, gen, depth, seg)
    torch.testing.assert_close(out[:, :16], projector.base(base))
    mlps = projector.teachers
    for k in range(8):
        torch.testing.assert_close(out[:, 16 + k], mlps["gen"](gen[:, 0]))
        torch.testing.assert_close(out[:, 24 + k], mlps["depth"]((depth[:, 2 * k] + depth[:, 2 * k + 1]) / 2))
        torch.testing.assert_close(out[:, 32 + k], mlps["seg"]((seg[:, 2 * k] + seg[:, 2 * k + 1]) / 2))
    assert out.shape[1] == 40


def test_runs_of_72_as_the_method_pools_its_tokens():
    tokens = torch.arange(576.0).view(1, 576, 1)
    expected = [72 * k + 71 / 2 for k in range(8)]
    assert average_runs(tokens, 8).flatten().tolist() == expected


def test_a_grid_of_another_size_is_resampled_by_position():
    """Of a plane, a bilinear map of another size is the same plane, at the other cells' centres, away from the edge."""
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=-1).view(1, 576, 2)
    found = resample(plane, (24, 24), (4, 4)).view(4, 4, 2)
    centres = torch.tensor([6 * k + 2.5 for k in range(4)])
    torch.testing.assert_close(found[1:3, 1:3, 0], centres[1:3, None].expand(2, 2))
    torch.testing.assert_close(found[1:3, 1:3, 1], centres[None, 1:3].expand(2, 2))
    larger = resample(plane, (24, 24), (48, 48)).view(48, 48, 2)
    torch.testing.assert_close(larger[2:46, 0, 0], torch.arange(2, 46) / 2 - 0.25)
    assert resample(plane, (24, 24), (24, 24)) is plane
    # With antialiasing each cell counts when a grid shrinks.
    spike = torch.zeros(1, 576, 1)
    spike[0, 24 * 8 + 8] = 1
    assert resample(spike, (24, 24), (4, 4)).abs().sum() > 0


def test_what_cannot_be_fused():
    with pytest.raises(
        RecipeError, match=r"teacher seg: its grid is \(4, 6\), the base encoder's \(4, 4\).*token_concat"
    ):
        FeatureConcat((4, 4), 7, [teacher("seg", (4, 6), 2)], 6)
    with pytest.raises(RecipeError, match=r"its grid is \(4, 4\), the base encoder's \(2, 8\)"):
        FeatureConcat((2, 8), 7, [teacher("seg", (4, 4), 2)], 6)
    FeatureConcat((2, 8), 7, [teacher("seg", (2, 8), 2), teacher("gen", (1, 1), 2)], 6)
    with pytest.raises(
        RecipeError, match="teacher seg: its 25 tokens cannot be cut into 8 equal runs; use feature_conc"
    ):
        TokenConcat(7, [teacher("seg", (5, 5), 2)], 6)
    with pytest.raises(TargetsError, match=r"tasks\.x: 17 tokens on a grid of 4 x 4; only features on a grid"):
        FusedTeacher.of("x", {"tokens": 17, "grid": [4, 4]})
    with pytest.raises(RecipeError, match="fusion='none' with gen"):
        OlaVLMConfig(fused_teachers=SMALL[:1])
    with pytest.raises(RecipeError, match="fusion='token_concat' with no teacher"):
        OlaVLMConfig(fusion="token_concat")


def test_half_precision_features_reach_float32_weights(features):
    base, teachers = features
    for kind in (FeatureConcat((4, 4), 7, SMALL, 6), TokenConcat(7, SMALL, 6)):
        exact = kind(base, *teachers)
        half = kind(base.bfloat16(), *(values.half() for values in teachers))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, atol=2e-2, rtol=2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = kind(base.bfloat16(), *(values.half() for values in teachers))
        assert autocast.dtype == torch.bfloat16
        torch.testing.assert_close(autocast.float(), exact, atol=2e-2, rtol=2e-2)
