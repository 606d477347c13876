"""The tokenizer of the world's language: byte-level BPE, in which its names and fixed phrases are one token each.

So a question is some twelve tokens, and to look a name up is to look one token up.
Other text is read too, byte by byte where need be. The chat template is the least that `model.template: chat` takes: a
role's token, the message, an end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plan import KINDS
from .text import CAPTION_PROMPT, SELECT, STEPS, SUFFIX, letter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, USER, ASSISTANT, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
VOCABULARY = 384
"""Of the BPE: the 256 bytes, special tokens and the words of the world."""
PLACES = ("column {}", ", row {}", ", distance {}")
"""What a step of a place is in words."""
FIRST = (*KINDS, "left", "right", "above", "below", *map(str, range(STEPS)))
"""Words that answers begin with: tokens of their own there, without the space that is ahead of them elsewhere."""
PHRASES = (
    *(f" {word}" for word in FIRST),
    *FIRST,
    *map(letter, range(6)),
    *(place.format(step) for place in PLACES for step in range(STEPS)),
    CAPTION_PROMPT,
    "Where is the",
    "How many",
    " are in the image",
    "Considering the relative positions of the",
    " in the image provided, where is the",
    " located with respect to the",
    "Which object is closer to the camera taking this photo, the",
    "Estimate the real-world distances between objects in this image. Which object is closer to the",
    ": a",
    " or the",
    " and the",
    ", the",
    ", a",
    " and a",
    f"?{SELECT}\n",
    SUFFIX,
)
"""One token each: what things are called, where told scenes put them, and the fixed words of questions."""
TEMPLATE = (
    "{{ '" + BEGIN + "' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '" + END + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def world_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer every time."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}+|[^\s\p{L}\p{N}]|\s")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, USER, ASSISTANT, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f" {kind} objects {kind}s and the or left right above below" for kind in KINDS]
    text += ["there are", "it is", "the"] * len(KINDS)
    text += [f" {number} {number}" for number in range(STEPS)]
    backend.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return tokenizer
