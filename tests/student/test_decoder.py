"""Causal LMs of other architectures than Llama, tiny and with random weights."""

import pytest
import torch
import transformers as library
from transformers import AutoModelForCausalLM, AutoTokenizer

from olavlm.student.decoder import (
    capture_states,
    checkpoint_activations,
    decoder_blocks,
    head_is_plain,
    learned_positions,
    state_width,
)
from olavlm.student.errors import ModelError
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import IMAGE_TOKEN, prepare_tokenizer
from olavlm.student.tokens import TaskSpec

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1100,
    "pad_token_id": 4,
    "eos_token_id": 3,
    "bos_token_id": 0,
}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 16}
OPT = SIZES | {"ffn_dim": 96}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1100, "eos_token_id": 3, "bos_token_id": 0}

ARCHITECTURES = {  # class, config, whether its logits are plain
    "phi3": ("Phi3", LLAMA, True),
    "qwen2, tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}, True),
    "qwen3": ("Qwen3", GEMMA, True),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}, True),
    "gemma, scaled embeddings": ("Gemma", GEMMA, True),
    "gemma2, capped logits": ("Gemma2", GEMMA, False),
    "gemma3": ("Gemma3", GEMMA, True),
    "gemma3, capped logits": ("Gemma3", GEMMA | {"final_logit_softcapping": 30.0}, False),
    "granite, scaled logits": ("Granite", LLAMA | {"logits_scaling": 2.0, "embedding_multiplier": 3.0}, False),
    "phi, bias of the logits": ("Phi", LLAMA, True),
    "opt": ("OPT", OPT, True),
    "gpt-neox": ("GPTNeoX", SIZES | {"intermediate_size": 96}, True),
    "gpt2": ("GPT2", GPT2, True),
}


def make(name):
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(library, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(**settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_weights_that_are_not_finite_are_refused():
    llm = make("phi3")
    llm.get_output_embeddings().weight.data.fill_(float("nan"))  # which the states do not meet
    assert head_is_plain(llm)
    decoder_blocks(llm)[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"states are not finite in torch.float32: its weights are damaged"):
        head_is_plain(llm)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_the_librarys_hidden_states(name):
    llm = make(name)
    assert len(decoder_blocks(llm)) == 3
    assert state_width(llm) == 64
    assert head_is_plain(llm) is ARCHITECTURES[name][2]
    ids = torch.randint(5, 1000, (2, 9))
    with capture_states(llm, {1, 2, 3}) as states:
        llm(input_ids=ids)
    hidden = llm(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(states[layer], hidden[layer]) for layer in (1, 2, 3))
    assert torch.equal(states["last"], hidden[3])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_around_it(name, tiny, tmp_path):
    """Text gives the LLM's own logits, loss and words, images and predictions come out finite, and all of it again."""
    llm = make(name)
    llm.save_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tiny["llm"])
    tasks = [TaskSpec("gen", 1, 32, (1, 3)), TaskSpec("depth", 16, 24, (2,))]
    model = OlaVLM.build(tmp_path / "llm", tiny["encoder"], tokenizer, tasks, num_task_tokens=4).eval()
    assert model.get_input_embeddings().num_embeddings == 1100, "the LLM has more rows than the tokenizer tokens"
    ids = torch.randint(5, 1000, (2, 9))
    with torch.no_grad():
        expected = llm(input_ids=ids, labels=ids)
        torch.testing.assert_close(model(ids).logits, expected.logits)
        torch.testing.assert_close(model(ids, labels=ids).text_loss_sum / 16, expected.loss)
        ends = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 4, "eos_token_id": 3}
        assert torch.equal(model.generate(ids, **ends), llm.generate(ids, **ends)[:, 9:])
        ids[:, 4] = model.config.image_token_id
        pixels = torch.randn(2, 3, 56, 56)
        output = model(ids, labels=ids, pixel_values=pixels)
        assert set(output.predictions) == {"gen/1", "gen/3", "depth/2"}
        assert all(prediction.isfinite().all() for prediction in output.predictions.values())
        model.save_pretrained(tmp_path / "model")
        loaded = OlaVLM.from_pretrained(tmp_path / "model").eval()
        again = loaded(ids, labels=ids, pixel_values=pixels)
    assert torch.equal(again.text_loss_sum, output.text_loss_sum)
    assert all(torch.equal(again.predictions[key], value) for key, value in output.predictions.items())
    tied = llm.config.tie_word_embeddings
    for each in (model, loaded):
        same = each.get_input_embeddings().weight.data_ptr() == each.get_output_embeddings().weight.data_ptr()
        assert same is tied


@pytest.mark.parametrize(("name", "positions"), [("opt", 2048), ("gpt2", 1024), ("phi3", None), ("gpt-neox", None)])
def test_how_many_positions_are_learnt(name, positions):
    assert learned_positions(make(name)) == positions


def test_predictors_learn_from_every_architecture(tiny, tmp_path):
    for name in ("gemma2, capped logits", "opt", "gpt-neox"):
        make(name).save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tiny["llm"])
        tasks = [TaskSpec("gen", 1, 32, (1, 3))]
        model = OlaVLM.build(tmp_path / name, tiny["encoder"], tokenizer, tasks, num_task_tokens=4)
        checkpoint_activations(model.llm)
        model.train()
        ids = torch.tensor([[5, model.config.image_token_id, 6, 7]])
        output = model(ids, labels=ids, pixel_values=torch.randn(1, 3, 56, 56))
        (output.text_loss_sum + sum(value.square().mean() for value in output.predictions.values())).backward()
        for part in (model.projector, model.task_tokens, model.predictors):
            assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters()), name


def test_tied_embeddings_that_grow(tiny, tokenizer, tmp_path):
    """One matrix, whose new rows are the mean of the old ones, and which stays one."""
    torch.manual_seed(0)
    config = library.Qwen2Config(**LLAMA | {"tie_word_embeddings": True, "vocab_size": len(tokenizer) - 1})
    library.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    model = OlaVLM.build(tmp_path / "llm", tiny["encoder"], tokenizer)
    model.save_pretrained(tmp_path / "model")
    for each in (model, OlaVLM.from_pretrained(tmp_path / "model")):
        weight = each.get_input_embeddings().weight
        assert weight.data_ptr() == each.get_output_embeddings().weight.data_ptr()
        assert len(weight) == len(tokenizer)
        torch.testing.assert_close(weight[-1], weight[:-1].mean(dim=0))


def test_tokenizer_without_padding_or_beginning(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny["llm"])
    tokenizer.pad_token = tokenizer.bos_token = None
    make("gpt2").save_pretrained(tmp_path / "llm")
    model = OlaVLM.build(tmp_path / "llm", tiny["encoder"], prepare_tokenizer(tokenizer), template="vicuna_v1")
    assert tokenizer.pad_token == "<pad>"
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) < 1100
    assert isinstance(model.answer(tokenizer, None, "Hi.", max_new_tokens=2), str)


def test_states_of_another_width_than_the_embeddings(tiny, tokenizer, tmp_path):
    """As OPT-350M."""
    library.OPTForCausalLM(library.OPTConfig(**OPT, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="OPTForCausalLM has embeddings 32 wide and states 64 wide; use"):
        OlaVLM.build(tmp_path, tiny["encoder"], tokenizer)
