"""Tokenizers and chat templates of exported models: prompts of training, whatever the tokenizer and the tool."""

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from olavlm.student.errors import ModelError
from olavlm.student.formats.llava_hf_template import exported_template
from olavlm.student.formats.llava_hf_tokenizer import export_tokenizer, task_token_names
from olavlm.student.text.conversation import IMAGE_TOKEN, encode_prompt, load_tokenizer, prepare_tokenizer
from olavlm.teachers.tiny_llm import TEXT

TOKENS = task_token_names(["gen", "depth"], 2)
BEHIND = "<gen_0><gen_1><depth_0><depth_1>"


def sentence_pieces(how):
    """A tokenizer as Llama-2's: `legacy` has its normaliser, the others Metaspace with this scheme."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if how == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how, split=False)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=["\n", "▁"], show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return prepare_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


def prompt(exported, content, **options):
    messages = [{"role": "user", "content": content}]
    return exported.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def test_names():
    assert TOKENS == ["<gen_0>", "<gen_1>", "<depth_0>", "<depth_1>"]
    assert task_token_names(["gen"], 0) == []


@pytest.mark.parametrize("template", ["llama_3", "phi_3", "vicuna_v1"])
def test_text_is_that_of_the_golden_conversations(tokenizer, golden_conversations, template):
    golden = golden_conversations["templates"][template]
    turns = golden_conversations["turns"]
    messages = [{"role": {"human": "user"}.get(t["from"], "assistant"), "content": t["value"]} for t in turns]
    jinja = exported_template(tokenizer, template, TOKENS, "<s>")
    for given, is_open, wanted in ((messages, False, "training_prompt"), (messages[:1], True, "generation_prompt")):
        text = tokenizer.apply_chat_template(given, chat_template=jinja, tokenize=False, add_generation_prompt=is_open)
        assert text == "<s>" + golden[wanted].replace(IMAGE_TOKEN, IMAGE_TOKEN + BEHIND)


def test_where_a_user_puts_the_image(tokenizer):
    exported = export_tokenizer(tokenizer, "llama_3", TOKENS)
    wanted = prompt(exported, f"{IMAGE_TOKEN}\nWhat is it?")
    assert f"user<|end_header_id|>\n\n{IMAGE_TOKEN}{BEHIND}\nWhat is it?<|eot_id|>" in wanted
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    for content in (
        f"What is it?\n{IMAGE_TOKEN}",
        f"{IMAGE_TOKEN}{BEHIND}\nWhat is it?",
        [image, text],
        [text, {"type": "image_url"}],
        [{"type": "text", "text": f"{IMAGE_TOKEN}\nWhat is it?"}],
    ):
        assert prompt(exported, content) == wanted
    assert prompt(exported, [image, text, image]).count(IMAGE_TOKEN + BEHIND) == 2
    assert "What is\nit?" in prompt(exported, [{"type": "text", "text": "What is"}, {"type": "text", "text": "it?"}])
    assert "<gen_0>" not in prompt(exported, "What is it?")


def test_system_messages(tokenizer):
    exported = export_tokenizer(tokenizer, "phi_3", TOKENS)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    text = exported.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|begin_of_text|><|system|>\nBe short.<|end|>\n<|user|>\nWhy?<|end|>"
    with pytest.raises(TemplateError, match="system in the first message alone"):
        exported.tokenizer.apply_chat_template(messages[::-1], tokenize=False)


def test_a_template_of_the_tokenizers_own(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}{{ strftime_now('%d') if false else '' }}"
    )
    tokenizer.eos_token = "<|end_header_id|>"
    exported = export_tokenizer(tokenizer, "chat", TOKENS)
    assert exported.tokenizer.eos_token == "<|end_header_id|>"
    wanted = f"<|begin_of_text|>user: {IMAGE_TOKEN}{BEHIND}\nWhat?<|end_header_id|>\nassistant:"
    assert prompt(exported, [{"type": "text", "text": "What?"}, {"type": "image"}]) == wanted
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nWhat?"}]
    own = tokenizer.decode(encode_prompt(tokenizer, turns, "chat"))
    assert own == wanted.replace(BEHIND, "")


@pytest.mark.parametrize(
    ("how", "image_alone", "writes_beginning"),
    [("legacy", False, True), ("first", True, False), ("always", True, True)],
)
def test_tokenizers_that_begin_words_with_a_space(how, image_alone, writes_beginning):
    """What is right for all tools where that can be; where it cannot, prompts of the template are right."""
    exported = export_tokenizer(sentence_pieces(how), "vicuna_v1", TOKENS)
    assert (exported.image_alone, exported.writes_beginning) == (image_alone, writes_beginning)
    text = prompt(exported, f"{IMAGE_TOKEN}\nWhat is it?")
    assert text.startswith("<s>A chat" if writes_beginning else "A chat")
    tokens = exported.tokenizer.convert_ids_to_tokens(exported.tokenizer(text)["input_ids"])
    assert tokens.count("<s>") == 1
    alone = exported.tokenizer.convert_ids_to_tokens(exported.tokenizer(f"USER: {IMAGE_TOKEN}\nWhat?")["input_ids"])
    assert ("<gen_0>" in alone) == image_alone


def test_what_cannot_be_exported(tiny, tokenizer):
    tokenizer.add_tokens(["<depth_1>"])
    with pytest.raises(ModelError, match="has a token '<depth_1>' already"):
        export_tokenizer(tokenizer, "llama_3", TOKENS)
    tokenizer = load_tokenizer(tiny["llm"])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eot_id|>", special_tokens=[("<|eot_id|>", tokenizer.eos_token_id)]
    )
    with pytest.raises(ModelError, match="adds tokens behind a prompt"):
        export_tokenizer(tokenizer, "llama_3", TOKENS)


def test_the_tokenizer_given_stays_as_it_is(tokenizer):
    before, template = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    export_tokenizer(tokenizer, "llama_3", TOKENS)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template) == (before, template)
    assert tokenizer.padding_side == "right"
