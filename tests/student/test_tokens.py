import pytest
import torch

from olavlm.student.tokens import TaskSpec, TaskTokens


def paper_tasks():
    return (
        TaskSpec("gen", tokens=1, dim=1024, layers=(12, 20)),
        TaskSpec("depth", tokens=576, dim=1024, layers=(8, 20), predictor_width="llm"),
        TaskSpec("seg", tokens=576, dim=1536, layers=(10, 18)),
    )


@pytest.mark.parametrize(("width", "expected"), [(4096, 4_751_360), (3072, 3_563_520)])
def test_parameter_count(width, expected):
    with torch.device("meta"):
        tokens = TaskTokens(paper_tasks(), 8, width)
    assert sum(p.numel() for p in tokens.parameters()) == expected


def test_pooled_in_order():
    torch.manual_seed(0)
    tokens = TaskTokens(paper_tasks(), 8, 16)
    inserted = tokens()
    assert inserted.shape == (24, 16)
    assert torch.equal(inserted[:8], tokens.queries("gen"))
    torch.testing.assert_close(inserted[8], tokens.queries("depth")[:72].mean(dim=0))
    torch.testing.assert_close(inserted[23], tokens.queries("seg")[-72:].mean(dim=0))
    reordered = TaskTokens(paper_tasks()[::-1], 8, 16)
    reordered.load_state_dict(tokens.state_dict())
    assert torch.equal(reordered(), torch.cat([inserted[16:], inserted[8:16], inserted[:8]]))


def test_initial_deviation_is_one():
    torch.manual_seed(0)
    tokens = TaskTokens(paper_tasks(), 8, 256)
    assert tokens.queries("depth").std().item() == pytest.approx(1, abs=0.01)
    assert tokens()[8:16].std().item() == pytest.approx(72**-0.5, abs=0.01)


def test_no_tokens():
    tokens = TaskTokens(paper_tasks(), 0, 16)
    assert tokens().shape == (0, 16)
    assert not list(tokens.parameters())


def test_errors():
    with pytest.raises(ValueError, match="576 teacher tokens are not divisible into num_task_tokens=7"):
        TaskTokens(paper_tasks(), 7, 16)
    with pytest.raises(ValueError, match="once"):
        TaskTokens(paper_tasks()[:1] * 2, 8, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "letters"),
        ({"tokens": 0}, "tokens=0"),
        ({"layers": (0,)}, "counted from 1"),
        ({"layers": (3, 3)}, "distinct"),
        ({"weight": -1.0}, "weight"),
        ({"predictor_width": "wide"}, "target, llm"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec(**{"name": "depth", "tokens": 4, "dim": 8} | fields)


def test_spec_round_trip():
    for task in paper_tasks():
        assert TaskSpec.from_dict(task.to_dict()) == task
