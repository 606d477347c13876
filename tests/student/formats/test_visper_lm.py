"""The authors' published checkpoints: the same logits and predictions as a model of theirs, or a refusal that says why.

What a model of theirs computes is `visper_checkpoints.py`, which shares nothing with ours.
"""

import json
import math
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

from olavlm.pipelines import export
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.formats.visper_lm import from_visper_lm
from olavlm.student.formats.visper_lm_config import read_config
from olavlm.student.formats.visper_lm_names import release_name
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import encode

KINDS = ("ola_llama", "llava_llama", "ola_phi3", "llava_phi3")
TURNS = [{"from": "human", "value": "<image>\nWhat is on the table?"}, {"from": "gpt", "value": "Two blue cups."}]


@pytest.fixture(scope="module")
def published(visper):
    return {kind: visper(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def converted(published):
    return {kind: from_visper_lm(published[kind].folder) for kind in KINDS}


@pytest.fixture
def altered(published, visper, tmp_path):
    """altered(kind, tensors=..., **fields) -> the checkpoint with other tensors, which a function changes in place, or
    other fields of its config."""

    def make(kind, tensors=None, **fields):
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(published[kind].folder, folder)
        if tensors is not None:
            content = visper.module.tensors_of(published[kind])
            tensors(content)
            visper.module.save(folder, content)
        visper.module.write_config(folder, json.loads((folder / "config.json").read_text()) | fields)
        return folder

    return make


@pytest.fixture
def sample():
    """sample(model) -> (ids, those ahead of the image, those behind it, pixels)."""

    def make(model):
        ids = torch.tensor(encode(model.tokenizer, TURNS, model.config.template)["input_ids"])
        (at,) = (ids == model.config.image_token_id).nonzero()[0].tolist()
        pixels = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(3))
        return ids, ids[:at], ids[at + 1 :], pixels

    return make


@torch.no_grad()
def run(model, ids, pixels):
    return model(ids[None], pixel_values=pixels[None])


# ---- the same numbers


@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
def test_the_heads_of_the_test_are_the_originals(golden_predictor, visper, task):
    """`golden/predictor.npz` was made by the original modules: it ties the test's own predictors to them."""
    arrays = {k.split("/")[1]: torch.from_numpy(golden_predictor[k]) for k in golden_predictor if k.startswith(task)}
    keys, queries, expected = (arrays.pop(name) for name in ("keys", "queries", "expected"))
    width, llm_width = arrays["in.weight"].shape
    head = visper.module.Projector(llm_width, width, *expected.shape[1:])
    names = {
        "in": "proj_in", "out": "proj_out", "out_norm": "norm_out", "key_norm": "layers.0.0.norm1",
        "query_norm": "layers.0.0.norm2", "q": "layers.0.0.to_q", "kv": "layers.0.0.to_kv",
        "attn_out": "layers.0.0.to_out", "ff_norm": "layers.0.1.0", "ff1": "layers.0.1.1", "ff2": "layers.0.1.3",
    }  # fmt: skip
    head.load_state_dict({f"{names[n.partition('.')[0]]}.{n.partition('.')[2]}": a for n, a in arrays.items()})
    with torch.no_grad():
        torch.testing.assert_close(head(keys, queries), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_predictions_are_theirs(published, converted, visper, sample, kind, tmp_path):
    model = converted[kind].model
    ids, before, after, pixels = sample(model)
    logits, predictions = published[kind].forward(before, after, pixels)
    got = run(model, ids, pixels)
    torch.testing.assert_close(got.logits[0, :, : logits.shape[1]], logits, atol=1e-5, rtol=0)
    assert logits.std() > 0.5, "logits that say something"
    wanted = {f"{t}/{n}" for t, layers in visper.module.LAYERS.items() for n in layers} if "ola" in kind else set()
    assert set(got.predictions) == set(predictions) == wanted
    for name, prediction in predictions.items():
        torch.testing.assert_close(got.predictions[name], prediction, atol=1e-5, rtol=0)
    other, _ = published[kind].forward(before, after, pixels.flip(1))
    assert (other - logits).abs().max() > 0.1, "control: another picture, other logits"
    model.save_pretrained(tmp_path)
    again, state = OlaVLM.from_pretrained(tmp_path).eval(), model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(run(again, ids, pixels).logits, got.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("image_seg_heads.0.projector.layers.0.0.norm1.weight", "image_seg_heads.0.projector.layers.0.0.norm2.weight"),
        ("image_gen_heads.0.projector.proj_in.weight", "image_gen_heads.1.projector.proj_in.weight"),
        ("model.special_depth_tokens", "model.special_seg_tokens"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
         "model.vision_tower.vision_tower.vision_model.encoder.layers.1.layer_norm1.weight"),
    ],
)  # fmt: skip
def test_two_tensors_exchanged_show(published, altered, sample, one, other):
    """Control: of each part, a wrong name would have been found by the test above."""

    def exchange(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    model = from_visper_lm(altered("ola_llama", exchange)).model
    ids, before, after, pixels = sample(model)
    _, predictions = published["ola_llama"].forward(before, after, pixels)
    got = run(model, ids, pixels).predictions
    assert max((got[name] - prediction).abs().max() for name, prediction in predictions.items()) > 0.05


def test_what_is_read(converted, published, visper):
    model = converted["ola_llama"].model
    config = model.config
    said = visper.module
    assert [task.name for task in model.tasks] == ["gen", "depth", "seg"]
    for task in model.tasks:
        assert (task.layers, task.weight) == (said.LAYERS[task.name], said.WEIGHT[task.name])
        assert (task.tokens, task.dim) == said.SHAPE[task.name]
        assert torch.equal(model.logit_scales[task.name], torch.tensor(1.5 + len(task.name)))
        assert torch.equal(model.task_tokens.query[task.name], published["ola_llama"].special[task.name])
    assert (config.num_task_tokens, config.gen_query, config.key_blocks, config.include_answer) == (
        said.N, "contextual", "sys+img+t+txt", True,
    )  # fmt: skip
    assert (config.template, config.geometry, config.select_layer) == ("llama_3", "square", -2)
    assert (config.image_size, config.max_sequence_length) == (56, 2048)
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert not hasattr(config.text_config, "mm_projector_type")
    assert config.text_config.model_type == "llama"
    finetuned = converted["llava_phi3"].model.config
    assert (finetuned.template, finetuned.geometry, finetuned.with_predictors) == ("phi_3", "pad", False)
    assert (len(finetuned.tasks), finetuned.num_task_tokens) == (3, said.N)
    assert (finetuned.text_config.model_type, finetuned.text_config.rope_parameters["rope_theta"]) == ("phi3", 1e4)


def test_vocabulary(converted, published):
    """`<image>` is a token here: a row more for Llama-3, whose `<pad>` was added by them; a spare one for Phi-3."""
    for kind, added in (("llava_llama", 1), ("llava_phi3", 0)):
        model, theirs = converted[kind].model, published[kind].llm.get_input_embeddings().weight
        ours = model.get_input_embeddings().weight
        assert len(ours) == len(theirs) + added == model.config.text_config.vocab_size
        assert torch.equal(ours[: len(theirs)], theirs)
        assert model.config.image_token_id < len(ours)
        assert any(note.startswith("vocabulary: 1 rows more") for note in converted[kind].notes) == bool(added)
    assert converted["ola_llama"].model.tokenizer.pad_token == "<pad>"


def test_notes(converted, altered):
    first, *rest = converted["ola_phi3"].notes
    assert first == "teachers: 4 tensors of da_v2_head, dav2_backbone, oneformer, pipe are left out"
    assert [note.partition(":")[0] for note in rest] == ["depth", "keys"]
    assert converted["llava_phi3"].notes == []
    assert "contrastive loss: its weight was 0.1 (losses.contrastive_weight)" in (
        from_visper_lm(altered("ola_phi3", contrastive_loss_weight=0.1)).notes
    )


def test_a_note_on_tokens_that_the_public_code_does_not_pool(altered):
    (note,) = from_visper_lm(altered("llava_phi3", task_token_format="emb")).notes
    assert "inserts every query of depth and seg in a llava_phi3 model; here it is their 4 means" in note


def test_in_the_dtype_of_the_checkpoint(visper, sample):
    made = visper("ola_llama", dtype=torch.bfloat16)
    model = from_visper_lm(made.folder).model
    assert (model.llm.dtype, model.vision.tower.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.projector[0].weight.dtype == torch.float32
    state = model.state_dict()
    assert torch.equal(state["llm.model.norm.weight"].float(), made.llm.model.norm.weight)
    attention = made.heads["depth"][1].projector.layers[0][0]
    assert torch.equal(state["predictors.depth_5.kv.weight"], attention.to_kv.weight)
    ids, before, after, pixels = sample(model)
    logits, _ = made.forward(before, after, pixels)
    got = run(model.float(), ids, pixels).logits[0, :, : logits.shape[1]]
    torch.testing.assert_close(got, logits, atol=1e-4, rtol=0)


# ---- what differs between checkpoints


@pytest.mark.parametrize("model_type", ["llava_llama", "llama", "visper"])
def test_whether_there_are_predictors_the_tensors_say(altered, converted, model_type):
    fields = {"model_type": model_type, "architectures": ["OlaLlavaLlamaForCausalLM"]}
    model = from_visper_lm(altered("ola_llama", **fields)).model
    wanted = converted["ola_llama"].model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert len(model.predictors) == 6


def test_what_a_config_need_not_say(altered, converted, visper):
    """REFERENCE names the fields; null and what is not there are the public code's defaults."""
    absent = dict.fromkeys(("depth", "dim_head", "num_heads", "ff_mult"))
    changes = {f"image_{task}": visper.module.settings_of(task) | absent for task in visper.module.ORDER}
    gone = dict.fromkeys(("aux_mode", "mm_projector_type"), visper.module.ABSENT)
    config = from_visper_lm(altered("ola_llama", **changes, **gone, image_aspect_ratio=None)).model.config.to_dict()
    wanted = converted["ola_llama"].model.config.to_dict()  # which another test may have saved
    for name in ("tasks", "num_task_tokens", "geometry", "with_predictors"):
        assert config[name] == wanted[name], name


def test_a_finetuned_model_needs_no_layers(altered, visper):
    name = visper.module.PREFIX["seg"] + "_layer_indices"
    settings = visper.module.settings_of("seg") | {name: None}
    assert from_visper_lm(altered("llava_llama", image_seg=settings)).model.tasks[2].layers == ()
    with pytest.raises(ModelError, match=r"image_seg\.seg_layer_indices None; it must be the layers"):
        from_visper_lm(altered("ola_llama", image_seg=settings))


def test_a_pretrained_model_without_heads(altered):
    def drop(tensors):
        for name in [name for name in tensors if "_heads." in name or "logit_scale" in name]:
            del tensors[name]

    found = from_visper_lm(altered("ola_phi3", drop))
    assert not found.model.config.with_predictors
    assert "predictors: the checkpoint holds none" in found.notes


def mlps(tensors):
    for head in range(2):
        for mlp in (1, 2, 3):
            for layer in (0, 2):
                name = f"image_depth_heads.{head}.linear_{mlp}.{layer}"
                tensors |= {f"{name}.weight": torch.eye(24), f"{name}.bias": torch.zeros(24)}


@pytest.mark.parametrize("said", [True, None])
def test_intermediate_depth(visper, altered, said):
    """Trained behind MLPs that ours has not, the predictions would not be depth's."""
    settings = visper.module.settings_of("depth") | {"use_intermediate_depth": said}
    found = from_visper_lm(altered("ola_llama", mlps, image_depth=settings))
    assert {name.partition("_")[0] for name in found.model.predictors} == {"gen", "seg"}
    assert [task.name for task in found.model.tasks] == ["gen", "depth", "seg"]
    assert any(note.startswith("depth: its predictors are left out") for note in found.notes)
    assert set(found.model.logit_scales) == {"gen", "seg"}


def test_mlps_that_the_config_denies(altered):
    with pytest.raises(ModelError, match=r"nothing here takes 24 tensors \(image_depth_heads\.0\.linear_1\.0\.bias"):
        from_visper_lm(altered("ola_llama", mlps))


def test_without_contrastive_loss(altered):
    def drop(tensors):
        for task in ("gen", "depth", "seg"):
            del tensors[f"{task}_logit_scale"]

    found = from_visper_lm(altered("ola_llama", drop, use_contrastive=False, pass_text_to_aux=False))
    assert all(scale.item() == 2 for scale in found.model.logit_scales.values())
    assert found.model.config.key_blocks == "sys+img+t"
    assert any(note.startswith("contrastive loss: off") for note in found.notes)


def test_a_baseline_without_tasks(altered, visper):
    def drop(tensors):
        for task in ("gen", "depth", "seg"):
            del tensors[f"model.special_{task}_tokens"]

    absent = {name: visper.module.ABSENT for name in ("num_task_tokens", "aux_mode", "image_gen", "image_depth")}
    model = from_visper_lm(altered("llava_llama", drop, **absent)).model
    assert (model.tasks, model.config.num_task_tokens) == ((), 0)


def test_the_order_of_tasks_is_aux_mode(altered, published, sample):
    model = from_visper_lm(altered("llava_llama", aux_mode="seg-gen-depth")).model
    assert [task.name for task in model.tasks] == ["seg", "gen", "depth"]
    special = published["llava_llama"].special
    wanted = torch.cat([special["seg"].view(4, 4, -1).mean(1), special["gen"], special["depth"].view(4, 4, -1).mean(1)])
    torch.testing.assert_close(model.task_tokens(), wanted)


# ---- vision towers


def test_names_of_clip_as_transformers_5_saves_them(altered, converted):
    def rename(tensors):
        for name in [name for name in tensors if ".vision_model." in name]:
            tensors[name.replace(".vision_model.", ".")] = tensors.pop(name)

    state = from_visper_lm(altered("llava_llama", rename)).model.vision.state_dict()
    wanted = converted["llava_llama"].model.vision.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def without_tower(tensors):
    for name in [name for name in tensors if "vision_tower" in name]:
        del tensors[name]


def test_a_tower_that_is_elsewhere(altered, published, tiny, sample):
    folder = altered("llava_llama", without_tower, mm_vision_tower="/authors/clip-of-theirs")
    with pytest.raises(
        ModelError, match=r"'/authors/clip-of-theirs': .*say where the vision tower lies: --encoder NAME"
    ):
        from_visper_lm(folder)
    found = from_visper_lm(folder, encoder=str(tiny["encoder"]))
    assert found.notes[:2] == [
        f"vision tower: {tiny['encoder']}, for the checkpoint's /authors/clip-of-theirs",
        f"vision tower: the checkpoint holds no weights of it; those of {tiny['encoder']}",
    ]
    tower = OlaVLM.build(tiny["llm"], tiny["encoder"], found.model.tokenizer).vision.tower
    assert all(a.equal(b) for a, b in zip(found.model.vision.tower.parameters(), tower.parameters(), strict=True))


def test_an_encoder_of_another_kind_does_not_fit(altered, tiny, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny["encoder"], encoder)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"it lacks 16 tensors \(model\.vision_tower\.vision_tower\.vision_model\.enc"):
        from_visper_lm(altered("llava_llama"), encoder=str(encoder))


def test_convnext(altered, sample, tmp_path):
    """The trunk of an open_clip tower, saved without what is behind the features."""
    vision = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    text = {"layers": 1, "width": 16, "heads": 1, "vocab_size": 9, "context_length": 4}
    torch.manual_seed(4)
    clip, finetuned = (open_clip.CLIP(24, vision, text).eval() for _ in range(2))
    encoder = tmp_path / "CLIP-tiny"
    encoder.mkdir()
    save_file(clip.state_dict(), encoder / "open_clip_model.safetensors")
    described = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (encoder / "open_clip_config.json").write_text(json.dumps(described))
    trunk = finetuned.visual.trunk
    kept = dict(trunk.state_dict())
    assert "head.norm.weight" in kept, "behind the features, and all the same in theirs"
    projector = torch.nn.Linear(trunk.num_features, 64)

    def change(tensors):
        without_tower(tensors)
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in kept.items()}
        tensors |= {
            "model.mm_projector.0.weight": projector.weight.data,
            "model.mm_projector.0.bias": projector.bias.data,
        }

    folder = altered("llava_llama", change, mm_vision_tower="laion/CLIP-tiny-res96")
    model = from_visper_lm(folder, encoder=f"open_clip:{encoder}-res96").model
    assert model.vision.grid == (3, 3)
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        wanted = trunk.stages(trunk.stem(pixels)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.vision(pixels), wanted, atol=1e-5, rtol=0)
        ids, *_ = sample(model)
        assert model(ids[None], pixel_values=pixels).logits.isfinite().all()
    assert model.projector[0].weight.equal(projector.weight)
    kept["stem.more"] = kept.pop("stem.0.bias")
    shutil.rmtree(folder)
    with pytest.raises(
        ModelError,
        match=r"lacks 1 tensor \(.*tower\.stem\.0\.bias\); nothing here takes 1 tensor \(.*tower\.stem\.more\)",
    ):
        from_visper_lm(altered("llava_llama", change), encoder=f"open_clip:{encoder}-res96")


@pytest.mark.parametrize(
    ("tower", "encoder"),
    [
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("/mnt/models/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768",
         "open_clip:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768"),
        ("CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res512",
         "open_clip:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res512"),
        ("CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
         "open_clip:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768"),
        ("someone/my-clip-vit", "someone/my-clip-vit"),
    ],
)  # fmt: skip
def test_names_of_towers(altered, tower, encoder):
    assert read_config(altered("llava_phi3", mm_vision_tower=tower)).encoder() == encoder


def test_a_tower_in_a_folder_of_that_name(altered, tmp_path):
    folder = tmp_path / "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"
    folder.mkdir()
    release = read_config(altered("llava_phi3", mm_vision_tower=f"{folder}-res768"))
    assert release.encoder() == f"open_clip:{folder}-res768"


# ---- the real sizes


def test_sizes_of_the_paper(altered, visper):
    """Llama-3-8B and CLIP-ViT-L/14-336 without memory; the parameters of a predictor are those of test_predictor.py."""
    shapes = {"gen": (1, 1024, "12-20"), "depth": (576, 1024, "8-20"), "seg": (576, 1536, "10-18")}
    fields = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128257, "num_task_tokens": 8, "pass_text_to_aux": True}
    for task, (tokens, dim, layers) in shapes.items():
        prefix = visper.module.PREFIX[task]
        changes = {"num_tokens": tokens, "output_dim": dim, f"{prefix}_layer_indices": layers}
        fields[f"image_{task}"] = visper.module.settings_of(task) | changes
    release = read_config(altered("ola_llama", **fields))
    vit = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vit = CLIPVisionConfig(**vit, image_size=336, patch_size=14)
    config = OlaVLMConfig(
        text_config=release.text_config, vision_config=vit, tasks=list(release.tasks), num_task_tokens=8
    )
    with torch.device("meta"):
        model = OlaVLM(config)
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert count["predictors"] == 2 * (7_874_560 + 14_171_136 + 56_654_848) == 157_401_088
    assert count["task_tokens"] == 4_751_360
    assert count["projector"] == 20_979_712
    assert count["logit_scales"] == 3
    assert model.num_image_tokens == 576
    names = [release_name(name, release.tasks) for name in model.state_dict()]
    assert len(set(names)) == len(names)
    assert "image_depth_heads.1.projector.layers.0.1.3.weight" in names
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.23.mlp.fc2.bias" in names


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("image_seg_heads.1.projector.proj_out.bias"),
         r"it lacks 1 tensor \(image_seg_heads\.1\.projector\.proj_out\.bias\)"),
        (lambda t: t.pop("gen_logit_scale"), r"it lacks 1 tensor \(gen_logit_scale\)"),
        (lambda t: t.pop("model.special_gen_tokens"), r"it lacks 1 tensor \(model\.special_gen_tokens\)"),
        (lambda t: t.pop("model.mm_projector.2.bias"), r"it lacks 1 tensor \(model\.mm_projector\.2\.bias\)"),
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), r"it lacks 1 tensor \(model\.layers\.3\.mlp\.up"),
        (lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
         r"it lacks 25 tensors \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)"),
        (lambda t: t.update({"image_gen_heads.2.projector.proj_in.bias": torch.ones(32)}),
         r"nothing here takes 1 tensor \(image_gen_heads\.2\.projector\.proj_in\.bias\)"),
        (lambda t: t.update({"model.image_newline": torch.ones(64)}), r"nothing here takes 1 tensor \(model\.image_"),
        (lambda t: t.update({"model.special_depth_tokens": torch.ones(8, 64)}),
         r"1 tensor \(model\.special_depth_tokens\): model\.special_depth_tokens is \[8, 64\], and \[16, 64\] by"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(altered, change, reason):
    with pytest.raises(ModelError, match=reason) as refused:
        from_visper_lm(altered("ola_llama", change))
    assert "\n" not in str(refused.value)


def test_what_older_libraries_saved_is_passed_over(altered):
    def more(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    assert from_visper_lm(altered("llava_llama", more)).model is not None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"model_type": "qwen2", "architectures": None},
            "holds a 'qwen2' model; model types of VisPer-LM end with llama or phi3",
        ),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu'; ours is 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'; ours is 'patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'; ours is 'flat'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True; ours is False"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'; ours is 'square' or 'pad'"),
        ({"task_token_format": "text"}, "task_token_format 'text'; ours is 'emb' or 'expand_emb'"),
        ({"mm_vision_tower": None}, "mm_vision_tower None; it must be text"),
        ({"num_task_tokens": "8"}, "num_task_tokens '8'; it must be a number"),
        ({"num_task_tokens": math.nan}, "num_task_tokens nan; it must be a number"),
        ({"num_attention_heads": 0}, r"its config cannot be used \(\w+: "),
        ({"rms_norm_eps": "1e-5"}, r"its config cannot be used \(StrictDataclass\w+: "),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]; it must be text"),
        ({"model_type": "qwen2", "architectures": 5}, "holds a 'qwen2' model"),
        ({"num_task_tokens": 3}, "16 teacher tokens are not divisible into num_task_tokens=3 groups"),
        ({"aux_mode": "gen-depth-pose"}, "aux_mode 'gen-depth-pose'; 'pose' is none of gen, depth, seg"),
        ({"aux_mode": "gen-gen"}, "aux_mode 'gen-gen'; each task may occur once"),
        ({"image_depth": [1]}, r"image_depth \[1\]; it must hold the settings of a predictor"),
        ({"image_depth": None}, "image_depth None; it must hold the settings of a predictor"),
    ],
)
def test_fields_that_cannot_be(altered, fields, reason):
    with pytest.raises(ModelError, match=reason):
        from_visper_lm(altered("ola_llama", **fields))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 8}, "image_seg.num_heads 8; ours is 4"),
        ({"depth": 2}, "image_seg.depth 2; ours is 1"),
        ({"num_tokens": 1}, "image_seg.num_tokens 1; gen has 1, depth and seg have more"),
        ({"seg_layer_indices": "10,18"}, "image_seg.seg_layer_indices '10,18'; it must be layers counted from 1"),
        ({"seg_layer_indices": "2-2"}, r"task seg: layers=\[2, 2\] must be distinct"),
        ({"seg_layer_indices": "2-7"}, "task seg: layer 7 of an LLM of 6 blocks"),
        ({"output_dim": None}, "image_seg.output_dim None; it must be a number"),
    ],
)
def test_settings_of_predictors_that_cannot_be(visper, altered, changes, reason):
    with pytest.raises(ModelError, match=reason):
        from_visper_lm(altered("ola_llama", image_seg=visper.module.settings_of("seg") | changes))


def test_files_that_are_not_there(altered, published, tmp_path):
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        from_visper_lm("nobody/nothing")
    folder = altered("llava_llama")
    for file in folder.glob("model*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(ModelError, match=r"has no model\.safetensors$"):
        from_visper_lm(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"but pytorch_model\.bin, and pickles are not read: save it as safetensors"):
        from_visper_lm(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is damaged: KeyError\('weight_map'\)"):
        from_visper_lm(folder)
    (tmp_path / index.name).rename(index)
    with pytest.raises(ModelError, match=r"has no model-00001-of-00002\.safetensors"):
        from_visper_lm(folder)
    for file in tmp_path.glob("model-*"):
        file.rename(folder / file.name)
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)
    with pytest.raises(
        ModelError, match=r"model-00002-of-00002\.safetensors lacks .*, which model\.safetensors\.index"
    ):
        from_visper_lm(folder)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load a model from"):
        from_visper_lm(folder)


# ---- templates


def test_templates(altered, published):
    folder = altered("llava_llama")
    assert from_visper_lm(folder, "plain").model.config.template == "plain"
    with pytest.raises(RecipeError, match="'llama_4' is unknown"):
        from_visper_lm(folder, "llama_4")


def test_a_tokenizer_that_does_not_tell(altered, tiny):
    folder = altered("llava_phi3")
    for file in tiny["llm"].glob("*token*"):
        shutil.copy(file, folder)
    with pytest.raises(RecipeError, match=r"no token that ends an answer of phi_3; name .* --template NAME"):
        from_visper_lm(folder)


@pytest.mark.parametrize("model_type", [*KINDS, "llama"])
def test_the_command_knows_their_kinds(altered, model_type):
    assert export.kind_of(str(altered("llava_llama", model_type=model_type))) == "visper-lm"
    assert LlamaConfig.model_type not in export.KINDS
