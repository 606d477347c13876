import pytest
import torch

from olavlm.student import losses
from olavlm.student.losses import contrastive_sum, smooth_l1_sum, text_loss_sum

VALIDITY = ("all_valid", "two_masked", "none_valid")


def golden_case(golden, task, validity):
    valid = {
        "all_valid": torch.ones(6, dtype=torch.bool),
        "two_masked": torch.from_numpy(golden["valid/two_masked"]),
        "none_valid": torch.zeros(6, dtype=torch.bool),
    }[validity]
    return torch.from_numpy(golden[f"{task}/prediction"]), torch.from_numpy(golden[f"{task}/target"]), valid


@pytest.mark.parametrize("scale", [2.0, 5.0])
@pytest.mark.parametrize("validity", VALIDITY)
@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
@pytest.mark.parametrize("chunk", [losses._CHUNK_ELEMENTS, 100], ids=["whole", "chunked"])
def test_golden(golden_losses, task, validity, scale, chunk, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    prediction, target, valid = golden_case(golden_losses, task, validity)
    target = torch.where(valid[:, None, None], target, torch.nan)
    count = max(1, int(valid.sum()))
    smooth_l1 = smooth_l1_sum(prediction, target, valid) / count
    contrastive = contrastive_sum(prediction, target, torch.arange(6), valid, valid, torch.tensor(scale)) / count
    expected = torch.from_numpy(golden_losses[f"{task}/{validity}/scale{scale}/smooth_l1_contrastive_total"])
    ours = torch.stack([smooth_l1, contrastive, smooth_l1 + 0.3 * contrastive]).double()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def case(b=4, m=6, n=3, d=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    prediction = (2 * torch.randn(b, n, d, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.randn(m, n, d, generator=generator, dtype=dtype)
    labels = torch.tensor([1, 2, 4, 5])[:b]
    valid_targets = torch.tensor([True, True, False, False, True, True])[:m]
    return prediction, targets, labels, valid_targets


@pytest.mark.parametrize("chunk", [losses._CHUNK_ELEMENTS, 40], ids=["whole", "chunked"])
def test_gradients(chunk, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    prediction, targets, labels, valid_targets = case()
    targets[~valid_targets] = torch.nan
    valid = valid_targets[labels]
    assert torch.autograd.gradcheck(lambda p: smooth_l1_sum(p, targets[labels], valid), [prediction])
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p, s: contrastive_sum(p, targets, labels, valid, valid_targets, s), [prediction, scale]
    )


def test_against_plain_formulas():
    prediction, targets, labels, valid_targets = case()
    scale = torch.tensor(2.0, dtype=torch.float64)
    valid = valid_targets[labels]
    rows = torch.nn.functional.smooth_l1_loss(prediction, targets[labels], reduction="none").mean(dim=(1, 2))
    torch.testing.assert_close(smooth_l1_sum(prediction, targets[labels], valid), rows[valid].sum())
    p, t = (torch.nn.functional.normalize(x.flatten(1), dim=1) for x in (prediction, targets[valid_targets]))
    columns = valid_targets.cumsum(0) - 1
    expected = torch.nn.functional.cross_entropy(
        (p @ t.T)[valid] * scale.exp(), columns[labels[valid]], reduction="sum"
    )
    torch.testing.assert_close(contrastive_sum(prediction, targets, labels, valid, valid_targets, scale), expected)


def test_scale_is_capped():
    prediction, targets, labels, valid_targets = case()
    arguments = (prediction, targets, labels, valid_targets[labels], valid_targets)
    capped = contrastive_sum(*arguments, torch.tensor(8.0, dtype=torch.float64))
    torch.testing.assert_close(capped, contrastive_sum(*arguments, torch.tensor(100.0, dtype=torch.float64).log()))


def test_no_valid_row_is_zero_with_a_graph():
    prediction = torch.randn(3, 2, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    target = torch.full((3, 2, 4), torch.nan)
    total = smooth_l1_sum(prediction, target, nothing)
    total = total + contrastive_sum(prediction, target, torch.arange(3), nothing, nothing, scale)
    assert total.item() == 0.0
    total.backward()
    assert (prediction.grad == 0).all()
    assert scale.grad.item() == 0.0


def test_invalid_targets_change_nothing():
    prediction, targets, labels, valid_targets = case()
    scale = torch.tensor(2.0, dtype=torch.float64)
    results = []
    for filling in (0.0, 1e30, torch.inf, torch.nan):
        targets[~valid_targets] = filling
        prediction.grad = None
        valid = valid_targets[labels]
        loss = smooth_l1_sum(prediction, targets[labels], valid)
        loss = loss + contrastive_sum(prediction, targets, labels, valid, valid_targets, scale)
        loss.backward()
        results.append((loss.detach(), prediction.grad.clone()))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])
    assert (results[0][1][~valid_targets[labels]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    prediction, targets, labels, valid_targets = case(dtype=torch.float32)
    prediction, targets = prediction.detach().to(dtype).requires_grad_(), targets.to(dtype)
    scale = torch.tensor(2.0)

    def losses_of(p, t):
        valid = valid_targets[labels]
        return smooth_l1_sum(p, t[labels], valid), contrastive_sum(p, t, labels, valid, valid_targets, scale)

    with torch.autocast("cpu", torch.bfloat16):
        ours = losses_of(prediction, targets)
    for low, full in zip(ours, losses_of(prediction.float(), targets.float()), strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full)
    sum(ours).backward()
    assert prediction.grad.dtype == dtype


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        smooth_l1_sum(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_sum(
            torch.zeros(2, 3, 4), torch.zeros(5, 4, 3), torch.arange(2), torch.ones(2) > 0, torch.ones(5) > 0,
            torch.tensor(2.0),
        )  # fmt: skip


def test_text_loss():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    torch.testing.assert_close(text_loss_sum(logits, torch.tensor([0, 2])), -torch.log(torch.tensor(0.5 * 0.1)))
    empty = text_loss_sum(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0.0
    assert empty.requires_grad
