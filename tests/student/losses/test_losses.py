"""The embedding losses: against reference numbers, the plain formulas, and themselves under what must not matter."""

import pytest
import torch
import torch.nn.functional as F

from olavlm.student.losses import eager
from olavlm.student.losses.embedding import embedding_loss_sums
from olavlm.student.losses.fused import choose
from olavlm.student.losses.scaled_features import ScaledFeatures
from olavlm.student.losses.text import text_loss_sum
from olavlm.student.training.live_bytes import LiveBytes

VALIDITY = ("all_valid", "two_masked", "none_valid")


@pytest.fixture
def chunk(request, monkeypatch):
    """As many elements of the targets are widened at once."""
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", {"cpu": request.param})


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
@pytest.mark.parametrize("chunk", [2**19, 100], ids=["whole", "chunked"], indirect=True)
def test_golden(golden_losses, task, validity, scale, chunk):
    prediction, target, valid = golden_case(golden_losses, task, validity)
    target = torch.where(valid[:, None, None], target, torch.nan)
    count = max(1, int(valid.sum()))
    sums = embedding_loss_sums([prediction], target, torch.arange(6), valid, valid, torch.tensor(scale))
    smooth_l1, contrastive = (float(s) / count for s in sums)
    expected = torch.from_numpy(golden_losses[f"{task}/{validity}/scale{scale}/smooth_l1_contrastive_total"])
    ours = torch.tensor([smooth_l1, contrastive, smooth_l1 + 0.3 * contrastive]).double()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def case(b=4, m=6, n=3, d=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    prediction = (2 * torch.randn(b, n, d, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.randn(m, n, d, generator=generator, dtype=dtype)
    labels = torch.tensor([1, 2, 4, 5])[:b]
    valid_targets = torch.tensor([True, True, False, False, True, True])[:m]
    return prediction, targets, labels, valid_targets


def scaled(targets):
    """`targets` in int8, and the same values widened."""
    scales = targets.abs().amax(dim=-1).float() / 127
    features = ScaledFeatures((targets / scales[..., None]).round().to(torch.int8), scales)
    return features, features.float().to(targets.dtype)


def plain(prediction, targets, labels, valid_rows, valid_targets, scale):
    """The formulas with PyTorch's own functions, on rows that are all finite."""
    rows = F.smooth_l1_loss(prediction, targets[labels], reduction="none").mean(dim=(1, 2))
    p, t = (F.normalize(x.flatten(1), dim=1) for x in (prediction, targets[valid_targets]))
    columns = valid_targets.cumsum(0) - 1
    logits = (p @ t.T)[valid_rows] * scale.exp().clamp(max=100)
    return rows[valid_rows].sum(), F.cross_entropy(logits, columns[labels[valid_rows]], reduction="sum")


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("chunk", [2**19, 40], ids=["whole", "chunked"], indirect=True)
def test_gradients(chunk, kind):
    prediction, targets, labels, valid_targets = case()
    if kind == "int8":
        targets, _ = scaled(targets)
        targets.scales[~valid_targets] = torch.nan
    else:
        targets[~valid_targets] = torch.nan
    valid = torch.tensor([True, True, True, False])
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    second = torch.flip(prediction.detach(), (0, 2)).requires_grad_()

    def losses(p, q, s, **options):
        return embedding_loss_sums([p, q], targets, labels, valid, valid_targets, s, **options)

    assert torch.autograd.gradcheck(losses, [prediction, second, scale])
    first, overwritten = (
        torch.autograd.grad(torch.cat(losses(p, q, scale, overwrite=overwrite)).sum(), [p, q, scale])
        for overwrite in (False, True)
        for p, q in [(prediction * 1, second * 1)]
    )
    assert all(torch.equal(a, b) for a, b in zip(first, overwritten, strict=True))


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("chunk", [2**19, 40], ids=["whole", "chunked"], indirect=True)
def test_against_plain_formulas_in_float32(kind, chunk):
    prediction, targets, labels, valid_targets = case(dtype=torch.float32)
    given, targets = scaled(targets) if kind == "int8" else (targets, targets)
    valid, scale = valid_targets[labels], torch.tensor(2.0, requires_grad=True)
    found = embedding_loss_sums([prediction, 3 * prediction], given, labels, valid, valid_targets, scale)
    for layer, p in enumerate((prediction, 3 * prediction)):
        expected = plain(p, targets, labels, valid, valid_targets, scale)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[layer], theirs, atol=1e-5, rtol=1e-5)
        weighted = (sum(x[layer] for x in found), sum(expected))
        ours, theirs = (torch.autograd.grad(x, [prediction, scale], retain_graph=True) for x in weighted)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scale_is_capped():
    prediction, targets, labels, valid_targets = case()
    arguments = ([prediction], targets, labels, valid_targets[labels], valid_targets)
    _, capped = embedding_loss_sums(*arguments, torch.tensor(8.0, dtype=torch.float64))
    _, at_the_cap = embedding_loss_sums(*arguments, torch.tensor(100.0, dtype=torch.float64).log())
    torch.testing.assert_close(capped, at_the_cap)


def test_no_valid_row_is_zero_with_a_graph():
    prediction = torch.randn(3, 2, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    target = torch.full((3, 2, 4), torch.nan)
    total = torch.cat(embedding_loss_sums([prediction], target, torch.arange(3), nothing, nothing, scale)).sum()
    assert total.item() == 0.0
    total.backward()
    assert (prediction.grad == 0).all()
    assert scale.grad.item() == 0.0


def test_invalid_rows_change_nothing():
    _, targets, labels, valid_targets = case()
    valid = torch.tensor([True, False, True, False])  # the last: a target, and a prediction that does not count
    scale = torch.tensor(2.0, dtype=torch.float64)
    results = []
    for filling in (0.0, 1e30, torch.inf, torch.nan):
        prediction = case()[0].detach()
        prediction[~valid] = filling
        prediction.requires_grad_()
        targets[~valid_targets] = filling
        sums = embedding_loss_sums([prediction], targets, labels, valid, valid_targets, scale)
        torch.cat(sums).sum().backward()
        results.append((*sums, prediction.grad))
    for other in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(other, results[0], strict=True))
    assert (results[0][2][~valid] == 0).all()
    assert (results[0][2][valid] != 0).all()


def test_a_valid_row_that_is_not_finite_is_seen():
    prediction, targets, labels, valid_targets = case()
    targets[1] = torch.nan
    sums = embedding_loss_sums(
        [prediction], targets, labels, valid_targets[labels], valid_targets, torch.tensor(2.0, dtype=torch.float64)
    )
    assert not any(torch.isfinite(s).any() for s in sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    prediction, targets, labels, valid_targets = case(dtype=torch.float32)
    prediction, targets = prediction.detach().to(dtype).requires_grad_(), targets.to(dtype)
    scale = torch.tensor(2.0)

    def losses_of(p, t):
        return embedding_loss_sums([p], t, labels, valid_targets[labels], valid_targets, scale)

    with torch.autocast("cpu", torch.bfloat16):
        ours = losses_of(prediction, targets)
    for low, full in zip(ours, losses_of(prediction.float(), targets.float()), strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full)
    torch.cat(ours).sum().backward()
    assert prediction.grad.dtype == dtype


def batch_of(b, m, n, d, dtype):
    prediction, targets = torch.randn(b, n, d), torch.randn(m, n, d)
    if dtype == "int8":
        targets, _ = scaled(targets)
    else:
        targets = targets.to(dtype)
    return prediction.requires_grad_(), targets, torch.ones(m, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "int8"])
@pytest.mark.parametrize("chunk", [2**16], indirect=True)
def test_nothing_of_the_size_of_predictions_or_targets_is_made(dtype, chunk):
    """Beside the prediction itself, whose memory the gradient takes; the control has a gradient of its own."""
    peaks = {}
    for overwrite in (True, False):
        source, targets, valid = batch_of(4, 8, 64, 4096, dtype)
        size = source.numel() * 4
        with LiveBytes() as live:
            prediction = source * 1
            sums = embedding_loss_sums(
                [prediction], targets, torch.arange(4), valid[:4], valid, torch.tensor(2.0), overwrite=overwrite
            )
            (found,) = torch.autograd.grad(torch.cat(sums).sum(), [prediction])
        assert (found.data_ptr() == prediction.data_ptr()) == overwrite
        peaks[overwrite] = (live.peak - size) / size
    assert peaks[True] < 0.2
    assert peaks[False] == pytest.approx(peaks[True] + 1, abs=0.02)


class TestOverwriting:
    def sums(self, predictions):
        valid = torch.ones(2, dtype=torch.bool)
        targets = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        arguments = (targets, torch.arange(2), valid, valid, torch.tensor(2.0))
        return torch.cat(embedding_loss_sums(predictions, *arguments, overwrite=True)).sum()

    def test_a_leaf_is_refused(self):
        with pytest.raises(ValueError, match=r"leaf.*overwrite=False"):
            self.sums([torch.zeros(2, 3, 5, requires_grad=True)])

    def test_who_else_needs_the_prediction_is_told(self):
        prediction = torch.randn(2, 3, 5, requires_grad=True) * 1
        kept = prediction.square().sum()
        self.sums([prediction]).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()

    def test_a_second_backward_is_told(self):
        total = self.sums([torch.randn(2, 3, 5, requires_grad=True) * 1])
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()

    def test_views_of_one_tensor_and_others_that_are_not_contiguous(self):
        source = torch.randn(2, 2, 5, 3, requires_grad=True)
        grads = []
        for layers in (list(source * 1), [layer.clone(memory_format=torch.contiguous_format) for layer in source * 1]):
            layers = [layer.transpose(1, 2) for layer in layers]
            grads += torch.autograd.grad(self.sums(layers), [source])
        layers = list((source.transpose(2, 3) * 1).contiguous())
        grads += torch.autograd.grad(self.sums(layers), [source])
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


def test_shapes_must_agree():
    valid = torch.ones(5, dtype=torch.bool)
    for prediction in (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)):
        with pytest.raises(ValueError, match="differ in shape"):
            embedding_loss_sums(
                [prediction], torch.zeros(5, 4, 3), torch.arange(2), valid[:2], valid, torch.tensor(2.0)
            )
    with pytest.raises(ValueError, match="one scale a token"):
        ScaledFeatures(torch.zeros(2, 3, 4, dtype=torch.int8), torch.zeros(2, 4))


def test_kernels_that_cannot_run_are_refused():
    assert choose("eager", torch.zeros(1)) is eager
    with pytest.raises(ValueError, match="'cuda'; use eager, triton"):
        choose("cuda", torch.zeros(1))
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"no torch\.float32 prediction on cpu.*use eager"):
        choose("triton", torch.zeros(1))


def test_text_loss():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    torch.testing.assert_close(text_loss_sum(logits, torch.tensor([0, 2])), -torch.log(torch.tensor(0.5 * 0.1)))
    empty = text_loss_sum(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0.0
    assert empty.requires_grad
