import pytest

from olavlm.student.stages import apply_stage

ALL = {"vision", "projector", "task_tokens", "llm", "predictors", "logit_scales"}


@pytest.mark.parametrize(
    ("stage", "options", "trained"),
    [
        ("pt", {}, {"projector", "task_tokens", "predictors", "logit_scales"}),
        ("vpt", {}, {"llm", "projector"}),
        ("ift", {}, {"llm", "projector"}),
        ("ift", {"freeze_tokens": False}, {"llm", "projector", "task_tokens"}),
        ("ift", {"distil": True}, {"llm", "projector", "predictors", "logit_scales"}),
    ],
)
def test_what_trains(build, stage, options, trained):
    model = build()
    apply_stage(model, "ift" if stage == "pt" else "pt")
    rows = apply_stage(model, stage, **options)
    assert {row.part for row in rows} == ALL
    for row in rows:
        parameters = list(getattr(model, row.part).parameters())
        assert {p.requires_grad for p in parameters} == {row.part in trained}
        assert row.parameters == sum(p.numel() for p in parameters)
        assert row.trainable == (row.parameters if row.part in trained else 0)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert model.llm.training
    assert not model.vision.tower.training


def test_unknown_stage(build):
    with pytest.raises(ValueError, match="stage 'sft' is unknown; choose one of: pt, vpt, ift"):
        apply_stage(build(), "sft")
