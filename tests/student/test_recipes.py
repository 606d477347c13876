"""Shipped recipes: the rows of the paper's tables at tiny size, folders by name, and chains of stages."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from olavlm.pipelines.recipe_list import list_recipes
from olavlm.student.errors import RecipeError
from olavlm.student.recipes import load_chain, load_recipe, shipped_recipes, table_rows
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train
from olavlm.student.vision.encoders import load_encoder_config, load_image_transform

SIZES = {
    "table1": 16, "table2": 4, "table3": 6, "table4": 3, "table5": 6, "table6": 2, "table7": 2,
    "tableI": 3, "tableII": 7, "tableIII": 6, "tableIV": 5, "tableV": 2, "figure3": 2, "figure5": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def deep_llms(tiny, tmp_path_factory):
    """By template: a narrow LLM with 20 blocks, so that the paper's layers exist, and the template's own tokens."""
    folders = {}
    for template, tokens in {"llama_3": [], "phi_3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]}.items():
        tokenizer = load_tokenizer(tiny["llm"])
        tokenizer.add_tokens(tokens, special_tokens=True)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=20,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        folders[template] = tmp_path_factory.mktemp(template)
        LlamaForCausalLM(config).save_pretrained(folders[template])
        tokenizer.save_pretrained(folders[template])
    return folders


@pytest.fixture(scope="module")
def two_samples(pt_json, ift_json, tmp_path_factory):
    """By stage: a file of two samples; those of ift are over images of pt's, so that one store serves both."""
    captions, dialogues = (json.loads(file.read_text()) for file in (pt_json, ift_json))
    known = {sample["image"] for sample in captions}
    folder, parts = tmp_path_factory.mktemp("two"), {"pt": captions[:2], "vpt": captions[2:4]}
    parts["ift"] = [next(s for s in dialogues if s.get("image") in known), dialogues[-1]]
    for stage, samples in parts.items():
        (folder / f"{stage}.json").write_text(json.dumps(samples))
    return {stage: folder / f"{stage}.json" for stage in parts}


def test_the_tables_are_complete():
    sizes = {}
    for name in table_rows():
        sizes[name.partition("/")[0]] = sizes.get(name.partition("/")[0], 0) + 1
    assert sizes == SIZES
    assert table_rows().keys() < shipped_recipes().keys()
    listed = [line.split()[0] for line in list_recipes().splitlines() if line]
    assert set(shipped_recipes()) <= set(listed)


@pytest.fixture(scope="module")
def train_row(deep_llms, two_samples, tiny, small_targets, store32, sample_images, tmp_path_factory):
    """train_row(name, stage, start) -> the recipe and its metrics, of a run that rows with an equal recipe share.

    The recipe is as it is shipped, but for names of models, data and folders, and for what makes it slow.
    """
    words = {
        "model.encoder": tiny["encoder"],
        "model.dtype": "float32",
        "data.images": sample_images,
        "data.workers": 0,
        "train.mixed_precision": "no",
        "train.gradient_checkpointing": False,
        "train.batch_size": 2,
        "train.max_steps": 2,
        "train.stages": "[pt, vpt, ift]",
    }
    folder, done = tmp_path_factory.mktemp("rows"), {}

    def train_once(name, stage, start):
        llm = deep_llms["phi_3" if table_rows()[name].base.startswith("phi3") else "llama_3"]
        on_a_grid = "concat" in name or name in ("table5/n12", "table5/n24")  # of which 12 and 24 are divisors
        targets = store32 if on_a_grid else small_targets
        own = {"model.llm": llm, "data.file": two_samples[stage], "init.from": start or "null"}
        own["targets.store"] = targets
        recipe = load_recipe(name, [f"--{key}={value}" for key, value in {**words, **own}.items()], stage)
        key = f"{stage}-{recipe.hash()[:16]}"
        recipe.train.output_dir = str(folder / key)
        if key not in done:
            done[key] = read_metrics(train(recipe, stage, {"test": "1"}) / "metrics.jsonl")
        return recipe, done[key]

    return train_once


@pytest.mark.parametrize("name", table_rows())
def test_a_row_trains_two_steps_at_tiny_size(name, train_row):
    stages = table_rows()[name].overrides.get("train", {}).get("stages", ["pt", "ift"])
    if name.partition("/")[0] not in ("table2", "table4", "table6", "figure3"):
        stages = ["pt"]  # what rows differ by shows there
    start = None
    for stage in stages:
        recipe, metrics = train_row(name, stage, start)
        start = recipe.train.output_dir
        assert [line["step"] for line in metrics] == [1, 2]
        expected = {
            f"loss/{task}/{layer}/{term}"
            for task, settings in recipe.tasks.items()
            for layer in settings.layers
            for term in ("smooth_l1", "contrastive")
            if stage in recipe.losses.stages
        }
        assert {key for key in metrics[0] if key.startswith("loss/")} == expected | {"loss/text", "loss/total"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("table2/pt-vpt-ift", {"train.stages": ["pt", "vpt", "ift"]}),
        ("table3/16.18.20-all", {"tasks.gen.layers": [16, 18, 20]}),
        ("table4/tokens-only", {"losses.stages": [], "model.num_task_tokens": 8}),
        ("table5/n0", {"model.num_task_tokens": 0}),
        ("table6/learnable", {"train.freeze_tokens": False}),
        ("table7/558k-663k", {"data.images": ["LLaVA-Pretrain/images.zip", "allava"]}),
        ("tableI/img-t", {"model.key_blocks": "img+t", "tasks.depth.layers": [8, 20]}),
        ("tableII/seg", {"task_order": ["seg"]}),
        ("tableIII/s-d-g", {"task_order": ["seg", "depth", "gen"]}),
        ("tableIV/w0.75", {"tasks.seg.weight": 0.75, "tasks.seg.layers": [10, 18]}),
        ("tableV/without", {"losses.contrastive": False, "losses.contrastive_weight": 0.3}),
        ("table1/convnext-phi3", {"model.template": "phi_3"}),
        ("table1/vit-llama3-llava", {"task_order": [], "losses.stages": []}),
        ("table1/vit-llama3-token-concat", {"model.fusion": "token_concat", "task_order": ["gen", "depth", "seg"]}),
    ],
)
def test_a_row_is_its_base_with_one_thing_changed(name, values):
    recipe = load_recipe(name, [], "pt")
    for key, value in values.items():
        found = recipe
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value, key


@pytest.mark.parametrize("name", ["llama3-8b-convnext", "phi3-mini-convnext"])
def test_the_convnext_is_asked_for_at_768_pixels(name):
    encoder = load_recipe(name, [], "pt").model.encoder
    assert load_image_transform(encoder).size == 768
    assert load_encoder_config(encoder).architecture == "convnext_xxlarge"


def test_folders_are_named_by_recipe_and_stage(tmp_path):
    assert load_recipe("table5/n4", [], "pt").train.output_dir == "runs/table5/n4/pt"
    assert load_recipe("table5/n4", [], "ift").init.from_ == "runs/table5/n4/pt"
    assert load_recipe("table2/pt-vpt-ift", [], "ift").init.from_ == "runs/table2/pt-vpt-ift/vpt"
    assert load_recipe("llama3-8b-clip-l", [], "vpt").init.from_ == "runs/llama3-8b-clip-l/pt"
    (tmp_path / "mine.yaml").write_text("base: tiny\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), [], "pt").train.output_dir == "runs/mine/pt"
    with pytest.raises(RecipeError, match=r"init\.from is .*previous.*, and no stage of train\.stages is ahead of ift"):
        load_recipe("tiny", ["--train.stages=[ift]"], "ift")


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        ([], {"pt": "runs/tiny/pt", "ift": "runs/tiny/ift"}),
        (["--train.output_dir=out"], {"pt": "out/pt", "ift": "out/ift"}),
        (["--train.output_dir=out/{stage}/1"], {"pt": "out/pt/1", "ift": "out/ift/1"}),
        (["--train.output_dir=out", "--stages.pt.train.output_dir=first"], {"pt": "first", "ift": "out/ift"}),
        (["--train.stages=[pt, vpt, ift]"], {"pt": "runs/tiny/pt", "vpt": "runs/tiny/vpt", "ift": "runs/tiny/ift"}),
    ],
)
def test_a_chain_has_a_folder_for_each_stage_and_starts_from_the_one_before(words, folders):
    chain = load_chain("tiny", words)
    assert {stage: recipe.train.output_dir for stage, recipe in chain.items()} == folders
    starts = [recipe.init.from_ for recipe in chain.values()]
    assert starts == [None, *list(folders.values())[:-1]]


def test_without_a_list_the_chain_is_that_of_the_sections(tmp_path):
    file = tmp_path / "r.yaml"
    head = "model: {llm: l, encoder: e}\ndata: {file: f, images: i}\ntrain: {output_dir: out}\n"
    for sections, stages in (("", ["pt", "ift"]), ("stages: {ift: {}, pt: {}, vpt: {}}\n", ["pt", "vpt", "ift"])):
        file.write_text(head + sections)
        assert list(load_chain(str(file), [])) == stages
    file.write_text(head + "stages: {pt: {train: {output_dir: a}}, ift: {train: {output_dir: b}}}\n")
    assert [r.train.output_dir for r in load_chain(str(file), []).values()] == ["a", "b"]
    with pytest.raises(RecipeError, match=r"train\.stages is \['ift', 'pt'\]: some of pt, vpt, ift, in this order"):
        load_chain(str(file), ["--train.stages=[ift, pt]"])


def test_words_for_one_stage_win_there_alone():
    chain = load_chain("tiny", ["--train.lr=1", "--stages.ift.train.lr=2"])
    assert {stage: recipe.train.lr for stage, recipe in chain.items()} == {"pt": 1, "ift": 2}
    with pytest.raises(RecipeError, match=r"unknown recipe key 'train\.lrr'; the nearest is 'train\.lr'"):
        load_chain("tiny", ["--stages.ift.train.lrr=2"])
    with pytest.raises(RecipeError, match="'stages' holds pt, vpt, ift, got sft"):
        load_chain("tiny", ["--stages.sft.train.lr=2"])


def test_no_is_a_value_and_not_false(tmp_path):
    (tmp_path / "r.yaml").write_text("base: llama3-8b-clip-l\ntrain: {mixed_precision: no}\n")
    assert load_recipe(str(tmp_path / "r.yaml"), [], "pt").train.mixed_precision == "no"
    assert load_recipe("llama3-8b-clip-l", ["--train.mixed_precision=no"], "pt").train.mixed_precision == "no"
    assert load_recipe("llama3-8b-clip-l", [], "pt").train.mixed_precision == "bf16"


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(RecipeError, match="such as table5/n4 "):
        load_recipe("table5/n44", [], "pt")
