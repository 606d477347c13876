"""The LLM on samples in one row, without padding: the same losses, predictions and gradients as padded."""

from functools import partial

import pytest
import torch
import transformers as library
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import flash_attention_mask

from olavlm.student.decoder import checkpoint_activations
from olavlm.student.errors import ModelError
from olavlm.student.model import OlaVLM
from olavlm.student.packing import SDPA_BY_SAMPLE, packed_inputs, prepare_packing, why_not

SIZES = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 1100, "pad_token_id": 4, "eos_token_id": 3,
         "bos_token_id": 0}  # fmt: skip
PACK = {
    "llama": ("LlamaConfig", SIZES),
    "smollm2, tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "phi3, window": ("Phi3Config", SIZES | {"sliding_window": 9}),
    "mistral, window": ("MistralConfig", SIZES | {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "gemma3, windows of some layers": ("Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 9}),
    "opt": ("OPTConfig", {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_dim": 96,
                          "vocab_size": 1100, "word_embed_proj_dim": 128}),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 6, "n_head": 4, "vocab_size": 1100}),
}  # fmt: skip


def make(kind, settings, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(library, kind)(**settings), **options)


@pytest.fixture
def around(build):
    """around(LLM, **options) -> an `OlaVLM` with this LLM in place of the tiny one."""

    def make_model(llm, **options):
        model = build(**options)
        llm.resize_token_embeddings(max(1100, model.llm.get_input_embeddings().num_embeddings), mean_resizing=False)
        model.llm = llm
        return model

    return make_model


def outcome(model, batch):
    """Text loss, predictions of samples with an image, and all gradients."""
    model.zero_grad()
    output = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")})
    rows = output.complete
    predictions = {name: value[rows] for name, value in output.predictions.items()}
    (output.text_loss_sum + sum(value.square().mean() for value in predictions.values())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"text": output.text_loss_sum, **predictions}, gradients


def assert_packed_equals_padded(model, batch):
    wanted, wanted_gradients = outcome(model, batch)
    model.pack(True)
    found, gradients = outcome(model, batch)
    assert found.keys() == wanted.keys()
    assert gradients.keys() == wanted_gradients.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in wanted_gradients.items():
        assert (gradients[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max()), name
    return gradients


@pytest.mark.parametrize("name", PACK)
def test_losses_predictions_and_gradients(around, make_batch, samples, name):
    """Of samples of different lengths, one of them without an image."""
    model = around(make(*PACK[name])).eval()  # some have dropout
    gradients = assert_packed_equals_padded(model, make_batch(samples))
    assert gradients["task_tokens.query.depth"].abs().max() > 0
    assert model.llm.config._attn_implementation == SDPA_BY_SAMPLE


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "eager"},
        {"num_task_tokens": 0},
        {"max_sequence_length": 60},
        {"key_blocks": "img+t", "include_answer": False, "gen_query": "raw"},
        {"tasks": (), "num_task_tokens": 0},
    ],
)
def test_with_every_switch(build, make_batch, samples, options):
    assert_packed_equals_padded(build(**options), make_batch(samples))


def test_with_gradient_checkpointing(build, make_batch, samples):
    model = build()
    wanted = outcome(model, make_batch(samples))[1]
    checkpoint_activations(model.llm)
    model.train()
    found = assert_packed_equals_padded(model, make_batch(samples))
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max()), name


def test_text_alone_and_a_head_that_is_not_plain(around, make_batch, samples):
    text = [sample for sample in samples if not sample[2]] * 2
    model = around(make("GraniteConfig", SIZES | {"logits_scaling": 2.0}))
    model.head_is_plain = None
    assert_packed_equals_padded(model, make_batch([*samples, *text]))
    assert model.head_is_plain is False
    assert_packed_equals_padded(model, make_batch(text))


def test_what_is_computed_is_the_tokens_there_are(build, make_batch, samples, monkeypatch):
    """And generation stays padded, with the words it had."""
    model, batch = build().eval(), make_batch(samples)
    del batch["labels"], batch["targets"], batch["valid"]
    ends = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 4, "eos_token_id": 3}
    words = model.generate(**batch, **ends)
    rows = []
    model.llm.get_decoder().layers[0].mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:2]))
    placement = model._place(batch["input_ids"], batch["attention_mask"])
    model(**batch)
    model.pack(True)
    rows.clear()
    logits = model(**batch).logits
    assert rows == [(1, sum(placement.lengths))]
    assert logits.shape[:2] == placement.shape
    assert torch.equal(model.generate(**batch, **ends), words)
    model.pack(False)
    rows.clear()
    model(**batch)
    assert rows == [placement.shape]


def test_flash_attention_is_given_the_lengths(build, make_batch, samples, monkeypatch):
    """By a stand-in that attends as `flash_attn_varlen_func` does, with the arguments the library hands on."""
    seen = []

    def varlen(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        assert attention_mask is None
        if cu_seq_lens_q is None:
            return library.integrations.sdpa_attention.sdpa_attention_forward(module, query, key, value, None, **kwargs)
        seen.append((cu_seq_lens_q.tolist(), cu_seq_lens_q.dtype, max_length_q))
        lengths = cu_seq_lens_q.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        kwargs = {k: v for k, v in kwargs.items() if k in ("dropout", "scaling")}
        forward = library.integrations.sdpa_attention.sdpa_attention_forward
        return torch.cat([forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None

    AttentionInterface.register("flash_stand_in", varlen)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model, batch = build(), make_batch(samples)
    # The library would look for a kernel of that name.
    choose = partial(setattr, model.llm.config, "_attn_implementation_internal")
    monkeypatch.setattr(model.llm, "set_attn_implementation", choose)
    model.llm.set_attn_implementation("flash_stand_in")
    assert prepare_packing(None, model.llm)
    assert_packed_equals_padded(model, batch)
    lengths = model._place(batch["input_ids"], batch["attention_mask"]).lengths
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert seen == [(ends, torch.int32, max(lengths))] * len(model.llm.get_decoder().layers)


def test_by_default_it_packs_with_sdpa_if_the_llm_can(build):
    for implementation, packed in {"sdpa": True, "eager": False}.items():
        model = build(attn_implementation=implementation)
        assert model.packed is False, "a model that nobody trains"
        model.pack(None)
        assert model.packed is packed
        model.pack(None)
        assert model.packed is packed
    model = build()
    model.llm = make(*REFUSED["recurrent"][:2])
    model.pack(None)
    assert model.packed is False


REFUSED = {
    "recurrent": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1100, "state_size": 4},
                  "takes no position ids"),
    "ignores positions": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1100},
                          "takes no position ids"),
    "layers of another kind": ("Qwen3NextConfig", SIZES | {"head_dim": 16, "num_experts": 4, "num_hidden_layers": 4},
                               "has layers of linear_attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_llm_that_cannot(build, name):
    kind, settings, reason = REFUSED[name]
    model = build()
    model.llm = make(kind, settings)
    with pytest.raises(ModelError, match=f"model.packing is true, and .*LM.* {reason}.*; set it to false"):
        model.pack(True)


def test_an_llm_that_mixes_samples_is_found_by_its_states(build):
    """A stand-in for one: attention that does not look at the lengths, and positions that are not read."""
    model = build()
    attention = model.llm.get_decoder().layers[0].self_attn
    plain = type(attention).forward

    def deaf(self, *args, **kwargs):
        return plain(self, *args, **{**kwargs, "attention_mask": None, "sample_lengths": None})

    assert why_not(model.llm) is None
    attention.forward = deaf.__get__(attention)
    assert "mixes the samples of one row" in why_not(model.llm)
    assert model.llm.config._attn_implementation == "sdpa", "as it was"
    del attention.forward
    rotary = model.llm.get_decoder().rotary_emb
    turn = rotary.forward
    rotary.forward = lambda x, position_ids: turn(x, position_ids=torch.arange(x.shape[1])[None])
    inputs = packed_inputs(model.llm, (2, 2), torch.tensor([0, 1, 0, 1]))
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1]]
    # Rotary positions matter by their differences alone: within a sample they are the same, and nothing is lost.
    assert why_not(model.llm) is None


def test_a_checkpoint_of_a_packed_model_is_like_any_other(build, tmp_path, make_batch, samples):
    model, batch = build().eval(), make_batch(samples)
    model.pack(True)
    model.save_pretrained(tmp_path)
    assert SDPA_BY_SAMPLE not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    loaded = OlaVLM.from_pretrained(tmp_path).eval()
    assert loaded.llm.config._attn_implementation == "sdpa"
    with torch.no_grad():
        wanted, found = (outcome_without_gradient(m, batch) for m in (model, loaded))
    torch.testing.assert_close(found, wanted)


def outcome_without_gradient(model, batch):
    return model(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels", "pixel_values")}).text_loss_sum
