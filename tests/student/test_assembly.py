from itertools import product

import pytest
import torch

from olavlm.student.assembly import SampleLayout, assemble, count_supervised, key_mask, locate, padded_right
from olavlm.student.text.conversation import IGNORE_INDEX

IMAGE, PATCHES, TASKS, N, WIDTH = 9, 3, 2, 2, 4
IDS = torch.tensor([[1, 2, 9, 3, 4, 0], [9, 5, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = torch.where((IDS > 2) & (IDS != IMAGE) & MASK.bool(), IDS, IGNORE_INDEX)


def layouts(max_length=None):
    return locate(IDS, MASK, IMAGE, PATCHES, TASKS, N, max_length)


def assembled(max_length=None, padding_side="right"):
    text = IDS[..., None].expand(-1, -1, WIDTH).float().requires_grad_()
    image = torch.stack([torch.full((PATCHES, WIDTH), value) for value in (100.0, 200.0)])
    tasks = torch.arange(TASKS * N)[:, None].expand(-1, WIDTH) + 50.0
    return assemble(text, LABELS, layouts(max_length), image, tasks, padding_side)


def test_places():
    first, second, text_only = layouts()
    assert first == SampleLayout(11, slice(2, 5), (slice(5, 7), slice(7, 9)))
    assert second == SampleLayout(8, slice(0, 3), (slice(3, 5), slice(5, 7)))
    assert text_only == SampleLayout(6)
    assert [layout.complete for layout in (first, second, text_only)] == [True, True, False]


def test_values_labels_and_padding():
    batch = assembled()
    x = IGNORE_INDEX
    assert batch.embeds[..., 0].tolist() == [
        [1, 2, 100, 100, 100, 50, 51, 52, 53, 3, 4],
        [200, 200, 200, 50, 51, 52, 53, 5, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [[x] * 9 + [3, 4], [x] * 7 + [5, x, x, x], [x, x, 3, 4, 5, 6] + [x] * 5]
    assert batch.attention_mask.tolist() == [[1] * 11, [1] * 8 + [0] * 3, [1] * 6 + [0] * 5]
    assert batch.complete.tolist() == [True, True, False]


def test_left_padding():
    batch = assembled(padding_side="left")
    assert batch.embeds[1, :, 0].tolist() == [0, 0, 0, 200, 200, 200, 50, 51, 52, 53, 5]
    assert batch.attention_mask[1].tolist() == [0] * 3 + [1] * 8


def test_padding_moves_to_the_right_from_wherever_it_is():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 0], [0, 7, 8, 0], [0, 0, 0, 0]])
    side, (right, moved, none) = padded_right(mask, ids, None)
    assert (side, none) == ("left", None)
    assert right.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert moved.tolist() == [[5, 6, 0, 0], [1, 2, 3, 0], [7, 8, 0, 0], [0, 0, 0, 0]]
    side, (same, unmoved) = padded_right(MASK, IDS)
    assert side == "right"
    assert same is MASK
    assert unmoved is IDS


def test_keys_of_a_batch_padded_on_the_left():
    right, left = assembled(), assembled(padding_side="left")
    assert left.starts == [0, 3, 5]
    for blocks, answer in product(("img+t", "sys+img+t", "sys+img+t+txt"), (True, False)):
        masks = key_mask(right, 1, blocks, answer), key_mask(left, 1, blocks, answer)
        for row, (start, layout) in enumerate(zip(left.starts, left.layouts, strict=True)):
            assert masks[1][row, start:].tolist() == masks[0][row, : layout.length].tolist()
            assert not masks[1][row, :start].any()


def test_cut_after_insertion():
    batch = assembled(max_length=8)
    assert batch.embeds[0, :, 0].tolist() == [1, 2, 100, 100, 100, 50, 51, 52]
    assert (batch.labels[0] == IGNORE_INDEX).all()
    assert batch.complete.tolist() == [False, True, False], "a task token of the first is cut off"


@pytest.mark.parametrize("max_length", [None, 6, 8, 10, 11])
def test_count_is_known_before_insertion(max_length):
    batch = assembled(max_length=max_length)
    counted = (batch.labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    inserted = PATCHES + TASKS * N - 1
    rows = zip(IDS.tolist(), LABELS.tolist(), strict=True)
    assert [count_supervised(ids, labels, IMAGE, inserted, max_length) for ids, labels in rows] == counted


def test_first_token_is_not_counted():
    assert count_supervised([4, 5], [4, 5], IMAGE, 0, None) == 1


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
    mask = key_mask(assembled(), 1, blocks, include_answer)
    assert mask[0].nonzero().flatten().tolist() == first_row
    assert mask[1].nonzero().flatten().max() < 8, "padding is no key"
    assert mask[2].nonzero().flatten().tolist() == ([0, 1, 2, 3, 4, 5] if include_answer else [0, 1])


def test_every_row_keeps_projector_and_tokens_in_the_graph():
    text = torch.zeros(1, 2, WIDTH)
    image = torch.ones(1, PATCHES, WIDTH, requires_grad=True)
    tasks = torch.ones(TASKS * N, WIDTH, requires_grad=True)
    assemble(text, None, [SampleLayout(2)], image[:0], tasks).embeds.sum().backward()
    assert (image.grad == 0).all()
    assert (tasks.grad == 0).all()


def test_errors():
    with pytest.raises(ValueError, match="row 1 has 2 image tokens"):
        locate(torch.tensor([[1, 9], [9, 9]]), torch.ones(2, 2), IMAGE, PATCHES, TASKS, N, None)
    with pytest.raises(ValueError, match="pad at the ends"):
        locate(IDS[:1], torch.tensor([[1, 1, 0, 1, 1, 1]]), IMAGE, PATCHES, TASKS, N, None)
