"""What a stage starts from: the same models by another path, adapters as they are asked for, short language models."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from olavlm.student import OlaVLM, RecipeError
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train


def run(recipe, stage="pt"):
    folder = train(recipe, stage, {"test": "1"})
    return folder, read_metrics(folder / "metrics.jsonl")


def test_the_same_base_model_by_another_path(recipe, tiny, ift_json, tmp_path):
    pt, _ = run(recipe(**{"train.max_steps": 1}))
    link = tmp_path / "link"
    link.symlink_to(tiny["llm"])
    again = {"model.llm": link, "model.encoder": tiny["llm"] / ".." / tiny["encoder"].name}
    run(recipe("ift", **{"init.from": pt, "data.file": ift_json, "train.max_steps": 1, **again}), "ift")


def test_an_adapter_is_loaded_as_it_is_asked_for(recipe):
    pt, _ = run(recipe(**{"train.max_steps": 1}))
    assert OlaVLM.from_pretrained(pt).llm.dtype == torch.float32
    model = OlaVLM.from_pretrained(pt, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.llm.dtype == torch.bfloat16
    assert model.llm.config._attn_implementation == "eager"
    assert OlaVLM.from_pretrained(pt, dtype="auto", attn_implementation=None).llm.dtype == torch.float32
    with pytest.raises(TypeError, match=r"dtype and attn_implementation apply, not 'device_map'"):
        OlaVLM.from_pretrained(pt, device_map="cpu")
    with pytest.raises(TypeError, match=r"dtype and attn_implementation apply, not 'x'"):
        OlaVLM.from_pretrained(pt, "x")


@pytest.fixture
def gpt2(tiny, tmp_path):
    """gpt2(positions) -> a tiny GPT-2, which has embeddings of so many positions."""

    def make(positions):
        ends = {"bos_token_id": 0, "eos_token_id": 3}
        config = GPT2Config(vocab_size=1100, n_embd=64, n_layer=6, n_head=4, n_positions=positions, **ends)
        folder = tmp_path / f"gpt2-{positions}"
        GPT2LMHeadModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny["llm"]).save_pretrained(folder)
        return folder

    return make


def test_sequences_end_where_the_llm_has_no_positions_any_more(recipe, gpt2, tmp_path):
    answer = "and so on " * 200
    sample = {"id": "long", "conversations": [{"from": "human", "value": "Tell."}, {"from": "gpt", "value": answer}]}
    (tmp_path / "long.json").write_text(json.dumps([sample] * 4))
    texts = {"data.file": tmp_path / "long.json", "losses.stages": "[]", "train.max_steps": 1}
    folder, metrics = run(recipe(**texts, **{"model.llm": gpt2(120)}))
    assert 0 < metrics[0]["supervised_tokens"] < 4 * 120
    model = OlaVLM.from_pretrained(folder)
    assert model.longest_sequence == 120
    assert model(torch.full((1, 200), 5)).logits.shape[1] == 120
    with pytest.raises(RecipeError, match=r"the longest sequence of this LLM is 40: .*; take fewer task tokens"):
        run(recipe(**texts, **{"model.llm": gpt2(40), "train.output_dir": tmp_path / "short"}))
