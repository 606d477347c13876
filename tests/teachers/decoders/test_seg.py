"""With the model's own four maps the classes are the library's own; the rest is what the context says it is."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import OneFormerImageProcessor, OneFormerModel

from olavlm.teachers import TeacherError, load_teacher
from olavlm.teachers.checkpoint import open_checkpoint
from olavlm.teachers.decoders import load_decoder
from olavlm.teachers.decoders.colours import class_colours, class_legend, class_picture, largest_classes
from olavlm.teachers.decoders.seg import classes_of, task_tokens
from olavlm.teachers.tiny import SEG_CLASSES

POST_PROCESS = OneFormerImageProcessor.post_process_semantic_segmentation


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher("seg", model=tiny["seg"], recipe="stage4-768", device="cpu")


@pytest.fixture(scope="module")
def decoders(tiny):
    """By context, for targets of `stage4-768`."""
    return {
        context: load_decoder("seg", model=tiny["seg"], device="cpu", recipe="stage4-768", context=context)
        for context in ("shrunk", "full", "zero")
    }


@pytest.fixture(scope="module")
def targets(teacher, pictures):
    return teacher.encode(pictures[:2])


@torch.no_grad()
def by_the_library(tiny, teacher, image):
    """Logits of classes and masks, and the classes."""
    network = OneFormerModel.from_pretrained(tiny["seg"]).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.card.mean, teacher.card.std))
    pixels = (torch.from_numpy(teacher.prepare(image))[None].float() / 255 - mean) / std
    task = task_tokens(open_checkpoint(str(tiny["seg"]), revision=None, model_types=("oneformer",)), 8)
    output = network(pixels, task)
    logits = SimpleNamespace(
        class_queries_logits=output.transformer_decoder_class_predictions,
        masks_queries_logits=output.transformer_decoder_mask_predictions,
    )
    classes = POST_PROCESS(None, logits, target_sizes=[(image.height, image.width)])[0].numpy()
    return logits.class_queries_logits, logits.masks_queries_logits, classes


def test_a_true_target_with_the_real_stages_gives_the_models_own_classes(tiny, teacher, decoders, targets, pictures):
    decoder = decoders["full"]
    for row, (image, own) in enumerate(zip(pictures, decoder.decode(targets, pictures[:2]), strict=False)):
        class_logits, mask_logits, classes = by_the_library(tiny, teacher, image)
        logits = decoder._queries(targets[row : row + 1], 24, decoder._context(image, 24))
        torch.testing.assert_close(logits[0], class_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1], mask_logits, atol=1e-4, rtol=0)
        assert mask_logits.std() > 0.1
        assert own.shape == (image.height, image.width)
        assert (own != classes).mean() < 1e-3  # a tie may be rounded either way


def test_the_context_is_what_it_says(decoders, targets, pictures):
    """Stages 1 to 3 count where they are there, and not at all where they are not."""
    other = [picture.rotate(180) for picture in pictures[:2]]
    logits = {
        name: [decoder._queries(targets[:1], 24, decoder._context(picture[0], 24))[1] for picture in (pictures, other)]
        for name, decoder in decoders.items()
    }
    assert {name: tuple(masks.shape[2:]) for name, (masks, _) in logits.items()} == {
        "shrunk": (24, 24), "full": (192, 192), "zero": (24, 24)
    }  # fmt: skip
    for name in ("shrunk", "full"):
        assert (logits[name][0] - logits[name][1]).abs().max() > 1e-3, name
    assert torch.equal(*logits["zero"])


def test_the_features_count(decoders, targets, pictures):
    for name, decoder in decoders.items():
        context = decoder._context(pictures[0], 24)
        own, swapped = (decoder._queries(features[None], 24, context)[1] for features in targets)
        assert (own - swapped).abs().max() > 1e-3, name


def test_classes_by_hand():
    """Two queries, two classes and no-object: the probability of the class times that of the mask, summed."""
    classes = torch.log(torch.tensor([[[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]]))
    masks = torch.logit(torch.tensor([[[[0.9, 0.1]], [[0.2, 0.5]]]]))
    # left: 0.6*0.9 + 0.2*0.2 = 0.58 against 0.1*0.9 + 0.7*0.2 = 0.23; right: 0.16 against 0.36
    assert classes_of(classes, masks, size=(1, 2)).tolist() == [[0, 1]]
    assert classes_of(classes, masks, size=(2, 4)).tolist() == [[0, 0, 1, 1]] * 2


def test_many_classes_are_scored_in_parts():
    generator = torch.Generator().manual_seed(0)
    classes, masks = (torch.randn(shape, generator=generator) for shape in ((1, 5, 41), (1, 5, 6, 6)))
    logits = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    for size in ((30, 17), (3, 4)):
        expected = POST_PROCESS(None, logits, target_sizes=[size])[0].numpy()
        assert np.array_equal(classes_of(classes, masks, size=size), expected)


def test_the_task_is_said_with_the_checkpoints_own_tokenizer(tiny, tmp_path):
    checkpoint = open_checkpoint(str(tiny["seg"]), revision=None, model_types=("oneformer",))
    ids = task_tokens(checkpoint, 8)
    assert ids.shape == (1, 8)
    assert ids[0, :6].gt(0).all()
    assert ids[0, 6:].eq(0).all()  # padding is 0, whatever the padding token's id
    bare = shutil.copytree(tiny["seg"], tmp_path / "seg", ignore=shutil.ignore_patterns("tokenizer*"))
    load_teacher("seg", model=bare, device="cpu")  # features need none
    with pytest.raises(TeacherError, match="tokenizer"):
        load_decoder("seg", model=bare, device="cpu")


def test_what_cannot_be_decoded_is_refused(decoders, targets, tiny):
    with pytest.raises(TeacherError, match="2 features and none photographs"):
        decoders["zero"].decode(targets)
    with pytest.raises(TeacherError, match="use one of shrunk, full, zero"):
        load_decoder("seg", model=tiny["seg"], device="cpu", context="none")


def test_colours_and_legend(decoders):
    assert decoders["zero"].classes == list(SEG_CLASSES)
    colours = class_colours(133)
    assert len(np.unique(colours, axis=0)) == 133
    assert np.array_equal(class_colours(6), colours[:6])
    picture = class_picture(np.array([[2, 255]]), 6)
    assert picture.getpixel((0, 0)) == tuple(colours[2].tolist())
    assert picture.getpixel((1, 0)) == (255, 255, 255)
    maps = [np.array([[1, 1, 4, 255]]), np.full((9, 9), 3)]
    assert largest_classes(maps, 6, most=6) == [3, 1, 4]
    assert largest_classes(maps, 6, most=1) == [3]
    legend = class_legend([3, 1], SEG_CLASSES, 120)
    assert legend.width == 120
    assert tuple(colours[3].tolist()) in {colour for _, colour in legend.getcolors(99999)}
    named = class_legend([3, 1, 4], SEG_CLASSES, 200)
    assert decoders["zero"].legend(maps, 200).tobytes() == named.tobytes()
    assert class_legend([3, 1], SEG_CLASSES, 60).height == 2 * class_legend([3, 1], SEG_CLASSES, 400).height


def test_a_photograph_is_looked_at_once_for_several_layers(decoders, targets, pictures, monkeypatch):
    decoder, looks = decoders["shrunk"], []
    alone = [decoder.decode(features[None], [pictures[0]])[0] for features in targets]
    look = decoder._context
    monkeypatch.setattr(decoder, "_context", lambda *arguments: looks.append(1) or look(*arguments))
    together = decoder.decode(targets, [pictures[0]] * 2)
    assert len(looks) == 1
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    decoder.decode(targets, pictures[:2])
    assert len(looks) == 3


def test_photographs_of_any_mode(decoders, targets):
    grey = Image.new("L", (31, 17), 90)
    assert decoders["shrunk"].decode(targets[:1], [grey])[0].shape == (17, 31)
