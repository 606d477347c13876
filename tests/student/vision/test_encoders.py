import importlib.util
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from olavlm.cache import decode_rgb
from olavlm.student.adapter import is_adapter, load_checkpoint, save_adapter
from olavlm.student.data.encoder_features import tower_digest
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.training.trainer import train
from olavlm.student.vision.encoder_name import EncoderName
from olavlm.student.vision.encoders import VisionEncoder, load_image_transform
from olavlm.student.vision.image_transform import ImageTransform
from olavlm.student.vision.tower_configs import OpenClipTowerConfig
from olavlm.teachers import load_teacher

FAMILIES = (
    "siglip", "siglip tower", "dinov2", "dinov2 with registers", "dinov3", "vit", "timm vit", "timm eva02", "timm swin",
    "timm convnext", "open_clip vit", "open_clip convnext",
)  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Names of tiny encoders by family (`encoder_checkpoints.py`, beside this file, which no package holds)."""
    spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("encoder_checkpoints.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(tmp_path_factory.mktemp("encoders"))


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_features_are_the_librarys_hidden_state(tiny, select_layer):
    encoder = VisionEncoder.from_pretrained(tiny["encoder"], select_layer)
    pixels = torch.randn(2, 3, 56, 56)
    expected = CLIPVisionModel.from_pretrained(tiny["encoder"])(pixels, output_hidden_states=True)
    features = encoder(pixels)
    assert torch.equal(features, expected.hidden_states[select_layer][:, 1:])
    assert features.shape == (2, encoder.num_tokens, encoder.width)


def test_is_frozen_and_in_evaluation_mode(tiny):
    encoder = VisionEncoder.from_pretrained(tiny["encoder"]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 56, 56, requires_grad=True)).requires_grad


def test_whole_clip_model_folder(tiny, tmp_path):
    """As openai/clip-vit-large-patch14-336 is published."""
    tower = CLIPVisionModel.from_pretrained(tiny["encoder"])
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    model = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config=text))
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder(pixels), expected)
    assert load_image_transform(tmp_path).size == 56


def test_bad_checkpoints(tiny, tmp_path):
    with pytest.raises(ModelError, match="cannot load a model from '/nowhere/at/all'"):
        VisionEncoder.from_pretrained("/nowhere/at/all")
    config = json.dumps({"model_type": "siglip2_vision_model"})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(
        ModelError, match="'siglip2_vision_model' is no known encoder; choose one of: clip_vision_model"
    ):
        VisionEncoder.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'llama' is no known encoder; choose one of: clip_vision_model"):
        VisionEncoder.from_pretrained(tiny["llm"])
    folder = shutil.copytree(tiny["encoder"], tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("fc1.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of the model, such as .*fc1\.weight"):
        VisionEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="select_layer=-6: the encoder has 4 blocks"):
        VisionEncoder.from_pretrained(tiny["encoder"], select_layer=-6)


ORDINARY = [(56, 56), (200, 90), (61, 133), (20, 31), (3, 48), (48, 3)]
EXTREME = [(1, 21), (21, 1), (1, 40), (3, 61), (101, 3), (4001, 3), (30, 1001), (999, 31)]


@pytest.mark.parametrize("size", ORDINARY + EXTREME)
def test_square_is_clips_own_processing(size):
    image = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    ours = ImageTransform(56)(image)
    assert ours.dtype == np.float32
    assert ours.shape == (3, 56, 56)
    if size in ORDINARY:
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    # Of an extreme one Pillow may resize the other direction first, and clips in between. Noise half a pixel away
    # differs by 0.5.
    assert np.abs(ours - expected).mean() < 0.02


def test_square_by_hand():
    """A picture twice as wide as high, at its final height: the crop is its middle, in RGB, normalised."""
    image = picture(112, 56)
    transform = ImageTransform(56)
    expected = np.asarray(image)[:, 28:84].transpose(2, 0, 1) / 255.0
    expected = (expected - np.reshape(transform.mean, (3, 1, 1))) / np.reshape(transform.std, (3, 1, 1))
    np.testing.assert_allclose(transform(image), expected, atol=1e-5)


def test_16_bits_are_shown_as_a_store_decodes_them():
    samples = np.random.default_rng(0).integers(0, 65536, (56, 56), dtype=np.uint16)
    whole = Image.fromarray(samples)
    whole.save(file := io.BytesIO(), "png")
    expected = ImageTransform(56)(decode_rgb(file.getvalue()))
    big_endian = Image.frombytes("I;16B", (56, 56), samples.astype(">u2").tobytes())
    for image in (whole, big_endian, Image.fromarray(samples.astype(np.int32))):
        np.testing.assert_array_equal(ImageTransform(56)(image), expected, image.mode)
    with pytest.raises(ModelError, match=r"mode 'F'.*scale them to 8 bits"):
        ImageTransform(56)(Image.new("F", (56, 56), 0.5))


def test_pad_by_hand():
    image = picture(56, 28)
    transform = ImageTransform(56, geometry="pad")
    pixels = transform(image)
    fill = (np.array([122, 116, 104]) / 255 - transform.mean) / transform.std
    for rows in (slice(0, 14), slice(42, 56)):
        np.testing.assert_allclose(pixels[:, rows], np.broadcast_to(fill[:, None, None], (3, 14, 56)), atol=1e-5)
    expected = np.asarray(image).transpose(2, 0, 1) / 255.0
    expected = (expected - np.reshape(transform.mean, (3, 1, 1))) / np.reshape(transform.std, (3, 1, 1))
    np.testing.assert_allclose(pixels[:, 14:42], expected, atol=1e-5)


@pytest.mark.parametrize("geometry", ["square", "pad", "squash"])
@pytest.mark.parametrize("size", [(100, 30), (30, 99), (56, 56)])
def test_the_processor_that_is_saved_makes_the_same_pictures(geometry, size, tmp_path):
    transform = ImageTransform(56, geometry=geometry)
    transform.save(tmp_path)
    saved = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(picture(*size), return_tensors="np")
    np.testing.assert_allclose(saved["pixel_values"][0], transform(picture(*size)), atol=1e-5)


def test_transform_of_a_checkpoint(tiny, tmp_path):
    folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.write_text(
        json.dumps({"crop_size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    transform = load_image_transform(folder, "pad")
    assert transform == ImageTransform(56, (0.5,) * 3, (0.25,) * 3, "pad")
    assert pickle.loads(pickle.dumps(transform)) == transform
    transform.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert (saved["image_mean"], saved["crop_size"]) == ([0.5] * 3, {"height": 56, "width": 56})
    preprocessor.write_text(json.dumps({"crop_size": 224}))
    with pytest.raises(ModelError, match="crops to 224, the model takes 56"):
        load_image_transform(folder)
    preprocessor.unlink()
    assert load_image_transform(folder) == ImageTransform(56)


def test_values_of_a_preprocessor(tiny, tmp_path):
    folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
    preprocessor = folder / "preprocessor_config.json"
    names = ("crop_size", "size", "image_mean", "image_std", "resample", "do_normalize")
    preprocessor.write_text(json.dumps(dict.fromkeys(names)))
    assert load_image_transform(folder) == ImageTransform(56), "null counts as absent"
    preprocessor.write_text(json.dumps({"resample": 0, "do_normalize": False}))
    transform = ImageTransform(56, (0.0,) * 3, (1.0,) * 3, interpolation="nearest")
    assert load_image_transform(folder) == transform
    for field, value in (
        ("resample", 9),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("crop_size", "56"),
        ("size", {"shortest_edge": [56]}),
        ("do_normalize", "no"),
        ("do_rescale", 0),
        ("rescale_factor", 0),
        ("rescale_factor", -1 / 255),
        ("rescale_factor", float("nan")),
        ("rescale_factor", "1/255"),
        ("rescale_factor", True),
    ):
        preprocessor.write_text(json.dumps({field: value}))
        with pytest.raises(ModelError) as caught:
            load_image_transform(folder)
        assert str(caught.value).startswith(f"'{folder}', preprocessor_config.json: {field} is {value!r}; ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("rescaling", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"rescale_factor": 1}])
def test_pixels_of_another_range(rescaling, do_normalize, tiny, tmp_path):
    folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
    preprocessor = folder / "preprocessor_config.json"
    default = json.loads(preprocessor.read_text()) | {"do_normalize": do_normalize}
    preprocessor.write_text(json.dumps(default | rescaling))
    image = picture(90, 60)
    expected = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="np")["pixel_values"][0]
    transform = load_image_transform(folder)
    np.testing.assert_allclose(transform(image), expected, rtol=1e-5, atol=1e-4)
    transform.save(tmp_path)
    saved = CLIPImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(saved, expected, rtol=1e-5, atol=1e-4)
    preprocessor.write_text(json.dumps(default))
    plain = load_image_transform(folder)
    preprocessor.write_text(json.dumps(default | {"do_rescale": True, "rescale_factor": 0.00392156862745098}))
    assert load_image_transform(folder) == plain, "to the last bit"


def test_a_processor_saved_by_transformers_5(tiny, tmp_path):
    """It has the image processor in the file of the whole processor, and no file of its own."""
    folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
    square = {"height": 56, "width": 56}
    processor = CLIPImageProcessor(size=square, crop_size=square, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    CLIPProcessor(processor, load_tokenizer(tiny["llm"])).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    shutil.copy(tmp_path / "saved" / "processor_config.json", folder)
    assert load_image_transform(folder) == ImageTransform(56, (0.5,) * 3, (0.25,) * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3}))
    assert load_image_transform(folder) == ImageTransform(56, (0.5,) * 3, (0.25,) * 3), "as transformers reads them"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # of transformers 4
    assert load_image_transform(folder) == ImageTransform(56, (0.1,) * 3)
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"its processor_config\.json is not a JSON object"):
        load_image_transform(folder)


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_as_a_teacher_it_gives_what_it_gives_in_training(names, tiny, family):
    name = str(tiny["encoder"]) if family == "tiny" else names[family]
    pictures = [picture(90, 40), picture(33, 70, seed=1)]
    for geometry in ("square", "pad"):
        transform = load_image_transform(name, geometry)
        pixels = torch.from_numpy(np.stack([transform(image) for image in pictures]))
        teacher = load_teacher("base", model=name, geometry=geometry, device="cpu")
        encoder = VisionEncoder.from_pretrained(name)
        assert torch.equal(teacher.encode(pictures), encoder(pixels))
        assert (teacher.card.tokens, teacher.card.dim, teacher.card.grid) == (
            encoder.num_tokens, encoder.width, encoder.grid
        )  # fmt: skip
        assert teacher.card.geometry == geometry
    rounded = VisionEncoder.from_pretrained(name, dtype=torch.bfloat16).tower
    assert teacher.card.weights_sha256 == tower_digest(rounded)


def test_unknown_geometry():
    with pytest.raises(ValueError, match="geometry='round' must be one of square, pad"):
        ImageTransform(56, geometry="round")


def oracle(name, path):
    """The tower as its own library loads it, and what gives its features of `select_layer` -2."""
    folder = path.partition(":")[2] or path
    if name.startswith("timm"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if name in ("timm convnext", "timm swin"):  # the final norm of these is not part of the last stage
            stages = model.stages if name == "timm convnext" else model.layers
            return lambda pixels: _after(stages[-1], model, pixels, channels_last=name == "timm swin")
        prefix = model.num_prefix_tokens
        return lambda pixels: _after(model.blocks[-2], model, pixels)[:, prefix:]
    if name.startswith("open_clip"):
        visual = open_clip.create_model(f"local-dir:{folder}").visual.eval()
        if name == "open_clip convnext":
            return lambda pixels: _after(visual.trunk.stages[-1], visual, pixels, channels_last=False)
        return lambda pixels: _after(visual.transformer.resblocks[-2], visual, pixels)[:, 1:]
    classes = {
        "dinov2": Dinov2Model,
        "dinov2 with registers": Dinov2WithRegistersModel,
        "dinov3": DINOv3ViTModel,
        "vit": ViTModel,
    }
    model = classes.get(name, SiglipVisionModel).from_pretrained(folder)
    prefix = {"dinov2": 1, "dinov2 with registers": 5, "dinov3": 5, "vit": 1}.get(name, 0)
    return lambda pixels: model(pixels, output_hidden_states=True).hidden_states[-2][:, prefix:]


@torch.no_grad()
def _after(module, model, pixels, channels_last=None):
    kept = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    model(pixels)
    handle.remove()
    states = kept[0]
    if channels_last is None:
        return states
    return states.flatten(1, 2) if channels_last else states.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_librarys_own(names, name):
    encoder = VisionEncoder.from_pretrained(names[name])
    size = load_image_transform(names[name]).size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = encoder(pixels)
    torch.testing.assert_close(features, oracle(name, names[name])(pixels), atol=1e-5, rtol=0)
    assert features.shape == (2, encoder.num_tokens, encoder.width)
    assert encoder.grid[0] * encoder.grid[1] == encoder.num_tokens
    assert not any(parameter.requires_grad for parameter in encoder.train().parameters())
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3", "vit", "timm vit", "timm eva02", "open_clip vit"])
def test_tokens_lie_row_by_row(names, name):
    """A mark in one patch changes, in the first block's patch embedding, that patch's token the most."""
    encoder = VisionEncoder.from_pretrained(names[name], select_layer=1)
    rows, columns = encoder.grid
    patch = encoder.image_size // rows
    blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    marked = blank.clone()
    marked[:, :, patch : 2 * patch, 2 * patch : 3 * patch] = 50
    change = (encoder(marked) - encoder(blank)).norm(dim=-1)[0]
    assert change.argmax() == columns + 2


def test_select_layer(names):
    for name in ("dinov2", "timm vit", "open_clip vit"):
        last, before = (VisionEncoder.from_pretrained(names[name], layer) for layer in (-1, -2))
        pixels = torch.randn(1, 3, last.image_size, last.image_size)
        assert not torch.equal(last(pixels), before(pixels))
        with pytest.raises(RecipeError, match=r"select_layer=-9: the encoder has \d+ blocks; use -\d+ to -1"):
            VisionEncoder.from_pretrained(names[name], -9)
    stages = [VisionEncoder.from_pretrained(names["open_clip convnext"], layer) for layer in (-1, -2)]
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(stages[0](pixels), stages[1](pixels)), "a network of stages ignores it"


@pytest.mark.parametrize("name", FAMILIES)
def test_model_with_each_encoder(names, name, tiny, tokenizer, tmp_path):
    """The adapter of pt leaves the encoder out, the model of ift holds it; both give the same answers again."""
    model = OlaVLM.build(tiny["llm"], names[name], tokenizer, geometry="pad").eval()
    pixels = torch.from_numpy(model.config.image_transform(picture(90, 60)))[None]
    ids = torch.tensor([[5, model.config.image_token_id, 6, 7]])
    expected = model(ids, pixel_values=pixels).logits
    assert expected.shape[1] == 3 + model.vision.num_tokens
    model.save_pretrained(tmp_path / "ift")
    save_adapter(
        tmp_path / "pt", model, tokenizer, llm=str(tiny["llm"]), encoder=names[name],
        config={"geometry": "pad", "num_task_tokens": 8}, recipe_hash="0",
    )  # fmt: skip
    assert is_adapter(tmp_path / "pt")
    assert not [key for key in load_file(tmp_path / "pt" / "adapter.safetensors") if key.startswith("vision.")]
    for folder in ("ift", "pt"):
        loaded, _ = load_checkpoint(tmp_path / folder)
        assert loaded.config.image_transform == model.config.image_transform
        assert loaded.vision.grid == model.vision.grid
        assert torch.equal(loaded.eval()(ids, pixel_values=pixels).logits, expected), folder


def test_buffers_that_no_checkpoint_holds(names, tiny, tokenizer, tmp_path):
    """transformers builds without memory and leaves them empty; rotary and relative positions live in such."""
    for name in ("dinov3", "timm eva02", "timm swin"):
        model = OlaVLM.build(tiny["llm"], names[name], tokenizer)
        model.save_pretrained(tmp_path / name)
        before = dict(model.vision.tower.named_non_persistent_buffers())
        after = dict(OlaVLM.from_pretrained(tmp_path / name).vision.tower.named_non_persistent_buffers())
        assert before.keys() == after.keys() != set()
        assert not any(buffer.isnan().any() for buffer in after.values())
        assert all(torch.equal(buffer, after[key]) for key, buffer in before.items())


def test_convnext_xxlarge_at_the_papers_shapes():
    """CLIP-ConvNeXt-XXL at 768 pixels with Llama-3-8B: 24 x 24 tokens of 3072, a projector of 29.4M."""
    described = open_clip.get_model_config("convnext_xxlarge")
    with torch.device("meta"):
        config = OpenClipTowerConfig(
            architecture="convnext_xxlarge", embed_dim=described["embed_dim"], vision_cfg=described["vision_cfg"]
        )
        encoder = VisionEncoder.from_config(config, image_size=768)
        llm = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32}
        model = OlaVLM(OlaVLMConfig(text_config=llm, vision_config=config, image_size=768))
    assert (encoder.grid, encoder.num_tokens, encoder.width) == ((24, 24), 576, 3072)
    assert sum(parameter.numel() for parameter in model.projector.parameters()) == 29_368_320
    assert isinstance(encoder.tower.network.trunk.norm_pre, torch.nn.Identity), "its features are not normalised"


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation"),
    [
        ("siglip", 48, 0.5, "bicubic"),
        ("siglip tower", 48, 0.5, "bicubic"),
        ("dinov2", 56, 0.485, "bilinear"),
        ("dinov2 with registers", 56, 0.485, "bicubic"),
        ("dinov3", 48, 0.485, "bilinear"),
        ("vit", 48, 0.5, "bilinear"),
        ("timm vit", 160, 0.5, "bicubic"),
        ("open_clip vit", 32, 0.4, "bilinear"),
    ],
)
def test_pictures_are_the_encoders_own(names, name, size, mean, interpolation, tmp_path):
    transform = load_image_transform(names[name], "pad")
    assert (transform.size, transform.mean[0], transform.interpolation) == (size, mean, interpolation)
    image = picture(size, size, seed=1)  # of the final size, so that nothing is resized
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - np.reshape(transform.mean, (3, 1, 1))) / np.reshape(
        transform.std, (3, 1, 1)
    )
    np.testing.assert_allclose(transform(image), expected, atol=1e-5)
    transform.save(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["resample"] == {"bicubic": 3, "bilinear": 2}[interpolation]


def test_interpolation_is_pillows():
    image = picture(112, 112)
    resized = image.resize((56, 56), Image.Resampling.BILINEAR)
    ours = ImageTransform(56, (0,) * 3, (1,) * 3, interpolation="bilinear")(image)
    np.testing.assert_allclose(ours, np.asarray(resized).transpose(2, 0, 1) / 255, atol=1e-6)
    with pytest.raises(ModelError, match="interpolation 'area' is none of Pillow's"):
        ImageTransform(56, interpolation="area")


@pytest.mark.parametrize(
    ("name", "side", "grid"),
    [
        ("siglip", 96, (12, 12)),
        ("dinov2", 84, (6, 6)),
        ("dinov3", 80, (5, 5)),
        ("vit", 96, (12, 12)),
        ("timm vit", 320, (20, 20)),
        ("timm convnext", 256, (8, 8)),
        ("open_clip vit", 64, (8, 8)),
        ("open_clip convnext", 128, (4, 4)),
    ],
)
def test_size_in_the_name(names, name, side, grid):
    encoder = VisionEncoder.from_pretrained(f"{names[name]}-res{side}")
    assert (encoder.image_size, encoder.grid) == (side, grid)
    assert load_image_transform(f"{names[name]}-res{side}").size == side
    assert encoder(torch.randn(1, 3, side, side)).shape == (1, grid[0] * grid[1], encoder.width)


def test_size_that_the_patches_do_not_divide(names):
    for name, side, message in [
        ("siglip", 50, "pictures of 50 pixels: the encoder's patches are 8 wide; use 48"),
        ("open_clip vit", 63, "pictures of 63 pixels: the encoder's patches are 8 wide; use 56"),
        ("timm vit", 170, "pictures of 170 pixels: the encoder's patches are 16 wide; use 160"),
    ]:
        with pytest.raises(RecipeError, match=message):
            VisionEncoder.from_pretrained(f"{names[name]}-res{side}")


def test_weights_beside_a_models_name(names, tmp_path):
    """A file, or a folder, of weights for a model that the library knows by name."""
    folder = names["timm vit"].partition(":")[2]
    pixels = torch.randn(1, 3, 160, 160)
    expected = VisionEncoder.from_pretrained(names["timm vit"])(pixels)
    for place in (folder, f"{folder}/model.safetensors"):
        assert torch.equal(VisionEncoder.from_pretrained(f"timm:test_vit={place}")(pixels), expected)
    with pytest.raises(ModelError, match=r"timm cannot load it \(.*use safetensors of test_convnext"):
        VisionEncoder.from_pretrained(f"timm:test_convnext={folder}/model.safetensors")
    with pytest.raises(ModelError, match=f"says architecture test_vit; use timm:{folder}"):
        VisionEncoder.from_pretrained(f"timm:test_convnext={folder}")
    tower = open_clip.CLIP(512, open_clip.get_model_config("RN50")["vision_cfg"] | {"layers": [1, 1, 1, 1]}, {})
    save_file(tower.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"the weights lack \d+ tensors of the image tower|open_clip cannot load it"):
        VisionEncoder.from_pretrained(f"open_clip:RN50={tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:no_such_vit", r"timm .* has no model 'no_such_vit'; there are "),
        ("timm:vit_tiny_patch16_224.none", "timm has no such weights; there are vit_tiny_patch16_224.augreg_in21k"),
        ("timm:coatnet_0_224", "timm names no weights on the hub; use timm:coatnet_0_224=FILE"),
        ("open_clip:ViT-B-33", r"has no such model; there are ViT-B-32"),
        ("open_clip:ViT-B-32/none", "open_clip has no weights 'none' of ViT-B-32; there are openai"),
        ("open_clip:convnext_xxlarge", "open_clip names no weights for it on the hub"),
        ("timm:vit_tiny_patch16_224=/nowhere.safetensors", "cannot load a model from '/nowhere.safetensors'"),
        ("timm:", "give a name"),
        ("timm:test_vit=", "give a name"),
        ("openai/clip=weights", "MODEL=WEIGHTS is for timm: and open_clip:"),
    ],
)
def test_names_that_mean_nothing(text, message):
    with pytest.raises(ModelError, match=message):
        VisionEncoder.from_pretrained(text)


def test_weights_that_are_not_all_there(names, tmp_path):
    for name, file in [("timm vit", "model.safetensors"), ("open_clip vit", "open_clip_model.safetensors")]:
        library, _, folder = names[name].partition(":")
        copy = Path(shutil.copytree(folder, tmp_path / name.replace(" ", "-")))
        weights = load_file(copy / file)
        lost = next(
            key
            for key in weights
            if key.endswith(("visual.transformer.resblocks.1.attn.in_proj_weight", "1.attn.qkv.weight"))
        )
        save_file({key: value for key, value in weights.items() if key != lost}, copy / file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"Missing key|weights lack 1 tensors"):
            VisionEncoder.from_pretrained(f"{library}:{copy}")
        (copy / file).write_bytes(b"no weights")
        with pytest.raises(ModelError, match=f"{library} cannot load it"):
            VisionEncoder.from_pretrained(f"{library}:{copy}")


def test_parts_of_a_name(tmp_path, monkeypatch):
    parse = EncoderName.parse
    paper = "open_clip:convnext_xxlarge/laion2b_s34b_b82k_augreg_soup"
    assert parse(f"{paper}-res768") == EncoderName(f"{paper}-res768", "open_clip", paper.partition(":")[2], None, 768)
    assert parse("openai/clip-vit-large-patch14-336") == EncoderName(
        "openai/clip-vit-large-patch14-336", "transformers", "openai/clip-vit-large-patch14-336"
    )
    monkeypatch.chdir(tmp_path)
    Path("my-res768").mkdir()
    assert parse("my-res768").side is None, "a folder is called what it is called"
    assert parse("my-res768").absolute() == str(tmp_path / "my-res768")
    Path("w.safetensors").touch()
    assert parse("timm:test_vit-res64=w.safetensors").absolute() == f"timm:test_vit-res64={tmp_path}/w.safetensors"
    assert parse(f"{paper}-res768").absolute() == f"{paper}-res768"


def test_training_on_an_encoder_of_another_library(names, recipe, ift_json, monkeypatch, tmp_path):
    """pt, then ift on top of it, from another folder than the one that the encoder's name is relative to."""
    library, _, folder = names["open_clip convnext"].partition(":")
    monkeypatch.chdir(Path(folder).parent)
    settings = {"model.encoder": f"{library}:{Path(folder).name}-res96", "train.max_steps": 1}
    pt = train(recipe("pt", **settings), "pt", {})
    monkeypatch.chdir(tmp_path)
    settings |= {"model.encoder": f"{library}:{folder}-res96", "init.from": pt, "data.file": ift_json}
    ift = train(recipe("ift", **settings), "ift", {})
    model, _ = load_checkpoint(ift)
    assert (model.vision.image_size, model.vision.grid, model.config.geometry) == (96, (3, 3), "pad")
    tower = VisionEncoder.from_pretrained(names["open_clip convnext"]).state_dict()
    assert all(torch.equal(value, tower[key]) for key, value in model.vision.state_dict().items()), "it stays frozen"
