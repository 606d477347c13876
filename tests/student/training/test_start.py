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


def test_sequences_end_where_the_llm_has_no_positions_any_more(recipe, tiny, tmp_path):
    config = GPT2Config(
        vocab_size=1100, n_embd=64, n_layer=6, n_head=4, n_positions=120, bos_token_id=0, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny["llm"]).save_pretrained(tmp_path / "gpt2")
    answer = "and so on " * 200
    sample = {"id": "long", "conversations": [{"from": "human", "value": "Tell."}, {"from": "gpt", "value": answer}]}
    (tmp_path / "long.json").write_text(json.dumps([sample] * 4))
    texts = {"model.llm": tmp_path / "gpt2", "data.file": tmp_path / "long.json", "losses.stages": "[]"}
    folder, metrics = run(recipe(**texts, **{"train.max_steps": 1}))
    assert 0 < metrics[0]["supervised_tokens"] < 4 * 120
    model = OlaVLM.from_pretrained(folder)
    assert model.longest_sequence == 120
    ids = torch.full((1, 200), 5)
    assert model(ids).logits.shape[1] == 120
    with pytest.raises(RecipeError, match=r"the longest sequence of this LLM is 120: .* take fewer task tokens"):
        run(recipe(**texts, **{"model.num_task_tokens": 64, "train.output_dir": tmp_path / "long"}))
