"""LoRA in place of training the language model: what trains, what it leaves, resume, and the merged model."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from olavlm.student import OlaVLM, RecipeError, load_checkpoint
from olavlm.student.config import LoraConfig
from olavlm.student.lora import add_lora, lora_parameters, merge_lora
from olavlm.student.stages import apply_stage
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train

peft = pytest.importorskip("peft")


@pytest.fixture
def start(recipe, tmp_path):
    """A PT run folder."""
    return train(recipe(**{"train.max_steps": 1, "train.output_dir": tmp_path / "pt"}), "pt", {"test": "1"})


@pytest.fixture
def lora_recipe(recipe, start, ift_json):
    """lora_recipe(**overrides) -> a recipe of ift with updates of rank 4."""

    def make(**overrides):
        words = {"init.from": start, "data.file": ift_json, "lora.rank": 4, "train.max_steps": 4, "train.lr": 1e-2}
        return recipe("ift", **words | overrides)

    return make


def test_the_updates_and_the_projector_train_alone(build):
    model = build()
    before = {name: p.clone() for name, p in model.llm.named_parameters()}
    add_lora(model.llm, LoraConfig(rank=4))
    table = {row.part: row for row in apply_stage(model, "ift")}
    # Of a block: q and o 128 to 128, k and v 128 to 64, gate and up 128 to 256, down 256 to 128; rank 4.
    per_block = 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert (table["lora"].parameters, table["lora"].trainable) == (6 * per_block, 6 * per_block)
    assert (table["llm"].parameters, table["llm"].trainable) == (sum(p.numel() for p in before.values()), 0)
    assert table["projector"].trainable == table["projector"].parameters > 0
    assert sum(row.parameters for row in table.values()) == sum(p.numel() for p in model.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"llm.{name}" for name in lora_parameters(model.llm)} | {
        name for name, _ in model.named_parameters() if name.startswith("projector.")
    }


def test_at_first_an_update_adds_nothing_and_merged_it_is_part_of_the_weight(build):
    torch.manual_seed(0)
    llm = build().llm.eval()
    ids = torch.arange(10)[None]
    names = set(llm.state_dict())
    plain = llm(ids).logits
    add_lora(llm, LoraConfig(rank=2, alpha=6, targets=["q_proj"]))
    assert torch.equal(llm(ids).logits, plain)
    layer = llm.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.clone()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for name, parameter in lora_parameters(llm).items():
            if ".lora_B." in name:
                parameter.normal_()
    changed = llm(ids).logits
    assert (changed - plain).abs().max() > 1e-2
    expected = weight + 6 / 2 * b @ a
    merge_lora(llm)
    assert set(llm.state_dict()) == names
    torch.testing.assert_close(llm.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(llm(ids).logits, changed, atol=1e-4, rtol=1e-4)


def test_ift_leaves_the_updates_and_a_whole_model_with_them_merged(lora_recipe, start):
    folder = train(lora_recipe(), "ift", {"test": "1"})
    checkpoint = load_file(folder / "checkpoints" / "step-000004" / "trained.safetensors")
    assert all(".lora_" in name or name.startswith("projector.") for name in checkpoint)
    model, tokenizer = load_checkpoint(folder)
    assert isinstance(model.answer(tokenizer, None, "Hello?", max_new_tokens=3), str)

    base = OlaVLM.from_pretrained(start).llm
    merged = peft.PeftModel.from_pretrained(base, folder / "lora").merge_and_unload().state_dict()
    untouched = OlaVLM.from_pretrained(start).llm.state_dict()
    changed = 0
    for name, value in model.llm.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5, msg=name)
        changed += not torch.equal(value, untouched[name])
    assert changed == 6 * 7  # every linear layer of every block; neither embedding


def test_resume_is_bit_for_bit(lora_recipe, tmp_path):
    dropout = {"lora.dropout": 0.1}
    whole = train(lora_recipe(**dropout, **{"train.output_dir": tmp_path / "a"}), "ift", {"test": "1"})
    for steps in (2, 4, 4):  # the last finds everything done
        half = train(
            lora_recipe(**dropout, **{"train.max_steps": steps, "train.output_dir": tmp_path / "b"}),
            "ift",
            {"test": "1"},
        )
    for name in ("model.safetensors", "lora/adapter_model.safetensors"):
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    losses = [[line["loss/total"] for line in read_metrics(run / "metrics.jsonl")] for run in (half, whole)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_vpt_and_ift_in_a_row_each_have_updates_of_their_own(lora_recipe, start, pt_json, tmp_path):
    common = {"lora.rank": 2, "train.max_steps": 1, "model.dtype": "bfloat16"}
    vpt = lora_recipe(**common, **{"data.file": pt_json, "train.output_dir": tmp_path / "vpt"})
    ift = lora_recipe(**common, **{"init.from": tmp_path / "vpt", "train.output_dir": tmp_path / "ift"})
    folders = [train(recipe, stage, {"test": "1"}) for stage, recipe in (("vpt", vpt), ("ift", ift))]
    vpt_updates, ift_updates = (load_file(folder / "lora" / "adapter_model.safetensors") for folder in folders)
    assert vpt_updates.keys() == ift_updates.keys()
    name = "llm.model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in folders)
    part = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    update = 2 * ift_updates[part.format("B")] @ ift_updates[part.format("A")]
    assert update.abs().max() > 0
    torch.testing.assert_close(after.float(), before.float() + update, atol=2e-3, rtol=8e-3)  # bfloat16 rounds


def test_pt_has_no_use_for_it(recipe):
    folder = train(recipe(**{"lora.rank": 4, "train.max_steps": 1}), "pt", {"test": "1"})
    assert not (folder / "lora").exists()


def test_updates_of_a_bfloat16_model_are_float32(build):
    llm = build(dtype=torch.bfloat16).llm
    add_lora(llm, LoraConfig(rank=2))
    assert {p.dtype for p in lora_parameters(llm).values()} == {torch.float32}


def test_refusals(build, monkeypatch):
    llm = build().llm
    with pytest.raises(RecipeError, match=r"lora\.targets is \['no_such_layer'\]: "):
        add_lora(llm, LoraConfig(rank=2, targets=["no_such_layer"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        RecipeError, match=r"package peft is not installed; install it with: pip install 'olavlm\[lora\]'"
    ):
        add_lora(llm, LoraConfig(rank=2))
