"""Figures of decoded targets and predictions: what is drawn is what the decoder gives, and what cannot be is said."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.pipelines.reporting.decoded import decoded_figures
from olavlm.pipelines.reporting.predictions import TaskView
from olavlm.teachers.decoders import load_decoder
from olavlm.teachers.decoders.drawing import draw


@pytest.fixture(scope="module")
def decoder(tiny):
    return load_decoder("depth", model=tiny["depth"], device="cpu")


def view(target, **predictions):
    return TaskView("depth", 16, (4, 4), target, "", {int(k[1:]): v for k, v in predictions.items()}, {})


def test_each_picture_is_the_decoders(decoder):
    random = np.random.default_rng(0)
    target, prediction = random.normal(size=(2, 16, 32)).astype(np.float32)
    html = decoded_figures(view(target, x4=prediction), Image.new("RGB", (90, 60)), decoder)
    pictures = {
        alt: Image.open(io.BytesIO(base64.b64decode(data)))
        for data, alt in re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', html)
    }
    assert list(pictures) == ["depth, target, decoded", "depth, layer 4, decoded", "depth: what the colours mean"]
    (own,) = decoder.decode(torch.from_numpy(prediction)[None])
    expected = decoder.picture(own).resize((280, 280), Image.Resampling.BILINEAR)
    shown = np.asarray(pictures["depth, layer 4, decoded"]).astype(int)
    assert np.abs(shown - np.asarray(expected)).mean() < 5  # JPEG
    assert np.abs(shown - np.asarray(pictures["depth, target, decoded"])).mean() > 10


def test_what_cannot_be_decoded_is_said(decoder):
    target = np.ones((16, 32), np.float32)
    assert decoded_figures(view(None), Image.new("RGB", (2, 2)), decoder) == ""
    assert "photograph cannot be read" in decoded_figures(view(target), None, decoder)
    html = decoded_figures(view(target, x4=target * np.nan), Image.new("RGB", (2, 2)), decoder)
    assert html.count("<img") == 2  # the target and the colours
    assert "not finite" in html
    assert draw(decoder, {"x": target * np.nan}, Image.new("RGB", (2, 2))).pictures == {}
