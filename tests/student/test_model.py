import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from olavlm.student.adapter import load_checkpoint
from olavlm.student.decoder import capture_states, decoder_blocks, head_is_plain
from olavlm.student.errors import ModelError
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import IGNORE_INDEX, IMAGE_TOKEN, encode_prompt
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoders import VisionEncoder

SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = SHAPES | {"num_key_value_heads": 2, "vocab_size": 1100, "pad_token_id": 4, "eos_token_id": 3, "bos_token_id": 0}


def inputs_of(batch, rows=slice(None)):
    return {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}


def assembled_of(model, batch):
    placement = model._place(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return model._assemble(batch["input_ids"], placement, batch["pixel_values"])


def save_llm(folder, model, tiny):
    """A folder with another LLM and the tiny tokenizer."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny["llm"] / file, folder / file)
    return folder


# ---- building and saving


def test_build_keeps_the_base_weights(build, tiny, tokenizer):
    model = build()
    base = AutoModelForCausalLM.from_pretrained(tiny["llm"])
    old = base.config.vocab_size
    for name, weight in base.state_dict().items():
        assert torch.equal(model.llm.state_dict()[name][: len(weight)], weight), name
    for ours, theirs in [
        (model.get_input_embeddings(), base.get_input_embeddings()),
        (model.get_output_embeddings(), base.get_output_embeddings()),
    ]:
        assert len(ours.weight) == len(tokenizer)
        torch.testing.assert_close(ours.weight[old:], theirs.weight.mean(dim=0, keepdim=True).expand(1, -1))
    tower = VisionEncoder.from_pretrained(tiny["encoder"]).state_dict()
    assert all(torch.equal(weight, model.vision.state_dict()[name]) for name, weight in tower.items())
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_new_parts_have_pytorchs_initialisation(build):
    model = build()
    bound = model.vision.width**-0.5
    assert 0.95 * bound < model.projector[0].weight.abs().max() <= bound
    assert model.task_tokens.queries("depth").std().item() == pytest.approx(1, abs=0.05)
    assert model.predictors["seg_2"].ff1.weight.abs().max() <= 40**-0.5
    assert {name: scale.item() for name, scale in model.logit_scales.items()} == dict.fromkeys(
        ["gen", "depth", "seg"], 2
    )


def test_attention_is_the_librarys_choice(build):
    model = build()
    assert model.llm.config._attn_implementation == "sdpa"
    assert model.vision.tower.config._attn_implementation == "sdpa"
    assert build(attn_implementation="eager").llm.config._attn_implementation == "eager"


@pytest.mark.parametrize("with_predictors", [True, False])
def test_round_trip(build, tmp_path, tokenizer, make_batch, samples, with_predictors):
    model = build(template="phi_3", geometry="pad").eval()
    model.save_pretrained(tmp_path, tokenizer=tokenizer, with_predictors=with_predictors)
    assert model.config.with_predictors, "saving changes nothing"
    loaded = OlaVLM.from_pretrained(tmp_path).eval()
    expected = {
        name: weight
        for name, weight in model.state_dict().items()
        if with_predictors or not name.startswith(("predictors", "logit_scales"))
    }
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert (loaded.config.template, loaded.config.image_transform) == ("phi_3", model.config.image_transform)
    assert loaded.config.task_specs == model.config.task_specs
    assert loaded.llm.generation_config.eos_token_id == model.llm.generation_config.eos_token_id
    batch = make_batch(samples)
    with torch.no_grad():
        ours, theirs = model(**inputs_of(batch)), loaded(**inputs_of(batch))
    assert torch.equal(ours.text_loss_sum, theirs.text_loss_sum)
    assert set(theirs.predictions) == (set(ours.predictions) if with_predictors else set())
    assert all(torch.equal(prediction, ours.predictions[name]) for name, prediction in theirs.predictions.items())
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(IMAGE_TOKEN) == model.config.image_token_id
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), OlaVLM)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("predictors.") for name in saved) is with_predictors


@pytest.mark.parametrize(("template", "end"), [("phi_3", "<|end|>"), ("vicuna_v1", "</s>")])
def test_an_answer_ends_where_its_template_does(build, tokenizer, monkeypatch, template, end):
    """Also with a tokenizer that writes the terminator in several tokens, none of which ends an answer."""
    model, said = build(template=template), {}
    assert len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1

    def generate(*_, **settings):
        said.update(settings)
        return torch.tensor([tokenizer(f"Yes.{end}", add_special_tokens=False)["input_ids"]])

    monkeypatch.setattr(model, "generate", generate)
    assert model.answer(tokenizer, None, "Is it?") == "Yes."
    assert said["stop_strings"] == [end]
    model.config.template = "llama_3"
    assert model.answer(tokenizer, None, "Is it?") == f"Yes.{end}"
    assert said["stop_strings"] is None
    monkeypatch.undo()
    model.config.template = template
    assert isinstance(model.answer(tokenizer, None, "Is it?", max_new_tokens=3), str)


def test_of_the_language_models_generation_settings_tokens_are_kept(tiny, tokenizer, tmp_path):
    """Not how it draws: a penalty of repetitions would change scores, and no export of the model would have it."""
    shutil.copytree(tiny["llm"], tmp_path / "llm")
    tokens = {"eos_token_id": [5, 9], "suppress_tokens": [3]}
    draws = {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 9.0}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(tokens | draws))
    model = OlaVLM.build(tmp_path / "llm", tiny["encoder"], tokenizer)
    model.save_pretrained(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert {name: kept[name] for name in tokens} == tokens
    assert not kept.keys() & draws.keys()


def test_the_models_own_tokenizer_is_saved_with_it(build, tmp_path, tokenizer):
    build().save_pretrained(tmp_path / "built")
    loaded = OlaVLM.from_pretrained(tmp_path / "built")
    loaded.save_pretrained(tmp_path / "loaded")
    for folder in ("built", "loaded"):
        saved = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert saved.get_vocab() == tokenizer.get_vocab()
        assert saved.convert_tokens_to_ids(IMAGE_TOKEN) == loaded.config.image_token_id
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<other>"])
    loaded.save_pretrained(tmp_path / "other", tokenizer=other)
    assert "<other>" in AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab()


def test_a_model_without_a_tokenizer_is_loaded_and_saved_without_one(build, tmp_path):
    model = build()
    model.tokenizer = None
    model.save_pretrained(tmp_path / "saved")
    loaded = OlaVLM.from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer is None
    loaded.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("*/tokenizer*"))
    with pytest.raises(ModelError, match=r"no tokenizer in .*: the folder has no tokenizer\.json"):
        load_checkpoint(tmp_path / "again")


def test_round_trip_with_a_half_precision_base(build, tmp_path):
    model = build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = OlaVLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert state[name].dtype == weight.dtype, name
        assert torch.equal(state[name], weight), name


def test_round_trip_with_tied_embeddings(tiny, tokenizer, tasks, tmp_path):
    llm = save_llm(tmp_path / "llm", LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), tiny)
    tasks = [TaskSpec("gen", 1, 32, (2,))]
    model = OlaVLM.build(llm, tiny["encoder"], tokenizer, tasks)
    model.save_pretrained(tmp_path / "saved")
    loaded = OlaVLM.from_pretrained(tmp_path / "saved")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_vocabulary_with_room_is_not_resized(tiny, tokenizer, tmp_path):
    llm = save_llm(tmp_path / "llm", LlamaForCausalLM(LlamaConfig(**SIZES)), tiny)
    model = OlaVLM.build(llm, tiny["encoder"], tokenizer)
    assert model.get_input_embeddings().num_embeddings == SIZES["vocab_size"]


def test_half_precision_base_and_full_precision_rest(build, make_batch, samples):
    model = build(dtype=torch.bfloat16)
    dtypes = {
        part: next(getattr(model, part).parameters()).dtype for part in ("llm", "vision", "projector", "predictors")
    }
    assert dtypes == {
        "llm": torch.bfloat16,
        "vision": torch.bfloat16,
        "projector": torch.float32,
        "predictors": torch.float32,
    }
    batch = make_batch(samples)
    plain = model(**inputs_of(batch))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs_of(batch))
    reference = build()(**inputs_of(batch))
    for output in (plain, mixed):
        torch.testing.assert_close(output.text_loss_sum, reference.text_loss_sum, rtol=0.02, atol=0)
        for name, prediction in output.predictions.items():
            difference = (prediction.float() - reference.predictions[name])[reference.complete]
            assert difference.abs().mean() < 0.05, name


def test_bad_checkpoints(build, tiny, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="cannot load a model from '/nowhere'"):
        OlaVLM.build("/nowhere", tiny["encoder"], tokenizer)
    with pytest.raises(ModelError, match="cannot load a model from '/nowhere'"):
        OlaVLM.from_pretrained("/nowhere")
    model = build()
    model.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with pytest.raises(ModelError, match=rf"cannot load a model from '.*{name}': it is a file; give the folder"):
            OlaVLM.from_pretrained(tmp_path / name)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["projector.0.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of the model, such as 'projector\.0\.bias'"):
        OlaVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "llama_4"}, "template 'llama_4' is unknown"),
        ({"key_blocks": "all"}, "key_blocks='all' must be one of"),
        ({"gen_query": "mean"}, "gen_query='mean' must be one of contextual, raw"),
        ({"geometry": "round"}, "geometry='round' must be one of square, pad"),
        ({"tasks": [TaskSpec("gen", 1, 8, (7,))]}, "task gen: layer 7 of an LLM of 6 blocks"),
        ({"num_task_tokens": 3}, "16 teacher tokens are not divisible into num_task_tokens=3"),
    ],
)
def test_bad_settings(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_parameter_count_at_the_papers_shapes():
    """Llama-3-8B with CLIP-ViT-L/14-336: 183.1M trainable parameters in pre-training."""
    config = OlaVLMConfig(
        text_config=LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=128258, intermediate_size=14336
        ),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        tasks=[
            TaskSpec("gen", 1, 1024, (12, 20)),
            TaskSpec("depth", 576, 1024, (8, 20), predictor_width="llm"),
            TaskSpec("seg", 576, 1536, (10, 18)),
        ],
    )
    with torch.device("meta"):
        model = OlaVLM(config)
    count = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("projector", "task_tokens", "predictors", "logit_scales")
    }
    assert count == {
        "projector": 20_979_712,
        "task_tokens": 4_751_360,
        "predictors": 2 * (7_874_560 + 14_171_136 + 56_654_848),
        "logit_scales": 3,
    }
    assert model.inserted.added == 576 + 24 - 1


# ---- states and logits


@pytest.mark.parametrize("layers", [{1, 3, 6}, {6}, set()])
def test_captured_states_are_the_librarys_hidden_states(build, layers):
    llm = build().llm
    ids = torch.randint(0, 1000, (2, 9))
    with capture_states(llm, layers) as states:
        llm(input_ids=ids)
    assert not any(module._forward_hooks for module in llm.modules()), "nothing stays behind"
    hidden = llm(input_ids=ids, output_hidden_states=True).hidden_states
    assert states.keys() == layers | {"last"}
    assert all(torch.equal(states[layer], hidden[layer]) for layer in layers)
    assert torch.equal(states["last"], hidden[-1])


def test_text_loss_is_the_librarys_over_all_positions(build, make_batch, samples):
    model = build()
    batch = make_batch(samples)
    assembled = assembled_of(model, batch)
    placement = assembled.placement
    library = model.llm(
        inputs_embeds=assembled.embeds, attention_mask=placement.attention_mask, labels=placement.labels
    )
    count = (placement.labels[:, 1:] != IGNORE_INDEX).sum()
    output = model(**inputs_of(batch))
    torch.testing.assert_close(output.text_loss_sum / count, library.loss)
    del batch["labels"]
    logits = model(batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"]).logits
    tokens = placement.attention_mask.bool()
    torch.testing.assert_close(logits[tokens], library.logits[tokens])


def other_llms():
    gpt2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=1100, eos_token_id=3, bos_token_id=0)
    return {
        "gpt2": (GPT2LMHeadModel(gpt2), True),
        "gemma2, capped logits": (Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)), False),
        "cohere, scaled logits": (CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)), False),
    }


@pytest.mark.parametrize("name", ["gpt2", "gemma2, capped logits", "cohere, scaled logits"])
def test_other_llms_and_heads_that_do_more(name, tiny, tokenizer, tmp_path, make_batch, samples):
    llm, plain = other_llms()[name]
    tasks = [TaskSpec("gen", 1, 32, (1, 3)), TaskSpec("depth", 16, 24, (2,))]
    model = OlaVLM.build(save_llm(tmp_path / "llm", llm, tiny), tiny["encoder"], tokenizer, tasks, num_task_tokens=4)
    model.eval()
    assert model.head_is_plain is plain
    batch = make_batch(samples)
    output = model(**inputs_of(batch))
    assembled = assembled_of(model, batch)
    placement = assembled.placement
    library = model.llm(
        inputs_embeds=assembled.embeds, attention_mask=placement.attention_mask, labels=placement.labels
    )
    count = (placement.labels[:, 1:] != IGNORE_INDEX).sum()
    torch.testing.assert_close(output.text_loss_sum / count, library.loss)
    assert set(output.predictions) == {"gen/1", "gen/3", "depth/2"}
    assert all(torch.isfinite(prediction).all() for prediction in output.predictions.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing_but_its_side(name, tiny, tokenizer, tmp_path, make_batch, samples):
    """GPT-2 learns its positions, so that one which counted the padding would give other logits."""
    folder = save_llm(tmp_path / "llm", other_llms()[name][0], tiny) if name == "gpt2" else tiny["llm"]
    tasks = [TaskSpec("gen", 1, 32, (1, 3)), TaskSpec("depth", 16, 24, (2,))]
    torch.manual_seed(3)
    model = OlaVLM.build(folder, tiny["encoder"], tokenizer, tasks, num_task_tokens=4, include_answer=False).eval()
    right = inputs_of(make_batch(samples))
    lengths = right["attention_mask"].sum(dim=1)
    left = dict(right)
    for key in ("input_ids", "attention_mask", "labels"):
        rows = zip(right[key], lengths.tolist(), strict=True)
        left[key] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    assert left["attention_mask"][:, 0].sum() == 1, "one sample is the longest"
    with torch.no_grad():
        wanted, got = model(**right), model(**left)
        for key, prediction in wanted.predictions.items():
            whole = wanted.complete
            torch.testing.assert_close(got.predictions[key][whole], prediction[whole], atol=1e-4, rtol=1e-4, msg=key)
        torch.testing.assert_close(got.text_loss_sum, wanted.text_loss_sum)
        assert torch.equal(got.complete, wanted.complete)
        del right["labels"], left["labels"]
        wanted, got = model(**right), model(**left)
    assert torch.equal(got.attention_mask, wanted.attention_mask.flip(1))
    for row, length in enumerate(wanted.attention_mask.sum(dim=1).tolist()):
        torch.testing.assert_close(got.logits[row, -length:], wanted.logits[row, :length], atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(model.generate(**left, **options), model.generate(**right, **options))


def test_padding_predicts_nothing(build):
    model = build().eval()
    ids = torch.tensor([[4, 4, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    all_labelled = torch.tensor([[-100, -100, 7, 8, 9]])
    padded = model(ids, mask, all_labelled).text_loss_sum
    torch.testing.assert_close(padded, model(ids[:, 2:], None, all_labelled[:, 2:]).text_loss_sum)


def test_head_that_reads_other_states_is_found(build):
    model = build()
    assert head_is_plain(model.llm)
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5,))
    assert not head_is_plain(model.llm)


def test_unknown_architecture():
    class Odd(torch.nn.Module):
        def get_decoder(self):
            return self

    with pytest.raises(ValueError, match="Odd has no list of decoder blocks among layers, h, blocks"):
        decoder_blocks(Odd())


# ---- predictions


@pytest.mark.parametrize("options", [{}, {"gen_query": "raw"}, {"num_task_tokens": 0}, {"template": "plain"}])
def test_a_sample_alone_equals_the_sample_in_a_batch(build, make_batch, samples, options):
    model = build(**options)
    batch = make_batch(samples, template=options.get("template", "llama_3"))
    together = model(**inputs_of(batch))
    assert together.complete.tolist() == [True, True, False, True]
    alone_loss = 0.0
    for row in range(len(samples)):
        length = int(batch["attention_mask"][row].sum())
        inputs = inputs_of(batch, slice(row, row + 1))
        inputs = {name: value if name == "pixel_values" else value[:, :length] for name, value in inputs.items()}
        alone = model(**inputs)
        alone_loss += alone.text_loss_sum
        for name, prediction in alone.predictions.items():
            torch.testing.assert_close(prediction[0], together.predictions[name][row], atol=1e-5, rtol=0, msg=name)
    torch.testing.assert_close(together.text_loss_sum, alone_loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_blocks", ["img+t", "sys+img+t", "sys+img+t+txt"])
@pytest.mark.parametrize("include_answer", [True, False])
def test_masked_keys_equal_gathered_keys(build, make_batch, samples, key_blocks, include_answer):
    """Predictions from states gathered by hand, block by block, as the method describes its keys."""
    model = build(key_blocks=key_blocks, include_answer=include_answer)
    batch = make_batch(samples[:1])
    output = model(**inputs_of(batch))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    image = ids.index(model.config.image_token_id)
    patches, n = model.vision.num_tokens, model.config.num_task_tokens
    assembled = assembled_of(model, batch)
    hidden = model.llm(inputs_embeds=assembled.embeds, output_hidden_states=True).hidden_states
    text = torch.arange(image + patches + 3 * n, assembled.embeds.shape[1])
    if not include_answer:
        text = text[labels[image + 1 :] == IGNORE_INDEX]
    for index, task in enumerate(model.tasks):
        blocks = {
            "sys": torch.arange(image),
            "img": torch.arange(image, image + patches),
            "t": torch.arange(image + patches + index * n, image + patches + (index + 1) * n),
            "txt": text,
        }
        keys = torch.cat([blocks[name] for name in key_blocks.split("+")])
        for layer in task.layers:
            queries = model.task_tokens.queries(task.name)[None]
            if task.tokens == 1:
                queries = hidden[layer][:, blocks["t"]]
            expected = model.predictors[f"{task.name}_{layer}"](hidden[layer][:, keys], queries)
            torch.testing.assert_close(output.predictions[f"{task.name}/{layer}"], expected, atol=1e-5, rtol=0)


def test_raw_and_contextual_queries_differ_for_one_token_teachers_alone(build, make_batch, samples):
    batch = make_batch(samples)
    contextual, raw = (build(gen_query=kind)(**inputs_of(batch)).predictions for kind in ("contextual", "raw"))
    assert not torch.allclose(contextual["gen/2"], raw["gen/2"], atol=1e-3)
    assert torch.equal(contextual["depth/3"], raw["depth/3"])


def test_place_of_the_image_is_read_from_the_tokens(build, make_batch, samples):
    """The same image after system texts of other lengths."""
    model = build()
    starts = {}
    for template in ("llama_3", "phi_3", "vicuna_v1", "plain"):
        batch = make_batch(samples[:1], template=template)
        assembled = assembled_of(model, batch)
        start = assembled.placement.layouts[0].image.start
        features = model.projector(model.vision(batch["pixel_values"]))[0]
        torch.testing.assert_close(assembled.embeds[0, start : start + len(features)], features)
        starts[template] = start
        ids = batch["input_ids"][0].tolist()
        assert ids.index(model.config.image_token_id) == start
    assert len(set(starts.values())) == 4
    assert starts["plain"] == 1


def test_without_any_image(build, make_batch, samples):
    model = build()
    batch = make_batch(samples[2:3])
    output = model(**inputs_of(batch))
    without_pixels = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert torch.equal(output.text_loss_sum, without_pixels.text_loss_sum)
    library = model.llm(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(output.text_loss_sum / (batch["labels"][:, 1:] != IGNORE_INDEX).sum(), library)
    assert all(torch.isfinite(prediction).all() for prediction in output.predictions.values())
    output.text_loss_sum.backward()
    assert all((p.grad == 0).all() for p in model.projector.parameters()), "in the graph of every step"
    with pytest.raises(ValueError, match="row 0 has <image>, but no pixel_values"):
        model(make_batch(samples[:1])["input_ids"])


def test_cut_to_the_longest_sequence(build, make_batch, samples):
    model = build(max_sequence_length=50)
    output = model(**inputs_of(make_batch(samples)))
    assert output.attention_mask.shape[1] == 50
    assert not output.complete.any()
    assert all(torch.isfinite(prediction).all() for prediction in output.predictions.values())


def test_gradient_checkpointing_changes_no_gradient(build, make_batch, samples):
    batch = make_batch(samples)
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert decoder_blocks(model.llm)[0].gradient_checkpointing
        output = model(**inputs_of(batch))
        (output.text_loss_sum + sum(p.square().sum() for p in output.predictions.values())).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


# ---- generation


def test_generation_of_a_batch_equals_one_by_one_without_a_cache(build, tokenizer):
    model = build().eval()
    questions = ["What is on the table?", "Where is the bird relative to the tree? Answer.", "Hi."]
    pixels = torch.randn(3, 3, 56, 56)
    prompts = [
        encode_prompt(tokenizer, [{"from": "human", "value": f"<image>\n{question}" if i < 2 else question}], "llama_3")
        for i, question in enumerate(questions)
    ]
    length = max(map(len, prompts))
    ids = torch.tensor([prompt + [tokenizer.pad_token_id] * (length - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    together = model.generate(ids, mask, pixels, **options)
    assert together.shape == (3, 6)
    for row, prompt in enumerate(prompts):
        sequence = torch.tensor([prompt])
        for token in together[row]:
            logits = model(sequence, pixel_values=pixels[row : row + 1]).logits[0, -1]
            assert logits[token] > logits.max() - 1e-4
            sequence = torch.cat([sequence, token.view(1, 1)], dim=1)


def test_answer(build, tokenizer):
    model = build().train()
    image = Image.new("RGB", (90, 40), (200, 30, 30))
    text = model.answer(tokenizer, image, "What is this?", max_new_tokens=4)
    assert isinstance(text, str)
    assert text == model.answer(tokenizer, image, "What is this?", max_new_tokens=4), "greedy"
    assert isinstance(model.answer(tokenizer, None, "What is this?", max_new_tokens=2), str)
    assert model.training
    assert not model.vision.training
    ends = model.stop_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in ends
