import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from olavlm.teachers import load_teacher


def test_features_are_the_librarys_on_its_own_processors_pixels(tiny, teachers, pictures):
    pixels = CLIPImageProcessorPil()(pictures, return_tensors="pt").pixel_values
    network = CLIPVisionModelWithProjection.from_pretrained(tiny["gen"]).eval()
    with torch.no_grad():
        expected = network(pixels).image_embeds[:, None]
    torch.testing.assert_close(teachers["gen"].encode(pictures), expected, atol=1e-5, rtol=0)
    assert expected.norm(dim=-1).sub(1).abs().min() > 0.1  # not L2-normalised


def test_pixels_are_the_processors_to_the_bit(teachers, pictures):
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    for image in pictures:
        np.testing.assert_array_equal(teachers["gen"].prepare(image), processor(image).pixel_values[0])


@pytest.mark.parametrize("as_subfolder", [True, False])
def test_the_encoder_may_be_a_subfolder_or_the_folder(as_subfolder, tiny, teachers, tmp_path):
    shutil.copytree(tiny["gen"], tmp_path / "image_encoder" if as_subfolder else tmp_path, dirs_exist_ok=True)
    card = load_teacher("gen", model=tmp_path, device="cpu").card
    assert card.fingerprint() == teachers["gen"].card.fingerprint()
    assert card.model == str(tmp_path)
