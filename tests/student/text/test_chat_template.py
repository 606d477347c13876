"""Templates in the manner of well-known models, written for these tests."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from olavlm.student.errors import RecipeError, SampleError
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    check_turns,
    encode,
    encode_prompt,
    load_tokenizer,
    prepare_tokenizer,
    terminator_id,
)
from olavlm.student.text.templates import check_template
from olavlm.student.training.trainer import train

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
END_OF_ALL = (  # an end of text behind the whole conversation, which later turns push on
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DAY = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|assistant|>", "<|end|>", "<pad>",
]  # fmt: skip

QUESTIONS = ["<image>\nWhat is on the table?", "Is the spoon left of the cup?"]
ANSWERS = ["A cup of coffee and a spoon.", "Yes, it is to the left."]
DIALOGUE = [
    {"from": "human", "value": QUESTIONS[0]},
    {"from": "gpt", "value": ANSWERS[0]},
    {"from": "human", "value": QUESTIONS[1]},
    {"from": "gpt", "value": ANSWERS[1]},
]
WHOLE = {  # by hand
    "chatml": (
        CHATML,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is on the table?"
        "<|im_end|>\n<|im_start|>assistant\n{A cup of coffee and a spoon.<|im_end|>}\n<|im_start|>user\nIs the spoon "
        "left of the cup?<|im_end|>\n<|im_start|>assistant\n{Yes, it is to the left.<|im_end|>}\n",
    ),
    "inst": (
        INST,
        "<s>[INST] <image>\nWhat is on the table? [/INST]{ A cup of coffee and a spoon. </s>}[INST] Is the spoon left "
        "of the cup? [/INST]{ Yes, it is to the left. </s>}",
    ),
    "turns": (
        TURNS,
        "<s><start_of_turn>user\n<image>\nWhat is on the table?<end_of_turn>\n<start_of_turn>model\n{A cup of coffee "
        "and a spoon.<end_of_turn>}\n<start_of_turn>user\nIs the spoon left of the cup?<end_of_turn>\n<start_of_turn>"
        "model\n{Yes, it is to the left.<end_of_turn>}\n",
    ),
    "end of all": (
        END_OF_ALL,
        "<|user|>\n<image>\nWhat is on the table?<|end|>\n<|assistant|>\n{A cup of coffee and a spoon.<|end|>}\n"
        "<|user|>\nIs the spoon left of the cup?<|end|>\n<|assistant|>\n{Yes, it is to the left.<|end|>}\n</s>",
    ),
}
"""Template, and its text of the dialogue, in which braces hold what is learnt."""

REFUSED = {
    "no template": (None, "the tokenizer has no chat template"),
    "last turn differs": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        r"the chat template writes '<think>.*' where answer 1 \('A cup of coffee and a spoon.'\) stands",
    ),
    "earlier thinking taken out": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        r"before answer 1 in another way once it is answered \('.*<think>",
    ),
    "end of the last turn alone": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% if loop.last %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        r"once it is answered|rewrites answer 1 or what is before it once the conversation goes on",
    ),
    "only the last question": (
        "{% for m in messages[-2:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        r"the chat template writes the conversation before answer 1 in another way once it is answered",
    ),
    "no generation prompt": (
        CHATML.partition("{% if add_generation_prompt %}")[0],
        r"the chat template writes '<\|im_start\|>assistant\\n.*' where answer 1 \('A cup of coffee and a spoon.'\)",
    ),
    "another generation prompt": (
        CHATML.replace("assistant\n{% endif %}", "bot\n{% endif %}"),
        r"before answer 1 in another way once it is answered \('.*bot.*' becomes '.*assistant",
    ),
    "no end": (CHATML.replace("<|im_end|>", ""), r"has no special token after answer 1 .* would not learn to end"),
    "no end at all": (
        "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}",
        r"has no special token after answer 1 .* would not learn to end",
    ),
    "rewritten answers": (
        CHATML.replace("m['content']", "m['content'] | upper"),
        r"where answer 1 \('A cup of coffee and a spoon.'\) stands",
    ),
    "one turn only": (
        "{% if messages | length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}" + CHATML,
        "refuses the conversation: one question at a time",
    ),
    "no template language": ("{% for %}", "refuses the conversation"),
}


@pytest.fixture(scope="module")
def backend():
    """A byte-level tokenizer, as JSON, so that each test has its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [*QUESTIONS, *ANSWERS, "You are a helpful assistant. user model [INST] [/INST]"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer_with(backend):
    def make(template):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.chat_template = template
        return prepare_tokenizer(tokenizer)

    return make


def marked(tokenizer, encoded):
    """The text, with what is learnt in braces."""
    text, inside = "", False
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        if (label != IGNORE_INDEX) != inside:
            text += "}" if inside else "{"
            inside = not inside
        text += tokenizer.decode([token])
    return text + "}" * inside


@pytest.mark.parametrize("name", WHOLE)
def test_prompts_and_what_is_learnt_by_hand(tokenizer_with, name):
    template, expected = WHOLE[name]
    tokenizer = tokenizer_with(template)
    check_template("chat", tokenizer)
    encoded = encode(tokenizer, DIALOGUE, "chat")
    assert marked(tokenizer, encoded) == expected
    assert encoded["input_ids"] == tokenizer.apply_chat_template(
        [
            {"role": role, "content": text}
            for pair in zip(QUESTIONS, ANSWERS, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ],
        return_dict=False,
    ), "the ids that the library itself gives"
    for questions in (1, 3):  # turns of an open prompt
        ids = encode_prompt(tokenizer, DIALOGUE[:questions], "chat")
        assert ids == encoded["input_ids"][: len(ids)]
        assert encoded["labels"][len(ids)] != IGNORE_INDEX, "what generation writes first is learnt"
    assert encoded["input_ids"].count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_text_only(tokenizer_with, name):
    tokenizer = tokenizer_with(WHOLE[name][0])
    encoded = encode(tokenizer, [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "chat")
    learnt = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert learnt.split("Hello.")[0].strip() == ""
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) not in encoded["input_ids"]
    assert terminator_id(tokenizer, "chat") == next(i for i in reversed(encoded["labels"]) if i != IGNORE_INDEX)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("answer", ["  two spaces ahead", "Yes.\n", "a\n\nb 茶 🍵", "<|im_end|> ends a turn", "3"])
def test_odd_answers(tokenizer_with, name, answer):
    tokenizer = tokenizer_with(WHOLE[name][0])
    turns = [DIALOGUE[0], {"from": "gpt", "value": answer}, *DIALOGUE[2:]]
    encoded = encode(tokenizer, turns, "chat")
    first, second = marked(tokenizer, encoded).split("{", 1)[1].split("}", 1)
    learnt = tokenizer.decode(encoded["input_ids"]) and first
    if answer.isascii():  # a byte-level token may be a part of a character
        assert answer.replace("<|im_end|>", "< |im_end|>").strip() in learnt
    assert any(learnt.endswith(end) for end in SPECIALS)
    assert second.count("{") == 1


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_masked_exactly(tokenizer_with, name):
    template, reason = REFUSED[name]
    with pytest.raises(RecipeError, match=f"template chat: .*{reason}"):
        check_template("chat", tokenizer_with(template))


def test_answers_that_a_template_cuts(tokenizer_with):
    """Templates of models that think take the thinking out of earlier answers: only such a conversation is refused."""
    tokenizer = tokenizer_with(CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"))
    check_template("chat", tokenizer)
    encode(tokenizer, DIALOGUE, "chat")
    thinking = [DIALOGUE[0], {"from": "gpt", "value": "<think>Hm.</think>A cup."}]
    with pytest.raises(SampleError, match=r"sample 7: the chat template writes 'A cup\..* where answer 1"):
        encode(tokenizer, thinking, "chat", sample_id=7)


def test_image_that_a_template_loses(tokenizer_with):
    tokenizer = tokenizer_with(CHATML.replace("m['content']", "m['content'] | replace('<image>', '')"))
    with pytest.raises(SampleError, match="writes <image> 0 times, and the conversation 1 times"):
        encode(tokenizer, DIALOGUE, "chat")


def test_day_is_always_the_same(tokenizer_with):
    tokenizer = tokenizer_with(DAY)
    check_template("chat", tokenizer)
    assert tokenizer.decode(encode(tokenizer, DIALOGUE, "chat")["input_ids"]).startswith("Today is 26 Jul 2024.")


def test_bad_conversations_are_known_without_a_tokenizer():
    with pytest.raises(SampleError, match="sample 7: no human turn"):
        check_turns([], "chat", 7)
    with pytest.raises(SampleError, match="roles must alternate"):
        check_turns([DIALOGUE[0], DIALOGUE[0]], "chat")
    with pytest.raises(RecipeError, match="template 'chatty' is unknown; choose one of: chat, llama_3"):
        check_turns(DIALOGUE, "chatty")
    check_turns(DIALOGUE, "chat")


def test_open_prompt_needs_a_question(tokenizer_with):
    with pytest.raises(SampleError, match="sample 7: the last turn is an answer"):
        encode_prompt(tokenizer_with(CHATML), DIALOGUE, "chat", sample_id=7)


def test_template_of_a_file(tiny, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TURNS)
    assert load_tokenizer(tiny["llm"], file).chat_template == TURNS
    with pytest.raises(RecipeError, match=r"model.chat_template '/nowhere.jinja' cannot be read"):
        load_tokenizer(tiny["llm"], "/nowhere.jinja")


def test_model_of_a_chat_template(tiny, tokenizer, tmp_path):
    """Saved with its template, and answering in it; a tokenizer without a good one is refused ahead of any loading."""
    model = OlaVLM.build(tiny["llm"], tiny["encoder"], tokenizer, template="chat")
    model.save_pretrained(tmp_path)
    loaded = OlaVLM.from_pretrained(tmp_path)
    assert (loaded.config.template, loaded.tokenizer.chat_template) == ("chat", tokenizer.chat_template)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in loaded.stop_ids(loaded.tokenizer)
    torch.manual_seed(0)
    answer = loaded.answer(loaded.tokenizer, None, "Hi.", max_new_tokens=3)
    ids = torch.tensor([encode_prompt(tokenizer, [{"from": "human", "value": "Hi."}], "chat")])
    stops = loaded.stop_ids(tokenizer)
    expected = model.llm.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=stops, pad_token_id=4)
    assert answer == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="template chat: the tokenizer has no chat template; choose another"):
        OlaVLM.build("/nowhere", tiny["encoder"], tokenizer, template="chat")


def test_training_with_a_chat_template(recipe, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}<|eot_id|>"
                    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    settings = {"model.template": "chat", "model.chat_template": file, "train.max_steps": 1}
    run = train(recipe("pt", **settings), "pt", {})
    assert load_tokenizer(run).chat_template == file.read_text()
    assert (run / "adapter.safetensors").is_file()
    whole = train(recipe("ift", **settings, **{"init.from": str(run)}), "ift", {})  # by the same recipe
    other = tmp_path / "other.jinja"
    other.write_text(file.read_text().replace("assistant: ", "answer: "))
    for start in (run, whole):
        changed = {
            **settings,
            "model.chat_template": other,
            "init.from": str(start),
            "train.output_dir": tmp_path / "x",
        }
        with pytest.raises(RecipeError, match=rf"other.jinja' is another template than the one that {start} was"):
            train(recipe("ift", **changed), "ift", {})
