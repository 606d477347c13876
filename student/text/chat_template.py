"""A tokenizer's own chat template: prompts in which the answers are found exactly, or which are refused.

The template is a program of the model's makers. What is learnt has to be what generation will see, so for every answer
    open     the conversation up to its question, with the generation prompt, begins the whole text
    answer   follows at once, but for white space, as it was given or without white space around it
    end      is the special token right after it, again but for white space
    so far   the conversation up to that end begins the whole text too: nothing is rewritten later
and a template that breaks one of these is refused with the reason.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from olavlm.student.errors import RecipeError, SampleError

IMAGE_TOKEN = "<image>"
_PARTS = re.compile(r"""['"]type['"]|\.type\b""")

Message = dict[str, str]
"""{"role": "user" | "assistant", "content": text}"""

_PROBE: list[Message] = [
    {"role": "user", "content": "What is on the table?"},
    {"role": "assistant", "content": "A cup of coffee and a spoon."},
    {"role": "user", "content": "Is the spoon left of the cup?"},
    {"role": "assistant", "content": "Yes, it is to the left."},
]
SOME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Ahead of a template that writes the day, or a prompt would be another one tomorrow."""


class MarkedPrompt(NamedTuple):
    """A conversation's text, and where the model is to write it."""

    text: str
    answers: list[tuple[int, int]]
    """Characters from the end of the open prompt to the end of the terminator."""
    terminators: list[str]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer whose chat template cannot be masked exactly, before anything is trained with it.

    Raises:
        RecipeError: no chat template, or why answers cannot be marked.
    """
    try:
        mark_answers(tokenizer, _PROBE)
    except SampleError as error:
        raise RecipeError(
            f"template chat: {error}; choose another model.template, or give model.chat_template a Jinja file that "
            "does otherwise"
        ) from error


def use_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | Path) -> None:
    """Puts a file's Jinja template into the tokenizer, which keeps it when it is saved. RecipeError without one."""
    tokenizer.chat_template = _read(file)


def check_template_file(tokenizer: PreTrainedTokenizerBase, file: str | Path, run: str | Path) -> None:
    """RecipeError if the file's template is another than the one that `run` was trained with, its tokenizer's."""
    if _read(file) != tokenizer.chat_template:
        raise RecipeError(
            f"model.chat_template {str(file)!r} is another template than the one that {run} was trained with, which "
            "its tokenizer keeps; leave it out"
        )


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"model.chat_template {str(file)!r} cannot be read: {error}; name a Jinja file") from error


def terminator(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends an answer. SampleError as `mark_answers`."""
    return mark_answers(tokenizer, _PROBE).terminators[-1]


def open_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The prompt that the model continues, without spaces at its end: these are the model's to write.

    Raises:
        SampleError: the template refuses the conversation.
    """
    return _render(tokenizer, messages, True).rstrip(" ")


def mark_answers(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> MarkedPrompt:
    """The text of a conversation that begins with the user and alternates, with its answers.

    Raises:
        SampleError: the template refuses the conversation, or its answers cannot be marked exactly; why.
    """
    text = _render(tokenizer, messages, False)
    ends = _special_token_after(tokenizer)
    answers, terminators = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begun = _render(tokenizer, messages[:index], True)
        if not text.startswith(begun):
            raise SampleError(
                f"the chat template writes the conversation before answer {index // 2 + 1} in another way once it is "
                f"answered ({_difference(begun, text)})"
            )
        number, so_far = index // 2 + 1, _render(tokenizer, messages[: index + 1], False)
        start = _after_answer(so_far, len(begun), message["content"], number)
        found = ends(so_far, start)
        if found is None:
            raise SampleError(
                f"the chat template has no special token after answer {number} "
                f"({so_far[start : start + 40]!r} follows), so that a model would not learn to end"
            )
        if not text.startswith(so_far[: found.end()]):
            raise SampleError(
                f"the chat template rewrites answer {number} or what is before it once the conversation goes on "
                f"({_difference(so_far, text)})"
            )
        answers.append((len(begun.rstrip(" ")), found.end()))
        terminators.append(found[1])
    return MarkedPrompt(text, answers, terminators)


def _after_answer(text: str, start: int, answer: str, number: int) -> int:
    """Where an answer ends that the template writes at `start`, or behind white space there."""
    if text.startswith(answer, start):
        return start + len(answer)
    bare, begin = answer.strip(), start
    while begin < len(text) and text[begin].isspace():
        begin += 1
    if text.startswith(bare, begin):
        return begin + len(bare)
    raise SampleError(
        f"the chat template writes {text[start : start + 60]!r} where answer {number} ({shorten(bare, 40)!r}) stands"
    )


def _special_token_after(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, int], re.Match | None]:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile(rf"\s*({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})").match


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], is_open: bool) -> str:
    if tokenizer.chat_template is None:
        raise SampleError("the tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = SOME_DAY + template
        # A template that writes the image itself is given it as a part of the message, as the library's processors do.
        conversation = [_in_parts(message) for message in messages] if takes_parts(template) else list(messages)
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=is_open
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise SampleError(f"the chat template refuses the conversation: {error}") from error
    given, written = "".join(message["content"] for message in messages).count(IMAGE_TOKEN), text.count(IMAGE_TOKEN)
    if given != written:
        raise SampleError(f"the chat template writes {IMAGE_TOKEN} {written} times, and the conversation {given} times")
    return text


def takes_parts(template: str) -> bool:
    """Whether a Jinja template writes the image itself, where a message's content has such a part."""
    return IMAGE_TOKEN in template and _PARTS.search(template) is not None


def _in_parts(message: Message) -> dict[str, Any]:
    """The message with a list for its content: the image, if there is one, ahead of the text."""
    content = message["content"]
    text = content.removeprefix(f"{IMAGE_TOKEN}\n")
    image = [] if text == content else [{"type": "image"}]
    return {"role": message["role"], "content": [*image, {"type": "text", "text": text}]}


def _difference(one: str, other: str) -> str:
    """Where two texts part."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, same - 20)
    return f"{one[begin : same + 40]!r} becomes {other[begin : same + 40]!r}"
