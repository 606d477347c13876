"""Probes find what a layer carries, and nothing where it was destroyed.

A tiny decoder whose layer `PLANTED` carries a linear image of the target at its image positions, and nothing else of
the picture; ahead of it and from `WIPED` on, no state depends on the picture at all.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.student.decoder import decoder_blocks
from olavlm.student.probing import model as probed
from olavlm.student.probing import scores as scoring
from olavlm.student.probing import training
from olavlm.student.probing.model import TURNS
from olavlm.student.probing.scores import probe_cosines, score
from olavlm.student.probing.settings import ProbeData, ProbeSettings
from olavlm.student.probing.training import train_probes
from olavlm.student.text.conversation import encode
from olavlm.student.training.trainer import train

TRAINED, HELD_OUT = 128, 24
BEFORE, PLANTED, WIPED = 1, 3, 4
SHAPES = {"whole": (1, 32), "grid": (16, 32)}  # of the second, each token stands at an image position of its own
RANK = 3
STEPS, BATCH, LR = 120, 16, 1e-2


def make_targets():
    """By task float32 (images, tokens, dim), of few directions, each token with mean 0 and standard deviation 1 over
    its features: what the predictor's last normalisation can give."""
    random = np.random.default_rng(3)
    made = {}
    for name, (tokens, dim) in SHAPES.items():
        features = random.standard_normal((TRAINED + HELD_OUT, tokens, RANK)) @ random.standard_normal((RANK, dim))
        features -= features.mean(axis=-1, keepdims=True)
        made[name] = (features / features.std(axis=-1, keepdims=True)).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def planted_data(write_store, tmp_path_factory):
    """Pictures of one colour each, which says their number; two datasets of them, and a store of their targets."""
    folder = tmp_path_factory.mktemp("planted")
    names = [f"{i:03d}.png" for i in range(TRAINED + HELD_OUT)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    parts = {"train": names[:TRAINED], "held-out": names[TRAINED:]}
    for part, images in parts.items():
        samples = [{"id": x, "image": x, "conversations": turns} for x in images]
        (folder / f"{part}.json").write_text(json.dumps(samples))
    targets = make_targets()
    write_store(folder / "store", names, targets)
    data = {part: ProbeData([str(folder / f"{part}.json")], [str(folder)], str(folder / "store")) for part in parts}
    return data, {name: torch.from_numpy(values) for name, values in targets.items()}


def plant(model, targets, image_start):
    """Hooks that make the model one of which this is known."""
    blocks, width, seen = decoder_blocks(model.llm), model.llm.config.hidden_size, {}
    random = torch.Generator().manual_seed(1)
    vectors = torch.cat([targets["grid"], targets["whole"].expand(-1, 16, -1)], dim=-1)  # (images, positions, 64)
    carry = torch.randn(vectors.shape[-1], width, generator=random)
    place = 5 * torch.randn(16, width, generator=random)  # or a probe could not tell one position from another
    neutral = torch.randn(1, 1, width, generator=random)

    def remember(_module, inputs):
        transform = model.config.image_transform
        red = inputs[0][:, 0].mean(dim=(1, 2)) * transform.std[0] + transform.mean[0]
        seen["numbers"] = (red * 255).round().long()

    def wipe(_module, _inputs, output):
        return neutral.expand_as(output)

    def replace(_module, _inputs, output):
        states = output.clone()
        states[:, image_start : image_start + 16] = vectors[seen["numbers"]] @ carry + place
        return states

    model.vision.register_forward_pre_hook(remember)
    for layer in (BEFORE, WIPED):
        blocks[layer - 1].register_forward_hook(wipe)
    blocks[PLANTED - 1].register_forward_hook(replace)


@pytest.fixture(scope="module")
def scores(planted_data, tiny, recipe_in, tmp_path_factory):
    """By task and layer, on held-out images."""
    folder = tmp_path_factory.mktemp("probes")
    data, targets = planted_data
    start = train(
        recipe_in(folder, **{"train.max_steps": 1, "model.num_task_tokens": 0, "model.template": "plain"}), "pt", {}
    )
    load = probed.load_probed

    def load_planted(*arguments, **options):
        model, notes = load(*arguments, **options)
        ids = encode(model.tokenizer, TURNS, model.config.template)["input_ids"]
        plant(model, targets, ids.index(model.config.image_token_id))
        return model, notes

    with pytest.MonkeyPatch.context() as patch:
        for module in (training, scoring):
            patch.setattr(module, "load_probed", load_planted)
        settings = ProbeSettings(
            str(start),
            data["train"],
            {name: name for name in SHAPES},
            str(folder / "run"),
            layers=[PLANTED - 1, PLANTED, WIPED],
            batch_size=BATCH,
            epochs=STEPS * BATCH / TRAINED,
            lr=LR,
            workers=0,
        )
        run = train_probes(settings, {})
        found = probe_cosines(run, data["held-out"], workers=0, batch_size=HELD_OUT)
    assert (found.seen, found.unreadable, len(found.images)) == (0, 0, HELD_OUT)
    return {task: {x: score(v[None])[0].mean for x, v in by.items()} for task, by in found.values.items()}


@pytest.mark.parametrize("task", SHAPES)
def test_a_probe_finds_what_its_layer_carries_and_nothing_where_it_was_destroyed(scores, task):
    assert scores[task][PLANTED] > 0.95
    assert scores[task][PLANTED - 1] < 0.3, "ahead of the layer, no state depends on the picture"
    assert scores[task][WIPED] < 0.3, "a later layer wiped it"
