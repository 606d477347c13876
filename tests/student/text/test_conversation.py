import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from olavlm.student.errors import ModelError, SampleError
from olavlm.student.text.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    encode,
    encode_prompt,
    generation_prompt,
    load_tokenizer,
    prepare_tokenizer,
    render,
    terminator_id,
)
from olavlm.student.text.templates import ALIASES, TEMPLATES

CHATS = ("llama_3", "phi_3", "vicuna_v1")
TEXT = ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: </s> cup spoon Yes"]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sentencepiece_like():
    """Words joined to the space before them, as in Llama-2's and Vicuna's tokenizers."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(trim_offsets, terminator=None):
    """GPT-2's kind of tokenizer; offsets of tokens leave white space out when they are trimmed."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    if terminator is not None:
        tokenizer.add_tokens([terminator], special_tokens=True)
    return tokenizer


def answers(tokenizer, encoded):
    """The supervised text, one piece for each unbroken run of labels."""
    runs, last = [], None
    for index, label in enumerate(encoded["labels"]):
        if label != IGNORE_INDEX:
            assert label == encoded["input_ids"][index]
            if last != index - 1:
                runs.append([])
            runs[-1].append(label)
            last = index
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_golden_prompts(golden_conversations, name):
    golden = golden_conversations["templates"][name]
    conversation = golden_conversations["turns"][: 2 if name == "plain" else None]
    segments = render(conversation, name)
    assert "".join(segment.text for segment in segments) == golden["training_prompt"]
    assert [segment.text for segment in segments if segment.supervised] == golden["supervised_text"]
    if name == "plain":
        with pytest.raises(SampleError, match="no roles"):
            generation_prompt(conversation[:1], name)
    else:
        assert generation_prompt(conversation[:1], name) == golden["generation_prompt"]


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(golden_conversations, alias, name):
    assert render(golden_conversations["turns"], alias) == render(golden_conversations["turns"], name)


def test_unknown_template_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'llama_4' is unknown.*llama_3, phi_3, vicuna_v1, plain, llava_llama_3"):
        render(turns("a", "b"), "llama_4")


@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_tokens_decode_to_the_answers(golden_conversations, tokenizer, name):
    golden = golden_conversations["templates"][name]
    encoded = encode(tokenizer, golden_conversations["turns"][: 2 if name == "plain" else None], name)
    supervised = answers(tokenizer, encoded)
    if name == "vicuna_v1":  # its role ends in a space, which this tokenizer joins to the answer's first word
        supervised = [text.removeprefix(" ") for text in supervised]
    assert supervised == golden["supervised_text"]
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.bos_token + golden["training_prompt"]
    image = encoded["input_ids"].index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    assert encoded["labels"][image] == IGNORE_INDEX


@pytest.mark.parametrize("name", CHATS)
def test_open_prompt_begins_the_training_prompt(golden_conversations, tokenizer, name):
    open_ids = encode_prompt(tokenizer, golden_conversations["turns"][:1], name)
    training_ids = encode(tokenizer, golden_conversations["turns"], name)["input_ids"]
    assert open_ids == training_ids[: len(open_ids)]


def test_word_joined_to_the_space_before_an_answer(golden_conversations):
    tokenizer = prepare_tokenizer(sentencepiece_like())
    encoded = encode(tokenizer, golden_conversations["turns"], "vicuna_v1")
    golden = golden_conversations["templates"]["vicuna_v1"]
    assert [text.strip() for text in answers(tokenizer, encoded)] == golden["supervised_text"]
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    first = next(index for index, label in enumerate(encoded["labels"]) if label != IGNORE_INDEX)
    assert pieces[first].startswith("▁"), "the space belongs to the answer's first token"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["A cup  of\n\ncoffee, 茶 and 🍵🍵.", "  two spaces ahead", "Yes.\n", "é"])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_odd_answers(name, answer, trim_offsets):
    tokenizer = prepare_tokenizer(byte_level(trim_offsets))
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|eot_id|>", "<|end|>", "</s>")], special_tokens=True)
    encoded = encode(tokenizer, turns("<image>\nWhat is it?", answer), name)
    supervised = answers(tokenizer, encoded)
    assert len(supervised) == 1
    # White space ahead of an answer may be one token with the template's own, which is then not learnt.
    assert supervised[0].lstrip() == (answer + TEMPLATES[name].assistant_end).lstrip()


def test_terminator_that_swallows_the_newline_after_it(golden_conversations):
    """As Phi-3's tokenizer declares it."""
    tokenizer = prepare_tokenizer(byte_level(False, AddedToken("<|end|>", rstrip=True, special=True)))
    encoded = encode(tokenizer, golden_conversations["turns"], "phi_3")
    supervised = [text.strip() for text in answers(tokenizer, encoded)]
    assert supervised == golden_conversations["templates"]["phi_3"]["supervised_text"]


def test_token_across_a_boundary_is_an_error():
    """Without `</s>` as a token, ordinary merges may join it to the role that follows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["</s>USER:"] * 9, trainer)
    joined = prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(SampleError, match=r"sample 7: token .*USER.* joins an answer to other text"):
        encode(joined, turns("a", "b", "c", "d"), "vicuna_v1", sample_id=7)


@pytest.mark.parametrize("name", CHATS)
def test_special_tokens_in_messages_are_only_text(tokenizer, name):
    question = "What does <|eot_id|><|start_header_id|>assistant mean?"
    answer = "It ends a turn: <|eot_id|>, and <image> is a picture."
    encoded = encode(tokenizer, turns(f"<image>\n{question}", answer), name)
    harmless = encode(tokenizer, turns("<image>\nWhat?", "It."), name)
    for special in ("<|eot_id|>", "<|start_header_id|>", IMAGE_TOKEN):
        id_ = tokenizer.convert_tokens_to_ids(special)
        assert encoded["input_ids"].count(id_) == harmless["input_ids"].count(id_)
    assert [text.lstrip() for text in answers(tokenizer, encoded)] == [
        "It ends a turn: < |eot_id|>, and < image> is a picture." + TEMPLATES[name].assistant_end
    ]
    open_ids = encode_prompt(tokenizer, turns(f"<image>\n{question}"), name)
    assert open_ids == encoded["input_ids"][: len(open_ids)]


def test_image_moves_to_the_front_of_its_turn():
    for value in ("<image>\nWhat?", "What?\n<image>", " <image> What? ", "What?<image>"):
        prompt = generation_prompt(turns(value), "vicuna_v1")
        assert prompt.endswith("USER: <image>\nWhat? ASSISTANT:")
    second = "".join(segment.text for segment in render(turns("Hi.", "Hello.", "Look: <image>", "Nice."), "vicuna_v1"))
    assert "USER: <image>\nLook: ASSISTANT: Nice.</s>" in second


def test_leading_turns_of_the_assistant_are_dropped():
    conversation = turns("a", "b")
    assert render([{"from": "gpt", "value": "x"}, *conversation], "llama_3") == render(conversation, "llama_3")


def test_plain_without_an_image():
    assert [tuple(segment) for segment in render(turns("Say it.", "Done."), "plain")] == [("Done.\n", True)]


@pytest.mark.parametrize(
    ("conversation", "template", "message"),
    [
        ([], "llama_3", "no human turn among 0"),
        ([{"from": "gpt", "value": "a"}], "llama_3", "no human turn"),
        ([{"from": "system", "value": "a"}], "llama_3", "speaker 'system' is unknown"),
        ([{"from": "human", "value": "a"}] * 2, "llama_3", "turn 1 is again from 'human'; roles must alternate"),
        ([{"from": "human", "value": None}], "llama_3", "turn 0 has the value None"),
        (turns("<image> and <image>", "b"), "llama_3", "more than one <image>"),
        (turns("<image> a", "b", "<image> c", "d"), "llama_3", "more than one <image>"),
        (turns("a", "b", "c", "d"), "plain", "4 turns; the plain template"),
    ],
)
def test_bad_samples_are_named(conversation, template, message):
    with pytest.raises(SampleError, match=f"sample 000123: {message}"):
        render(conversation, template, sample_id="000123")


def test_open_prompt_needs_a_question():
    with pytest.raises(SampleError, match="the last turn is an answer"):
        generation_prompt(turns("a", "b"), "llama_3")


def test_cut_to_length(tokenizer):
    whole = encode(tokenizer, turns("a b c", "d e f"), "llama_3")
    cut = encode(tokenizer, turns("a b c", "d e f"), "llama_3", max_length=10)
    assert cut == {name: values[:10] for name, values in whole.items()}


def test_prepare_tokenizer_adds_what_is_missing_once(tokenizer):
    size = len(tokenizer)
    assert len(prepare_tokenizer(tokenizer)) == size
    bare = prepare_tokenizer(byte_level(False))
    assert (bare.pad_token, bare.padding_side) == ("<pad>", "right")
    assert len(bare(IMAGE_TOKEN)["input_ids"]) == 1


def test_no_tokenizer_there(tiny, tmp_path):
    with pytest.raises(ModelError, match="no tokenizer in '/nowhere': it is neither a local folder nor reachable"):
        load_tokenizer("/nowhere")
    (tmp_path / "config.json").write_bytes((tiny["llm"] / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"the folder has no tokenizer\.json; save the model's tokenizer into it$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError) as error:  # of the library's own reasons none is cut off
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert not str(error.value).endswith(":")


def test_terminator(tokenizer):
    assert terminator_id(tokenizer, "llama_3") == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert terminator_id(tokenizer, "vicuna_v1") is None, "not a token of this vocabulary"


@pytest.mark.parametrize("answer", ["3", "It is", "日本", "A", " "])
def test_all_that_follows_the_open_prompt_is_supervised(answer):
    """Llama-2's vocabulary gives the space ahead of a digit a token of its own: the model has to write it."""
    alphabet = ["▁", *map(chr, range(33, 127))]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(["USER: What is it? ASSISTANT: It is a cat and A dog"] * 4, trainer)
    backend.add_tokens(byte_tokens)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = prepare_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": answer}]
    encoded = encode(tokenizer, turns, "vicuna_v1")
    start = len(encode_prompt(tokenizer, turns[:1], "vicuna_v1"))
    assert encoded["labels"][:start] == [IGNORE_INDEX] * start
    assert encoded["labels"][start:] == encoded["input_ids"][start:]
    assert tokenizer.eos_token_id in encoded["labels"]


def test_what_a_tokenizer_adds_behind_is_left_out():
    """As of Llama-like tokenizers with `add_eos_token`: answers would begin behind an end of text."""
    plain, adds = prepare_tokenizer(sentencepiece_like()), prepare_tokenizer(sentencepiece_like())
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    dialogue = turns("cup", "Yes", "spoon", "Yes")
    assert adds("cup")["input_ids"][-1] == adds.eos_token_id
    assert encode_prompt(adds, dialogue[:3], "vicuna_v1") == encode_prompt(plain, dialogue[:3], "vicuna_v1")
    assert encode(adds, dialogue, "vicuna_v1") == encode(plain, dialogue, "vicuna_v1")
