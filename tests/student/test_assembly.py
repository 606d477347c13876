from itertools import product

import pytest
import torch

from olavlm.student.assembly import assemble, key_mask
from olavlm.student.placement import Inserted, SampleLayout, place
from olavlm.student.text.conversation import IGNORE_INDEX

IMAGE, PATCHES, TASKS, N, WIDTH = 9, 3, 2, 2, 4
INSERTED = Inserted(IMAGE, PATCHES, TASKS, N)
IDS = torch.tensor([[1, 2, 9, 3, 4, 0], [9, 5, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = torch.where((IDS > 2) & (IDS != IMAGE) & MASK.bool(), IDS, IGNORE_INDEX)


def supervised(placement):
    """Of each sample, the tokens that the text loss counts."""
    return torch.bincount(placement.predicting // placement.shape[1], minlength=placement.shape[0]).tolist()


def placed(max_length=None, padding_side=None, ids=IDS, mask=MASK, labels=LABELS):
    return place(ids, mask, labels, INSERTED, max_length, padding_side)


def embeds_of(placement, ids=IDS):
    """Words are their ids, the two images 100 and 200, the task tokens 50 to 53."""
    text = ids.flatten()[placement.text_tokens][:, None].expand(-1, WIDTH).float()
    image = torch.stack([torch.full((PATCHES, WIDTH), value) for value in (100.0, 200.0)])
    tasks = torch.arange(TASKS * N)[:, None].expand(-1, WIDTH) + 50.0
    return assemble(text, image, tasks, placement).embeds[..., 0]


def test_places():
    placement = placed()
    first, second, text_only = placement.layouts
    assert first == SampleLayout(11, slice(2, 5), (slice(5, 7), slice(7, 9)))
    assert second == SampleLayout(8, slice(0, 3), (slice(3, 5), slice(5, 7)))
    assert text_only == SampleLayout(6)
    assert [layout.complete for layout in placement.layouts] == [True, True, False]
    assert placement.lengths == (11, 8, 6)
    assert placement.image_rows.tolist() == [0, 1]
    assert placement.task_starts.tolist() == [[5, 7], [3, 5], [0, 0]]


def test_a_row_without_padding():
    placement = placed()
    tokens = [*range(11), *range(11, 19), *range(22, 28)]
    assert placement.tokens.tolist() == tokens
    assert placement.positions.tolist() == [*range(11), *range(8), *range(6)]
    assert embeds_of(placement).flatten()[placement.tokens].tolist() == [
        1, 2, 100, 100, 100, 50, 51, 52, 53, 3, 4, 200, 200, 200, 50, 51, 52, 53, 5, 1, 2, 3, 4, 5, 6
    ]  # fmt: skip


def test_values_labels_and_padding():
    placement = placed()
    x = IGNORE_INDEX
    assert embeds_of(placement).tolist() == [
        [1, 2, 100, 100, 100, 50, 51, 52, 53, 3, 4],
        [200, 200, 200, 50, 51, 52, 53, 5, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0],
    ]
    assert placement.labels.tolist() == [[x] * 9 + [3, 4], [x] * 7 + [5, x, x, x], [x, x, 3, 4, 5, 6] + [x] * 5]
    assert placement.attention_mask.tolist() == [[1] * 11, [1] * 8 + [0] * 3, [1] * 6 + [0] * 5]
    assert placement.complete.tolist() == [True, True, False]
    assert placement.predicting.tolist() == [8, 9, 11 + 6, 22 + 1, 22 + 2, 22 + 3, 22 + 4]
    assert placement.predicted.tolist() == [3, 4, 5, 3, 4, 5, 6]
    assert supervised(placement) == [2, 1, 4]


def test_samples_that_are_to_teach_nothing():
    placement = placed().without_labels(torch.tensor([False, False, True]))
    assert placement.predicted.tolist() == [3, 4, 5]
    assert supervised(placement) == [2, 1, 0]
    assert (placement.labels[2] == IGNORE_INDEX).all()
    assert placement.labels[0, 9] == 3


def test_left_padding():
    placement = placed(padding_side="left")
    assert embeds_of(placement)[1].tolist() == [0, 0, 0, 200, 200, 200, 50, 51, 52, 53, 5]
    assert placement.attention_mask[1].tolist() == [0] * 3 + [1] * 8
    assert placement.task_starts[1].tolist() == [6, 8]


def test_padding_of_the_text_may_be_anywhere():
    """The result has all of it on one side: the left, if any row has some ahead of its text."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 0], [0, 7, 8, 0], [0, 0, 0, 0]])
    placement = placed(ids=ids, mask=mask, labels=None)
    assert placement.padding_side == "left"
    text = ids.flatten()[placement.text_tokens][:, None].float()
    embeds = assemble(text, torch.empty(0, PATCHES, 1), torch.empty(TASKS * N, 1), placement).embeds[..., 0]
    assert embeds.tolist() == [[0, 5, 6], [1, 2, 3], [0, 7, 8], [0, 0, 0]]
    assert placed(ids=ids, mask=mask, labels=None, padding_side="right").padding_side == "right"
    assert placed().padding_side == "right"


def test_keys_of_a_batch_padded_on_the_left():
    right, left = placed(), placed(padding_side="left")
    assert left.starts == [0, 3, 5]
    for blocks, answer in product(("img+t", "sys+img+t", "sys+img+t+txt"), (True, False)):
        masks = key_mask(right, 1, blocks, answer), key_mask(left, 1, blocks, answer)
        for row, (start, layout) in enumerate(zip(left.starts, left.layouts, strict=True)):
            assert masks[1][row, start:].tolist() == masks[0][row, : layout.length].tolist()
            assert not masks[1][row, :start].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_after_insertion(side):
    placement = placed(8, side)
    assert embeds_of(placement)[0].tolist() == [1, 2, 100, 100, 100, 50, 51, 52]
    assert embeds_of(placement)[1].tolist() == [200, 200, 200, 50, 51, 52, 53, 5]
    assert (placement.labels[0] == IGNORE_INDEX).all()
    assert placement.complete.tolist() == [False, True, False], "a task token of the first is cut off"
    assert placement.lengths == (8, 8, 6)


@pytest.mark.parametrize("max_length", [None, 2, 6, 8, 10, 11])
def test_supervised_tokens_are_those_left_of_the_labels(max_length):
    placement = placed(max_length)
    assert supervised(placement) == (placement.labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()


def test_the_first_token_is_not_predicted():
    placement = placed(ids=torch.tensor([[4, 5]]), mask=torch.ones(1, 2), labels=torch.tensor([[4, 5]]))
    assert placement.predicted.tolist() == [5]


def tensors_of(placement):
    found = []
    placement.each(lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize(
    ("blocks", "include_answer", "first_row"),
    [
        ("sys+img+t+txt", True, [0, 1, 2, 3, 4, 7, 8, 9, 10]),
        ("sys+img+t+txt", False, [0, 1, 2, 3, 4, 7, 8]),
        ("sys+img+t", True, [0, 1, 2, 3, 4, 7, 8]),
        ("img+t", True, [2, 3, 4, 7, 8]),
    ],
)
def test_keys(blocks, include_answer, first_row):
    mask = key_mask(placed(), 1, blocks, include_answer)
    assert mask[0].nonzero().flatten().tolist() == first_row
    assert mask[1].nonzero().flatten().max() < 8, "padding is no key"
    assert mask[2].nonzero().flatten().tolist() == ([0, 1, 2, 3, 4, 5] if include_answer else [0, 1])


def test_without_any_image_projector_and_tokens_are_in_the_graph():
    image = torch.ones(1, PATCHES, WIDTH, requires_grad=True)
    tasks = torch.ones(TASKS * N, WIDTH, requires_grad=True)
    text_only = placed(ids=IDS[2:], mask=MASK[2:], labels=None)
    assemble(torch.zeros(6, WIDTH), image[:0], tasks, text_only).embeds.sum().backward()
    assert (image.grad == 0).all()
    assert (tasks.grad == 0).all()


def test_every_piece_gets_its_own_gradient():
    placement = placed(10)
    text = torch.zeros(len(placement.text_tokens), 1, requires_grad=True)
    image = torch.zeros(2, PATCHES, 1, requires_grad=True)
    tasks = torch.zeros(TASKS * N, 1, requires_grad=True)
    weights = torch.arange(30.0).view(3, 10, 1)
    (assemble(text, image, tasks, placement).embeds * weights).sum().backward()
    assert text.grad.flatten().tolist() == [0, 1, 9, 17, *range(20, 26)]
    assert image.grad.flatten().tolist() == [2, 3, 4, 10, 11, 12]
    assert tasks.grad.flatten().tolist() == [5 + 13, 6 + 14, 7 + 15, 8 + 16], "those of both samples"


def test_errors():
    with pytest.raises(ValueError, match="row 1 has 2 image tokens"):
        placed(ids=torch.tensor([[1, 9], [9, 9]]), mask=torch.ones(2, 2), labels=None)
    with pytest.raises(ValueError, match="pad at the ends"):
        placed(ids=IDS[:1], mask=torch.tensor([[1, 1, 0, 1, 1, 1]]), labels=None)
