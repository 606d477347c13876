"""Stock LLaVA taken as a starting point: the same logits, prompts and pictures, or a refusal that says why."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from olavlm.cache import decode_rgb
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.formats.llava_hf import causal_lm, from_llava_hf, template_of
from olavlm.student.formats.llava_images import transform_of
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import IMAGE_TOKEN, encode, encode_prompt, load_tokenizer
from olavlm.student.text.templates import TEMPLATES

KINDS = ("llama_clip", "qwen2_siglip")
DIALOGUES = [
    ("astronaut.jpg", ["What is she wearing?", "An orange suit.", "What is behind her?", "A flag and a shuttle."]),
    ("bison.jpg", ["Which is closer?", "The one in the middle."]),
    (None, ["Name three animals.", "A dog, a cat and a bird.", "Another one.", "A horse."]),
    (
        "cameraman.jpg",
        ["Describe.", "A man with a camera stands on grass, buildings far behind him.", "Why?", "."],
    ),
]


@pytest.fixture(scope="module")
def checkpoints(llava, tmp_path_factory):
    """Stock folders by name, and ours made of them, both as they lie on disk."""
    root = tmp_path_factory.mktemp("ours")
    made = {}
    for kind in KINDS:
        stock = llava(kind)
        converted = from_llava_hf(stock)
        assert converted.notes == []
        converted.model.save_pretrained(root / kind)
        made[kind] = stock, root / kind
    return made


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """(stock model, its processor, ours) by name."""
    return {
        kind: (
            LlavaForConditionalGeneration.from_pretrained(stock).eval(),
            AutoProcessor.from_pretrained(stock),
            OlaVLM.from_pretrained(ours).eval(),
        )
        for kind, (stock, ours) in checkpoints.items()
    }


def turns_of(image, texts):
    texts = [f"{IMAGE_TOKEN}\n{texts[0]}" if image else texts[0], *texts[1:]]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def parts_of(image, texts):
    """The same as messages of the library."""
    messages = []
    for i, text in enumerate(texts):
        content = [{"type": "image"}] if image and i == 0 else []
        messages.append({"role": ("user", "assistant")[i % 2], "content": [*content, {"type": "text", "text": text}]})
    return messages


@pytest.fixture(scope="module")
def photograph(sample_images):
    return lambda name: decode_rgb((sample_images / name).read_bytes(), name)


@pytest.fixture(scope="module")
def batch_of(loaded, photograph):
    """batch_of(kind, side) -> (inputs of stock, inputs of ours): the dialogues above with our pixels."""

    def make(kind, side):
        _, processor, model = loaded[kind]
        ids = [
            encode(model.tokenizer, turns_of(*dialogue), model.config.template)["input_ids"] for dialogue in DIALOGUES
        ]
        pixels = torch.stack(
            [
                torch.from_numpy(model.config.image_transform(photograph(image)))
                if image
                else torch.zeros(3, model.vision.image_size, model.vision.image_size)
                for image, _ in DIALOGUES
            ]
        )
        image_id, count = model.config.image_token_id, model.vision.num_tokens
        expanded = [[x for token in row for x in [token] * (count if token == image_id else 1)] for row in ids]
        stock = processor.tokenizer.pad({"input_ids": expanded}, padding_side=side, return_tensors="pt")
        own = processor.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        has_image = torch.tensor([image is not None for image, _ in DIALOGUES])
        return dict(stock) | {"pixel_values": pixels[has_image]}, dict(own) | {"pixel_values": pixels}

    return make


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_stock_llavas(loaded, batch_of, kind, side):
    stock, _, ours = loaded[kind]
    theirs, own = batch_of(kind, side)
    with torch.no_grad():
        wanted, got = stock(**theirs).logits, ours(**own)
    assert torch.equal(got.attention_mask, theirs["attention_mask"])
    assert 0 < got.attention_mask.sum() < got.attention_mask.numel(), "there is padding"
    kept = got.attention_mask.bool()
    assert got.logits.shape == wanted.shape
    torch.testing.assert_close(got.logits[kept], wanted[kept], atol=1e-4, rtol=0)
    assert wanted[kept].std() > 0.1, "logits that say something"
    own["pixel_values"] = own["pixel_values"].roll(1, 0)
    with torch.no_grad():
        swapped = ours(**own).logits
    assert (swapped[0][kept[0]] - wanted[0][kept[0]]).abs().max() > 0.01, "control: another picture, other logits"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_stock_llavas(loaded, batch_of, kind, side):
    stock, processor, ours = loaded[kind]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }
    theirs, _ = batch_of(kind, "left")  # the only side that stock takes
    _, own = batch_of(kind, side)
    new = stock.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    assert torch.equal(ours.generate(**own, **options), new)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_stock_llavas(loaded, kind):
    _, processor, ours = loaded[kind]
    image_id, count = ours.config.image_token_id, ours.vision.num_tokens
    for image, texts in DIALOGUES:
        for end, is_open in ((None, False), (-1, True)):
            text = processor.apply_chat_template(parts_of(image, texts[:end]), add_generation_prompt=is_open)
            stock = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            turns = turns_of(image, texts[:end])
            own = (
                encode_prompt(ours.tokenizer, turns, "chat")
                if is_open
                else encode(ours.tokenizer, turns, "chat")["input_ids"]
            )
            assert own == stock
    images = np.zeros((ours.vision.image_size, ours.vision.image_size, 3), np.uint8)
    assert processor(images=images, text=IMAGE_TOKEN)["input_ids"][0].count(image_id) == count


PILLOW = {"llama_clip": LlavaImageProcessorPil, "qwen2_siglip": SiglipImageProcessorPil}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_stock_llavas(loaded, sample_images, photograph, kind):
    """To rounding those of the library's Pillow backend; its default, torchvision, is up to a grey level of 255 off."""
    _, processor, ours = loaded[kind]
    transform, levels = ours.config.image_transform, {}
    torchvision = processor.image_processor
    libraries = {"pillow": PILLOW[kind].from_dict(torchvision.to_dict()), "torchvision": torchvision}
    for file in sorted(f for f in sample_images.iterdir() if f.suffix in (".jpg", ".png")):
        image = photograph(file.name)
        for name, library in libraries.items():
            difference = transform(image) - library(image, return_tensors="np")["pixel_values"][0]
            grey = np.abs(difference * np.float32(transform.std)[:, None, None] * 255).max()
            levels[name] = max(levels.get(name, 0), float(grey))
    assert levels["pillow"] < 1e-3
    assert levels["torchvision"] < 1.01


@pytest.mark.parametrize("geometry", ["square", "pad", "squash"])
def test_the_frame_is_the_processors(geometry, photograph):
    side = {"height": 56, "width": 56}
    processor = {
        "square": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=side),
        "pad": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=side, do_pad=True),
        "squash": LlavaImageProcessorPil(size=side, do_center_crop=False, resample=2),
    }[geometry]
    transform = transform_of(processor)
    assert transform.geometry == geometry
    assert transform.interpolation == ("bilinear" if geometry == "squash" else "bicubic")
    for name in ("astronaut.jpg", "bison.jpg"):
        image = photograph(name).crop((0, 0, 401, 222))
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(transform(image), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.0078"),
        ({"size": {"shortest_edge": 64}}, r"size \{'shortest_edge': 64\}, crop \{'height': 56, 'width': 56\}"),
        ({"do_center_crop": False}, "make no picture of ours"),
        ({"size": {"height": 56, "width": 60}, "do_center_crop": False}, "make no picture of ours"),
    ],
)
def test_pictures_that_are_not_ours_are_refused(changes, reason):
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}} | changes
    with pytest.raises(ModelError, match=reason):
        transform_of(LlavaImageProcessorPil(**settings))


def test_what_is_written(checkpoints, loaded):
    _, ours = checkpoints["llama_clip"]
    stock, _, model = loaded["llama_clip"]
    config = model.config
    assert (config.tasks, config.num_task_tokens, config.with_predictors) == ([], 0, False)
    assert (config.select_layer, config.geometry, config.template) == (-2, "square", "chat")
    assert config.text_config.vocab_size == stock.config.text_config.vocab_size > len(model.tokenizer)
    assert config.max_sequence_length == stock.config.text_config.max_position_embeddings
    assert model.llm.generation_config.eos_token_id == stock.generation_config.eos_token_id
    assert model.tokenizer.convert_tokens_to_ids("<|eot_id|>") in model.stop_ids(model.tokenizer)
    names = set(load_file(ours / "model.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"llm", "projector", "vision"}


def test_ties_and_a_projector_without_bias(checkpoints, loaded):
    _, ours = checkpoints["qwen2_siglip"]
    stock, _, model = loaded["qwen2_siglip"]
    assert stock.model.multi_modal_projector.linear_1.bias is None
    assert not model.projector[0].bias.any()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "llm.lm_head.weight" not in load_file(ours / "model.safetensors")
    assert model.vision.num_tokens == 16, "60 pixels are four patches of 14 and a rest"


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "llama_clip",
            {"vision_feature_select_strategy": "full"},
            "'full', and the tower 'clip_vision_model' has 1 tok",
        ),
        ("qwen2_siglip", {"vision_feature_select_strategy": "default"}, "'default', and the tower 'siglip_vision_mod"),
        ("llama_clip", {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ("llama_clip", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; ours is 'gelu'"),
        ("llama_clip", {"image_token_index": 7}, "image_token_index is 7, and <image> has the id 1024"),
        ("llama_clip", {"model_type": "llava_next"}, "holds a 'llava_next' model, not 'llava'"),
    ],
)
def test_what_would_compute_otherwise_is_refused(checkpoints, tmp_path, kind, changes, reason):
    stock, _ = checkpoints[kind]
    for file in stock.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((stock / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason):
        from_llava_hf(tmp_path)


def test_language_models_that_do_more_than_stock_are_refused(llava):
    vision = {"model_type": "clip_vision_model", **llava.module.VISION, "image_size": 28, "patch_size": 14}
    text = llava.module.TEXT | {"vocab_size": 99}
    gemma2 = Gemma2Config(**text, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM scales, caps or shifts its logits"):
        causal_lm(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=gemma2)))
    phi = PhiConfig(**text)
    with pytest.raises(ModelError, match=r"PhiForCausalLM has lm_head\.bias"):
        causal_lm(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=phi)))


def test_weights_that_are_not_there(checkpoints, tmp_path):
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        from_llava_hf("nobody/nothing")
    _, ours = checkpoints["llama_clip"]
    with pytest.raises(ModelError, match="holds a 'olavlm' model"):
        from_llava_hf(ours)


# ---- the template


def test_a_chat_template_that_writes_a_named_one_is_that(tiny, llava):
    llama_3 = TEMPLATES["llama_3"]
    template = llava.module.LLAMA_3_PARTS.replace("{{ bos_token }}", f"{{{{ bos_token }}}}{llama_3.system}")
    tokenizer = load_tokenizer(tiny["llm"])
    tokenizer.chat_template = template
    assert template_of(tokenizer) == ("llama_3", [])
    tokenizer.chat_template = template.replace("polite answers", "short answers")
    assert template_of(tokenizer) == ("chat", [])


def test_a_chat_template_without_ends_gives_way_to_the_tokenizers_own_kind(tiny, llava):
    tokenizer = load_tokenizer(tiny["llm"])
    tokenizer.chat_template = llava.module.LLAVA_1_5
    name, (note,) = template_of(tokenizer)
    assert name == "llama_3", "the tiny tokenizer has Llama-3's tokens"
    assert "no special token after answer 1" in note
    tokenizer.chat_template = None
    assert template_of(tokenizer)[0] == "llama_3"
    tokenizer = load_tokenizer(tiny["llm"])
    tokenizer.chat_template = None
    for token in ("<|eot_id|>",):
        tokenizer = _without(tokenizer, token)
    with pytest.raises(RecipeError, match=r"no chat template; name the prompt template .* --template NAME"):
        template_of(tokenizer)
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    assert template_of(tokenizer)[0] == "vicuna_v1"


def _without(tokenizer, token):
    """The tokenizer with another name for one of its tokens."""
    content = tokenizer.backend_tokenizer.to_str().replace(token, "<|other|>")
    return type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(content), pad_token="<pad>")


def test_a_template_by_name(checkpoints):
    stock, _ = checkpoints["llama_clip"]
    assert from_llava_hf(stock, "llama_3").model.config.template == "llama_3"
    with pytest.raises(RecipeError, match="'llama_4' is unknown"):
        from_llava_hf(stock, "llama_4")


def test_without_an_image_processor_or_rows_for_all_tokens(checkpoints, tmp_path):
    stock, _ = checkpoints["llama_clip"]
    for file in stock.iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    model = LlavaForConditionalGeneration.from_pretrained(stock)
    model.resize_token_embeddings(1000)
    model.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "small" / name).symlink_to(stock / name)
    converted = from_llava_hf(tmp_path / "small")
    assert converted.notes == [
        "images: there is no image processor; clip_vision_model's own mean and std, centre crop",
        "vocabulary: 25 rows more than the checkpoint's 1000, for tokens that have none there",
    ]
    assert converted.model.get_input_embeddings().num_embeddings == 1025
