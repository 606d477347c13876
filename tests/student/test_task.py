import pytest
import torch
import torch.nn.functional as F

from olavlm.student.stages import apply_stage
from olavlm.student.task import Batch, BatchTotals, DistillTask
from olavlm.student.text.conversation import IGNORE_INDEX


def totals_of(batch, **fields):
    return BatchTotals(
        supervised_tokens=int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        valid_rows={task: int(valid.sum()) for task, valid in batch["valid"].items()},
        **fields,
    )


def rows_of(batch, rows):
    return Batch(
        **{
            name: {task: tensor[rows] for task, tensor in value.items()} if isinstance(value, dict) else value[rows]
            for name, value in batch.items()
        }
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_names_and_total(build, make_batch, samples, tasks):
    batch = make_batch(samples)
    losses, report = DistillTask(tasks).compute(build(), batch, totals_of(batch))
    layers = ["gen/2", "gen/6", "depth/3", "seg/2", "seg/5"]
    names = [f"loss/{layer}/{term}" for layer in layers for term in ("smooth_l1", "contrastive")]
    assert list(losses) == ["loss/text", *names, "loss/total"]
    assert report.keys() == losses.keys() | {"scale/gen", "scale/depth", "scale/seg"}
    assert not any(value.requires_grad for value in report.values())
    assert report["scale/gen"].item() == pytest.approx(7.389, abs=1e-3)
    weights = {"gen": 0.5, "depth": 0.25, "seg": 0.5}
    total = losses["loss/text"] + sum(
        weights[layer.split("/")[0]] * (losses[f"loss/{layer}/smooth_l1"] + 0.3 * losses[f"loss/{layer}/contrastive"])
        for layer in layers
    )
    torch.testing.assert_close(losses["loss/total"], total)


def test_values_from_the_formulas(build, make_batch, samples, tasks):
    model, batch = build(), make_batch(samples)
    losses, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
    rows = torch.tensor([0, 1, 3])  # those with an image
    for key, prediction in model(**inputs).predictions.items():
        p, t = prediction[rows], batch["targets"][key.split("/")[0]][rows]
        torch.testing.assert_close(losses[f"loss/{key}/smooth_l1"], F.smooth_l1_loss(p, t))
        similarity = F.normalize(p.flatten(1), dim=1) @ F.normalize(t.flatten(1), dim=1).T
        expected = F.cross_entropy(similarity * torch.tensor(2.0).exp(), torch.arange(3))
        torch.testing.assert_close(losses[f"loss/{key}/contrastive"], expected)


def test_without_the_contrastive_term(build, make_batch, samples, tasks):
    batch = make_batch(samples)
    model = build()
    losses, _ = DistillTask(tasks, use_contrastive=False).compute(model, batch, totals_of(batch))
    smooth_l1 = {name: loss for name, loss in losses.items() if name.endswith("smooth_l1")}
    weights = {"gen": 0.5, "depth": 0.25, "seg": 0.5}
    total = losses["loss/text"] + sum(weights[name.split("/")[1]] * loss for name, loss in smooth_l1.items())
    torch.testing.assert_close(losses["loss/total"], total)
    losses["loss/total"].backward()
    assert all(scale.grad.item() == 0 for scale in model.logit_scales.values()), "in the graph, and untouched"


def test_pretraining_gradients(build, make_batch, samples, tasks):
    model, batch = build(), make_batch(samples)
    apply_stage(model, "pt")
    losses, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    losses["loss/total"].backward()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part in ("vision", "llm"):
            assert parameter.grad is None, name
        else:
            assert torch.isfinite(parameter.grad).all(), name
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("stage", ["vpt", "ift"])
def test_finetuning_gradients(build, make_batch, samples, tasks, stage):
    model, batch = build(with_predictors=False), make_batch(samples)
    apply_stage(model, stage)
    losses, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    assert list(losses) == ["loss/text", "loss/total"]
    losses["loss/total"].backward()
    parts = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert parts == {"llm", "projector"}
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize("rows", [[2], []], ids=["text only", "no valid target"])
def test_nothing_to_distil_is_exactly_zero(build, make_batch, samples, tasks, rows):
    batch = make_batch(samples)
    batch = rows_of(batch, torch.tensor(rows or [0, 1]))
    batch["valid"] = {task: torch.zeros_like(valid) for task, valid in batch["valid"].items()}
    model = build()
    apply_stage(model, "pt")
    losses, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    distilled = [loss.item() for name, loss in losses.items() if name not in ("loss/text", "loss/total")]
    assert distilled == [0.0] * 10
    losses["loss/total"].backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = gradients(model)
    assert grads.keys() == trainable, "every rank has every gradient"
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_quarantined_target_counts_nowhere(build, make_batch, samples, tasks):
    """A sample whose target is missing: its text counts, and no other loss notices it."""
    batch = make_batch(samples)
    for task in tasks:
        batch["targets"][task.name][1] = torch.nan
        batch["valid"][task.name][1] = False
    model = build()
    losses, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    without = rows_of(batch, torch.tensor([0, 2, 3]))
    expected, _ = DistillTask(tasks).compute(model, without, totals_of(without))
    for name, loss in losses.items():
        if name not in ("loss/text", "loss/total"):
            torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=0, msg=name)
    losses["loss/total"].backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize("cuts", [(1, 2, 3), (2,), (3,)], ids=["1+1+1+1", "2+2", "3+1"])
def test_micro_batches_add_up_to_the_whole_batch(build, make_batch, samples, tasks, cuts):
    batch = make_batch(samples)
    task = DistillTask(tasks)
    whole = build()
    apply_stage(whole, "pt")
    expected, _ = task.compute(whole, batch, totals_of(batch))
    expected["loss/total"].backward()
    split = build()
    apply_stage(split, "pt")
    sums = dict.fromkeys(expected, 0.0)
    for start, stop in zip((0, *cuts), (*cuts, len(samples)), strict=True):
        totals = totals_of(batch, targets=batch["targets"], targets_valid=batch["valid"], offset=start)
        losses, _ = task.compute(split, rows_of(batch, slice(start, stop)), totals)
        losses["loss/total"].backward()
        sums = {name: sums[name] + loss.detach() for name, loss in losses.items()}
    for name, loss in expected.items():
        torch.testing.assert_close(sums[name], loss.detach(), atol=1e-5, rtol=0, msg=name)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], grad, atol=1e-5, rtol=1e-4, msg=name)
    # The control: with the negatives of each micro-batch alone the result is another.
    alone, _ = task.compute(split, rows_of(batch, slice(0, 1)), totals_of(batch))
    assert alone["loss/gen/2/contrastive"].item() == 0.0


def test_float16_targets(build, make_batch, samples, tasks):
    batch = make_batch(samples)
    batch["targets"] = {task: target.half() for task, target in batch["targets"].items()}
    full = dict(batch, targets={task: target.float() for task, target in batch["targets"].items()})
    model = build()
    ours, _ = DistillTask(tasks).compute(model, batch, totals_of(batch))
    expected, _ = DistillTask(tasks).compute(model, full, totals_of(full))
    torch.testing.assert_close(ours["loss/total"], expected["loss/total"])
