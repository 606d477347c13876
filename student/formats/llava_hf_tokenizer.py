"""The tokenizer of an exported model: task tokens are tokens, and stock tools get the ids that training had.

What stock tools do with a prompt differs. Some let the tokenizer add BOS, some take the chat template's text as it is;
some use no chat template at all. So a tokenizer that pleases all is tried first, read back as a user reads it, and kept
only if prompts come out token by token as in training; then the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from olavlm.student.errors import ModelError
from olavlm.student.text.conversation import IMAGE_TOKEN, encode, encode_prompt, terminator_id
from olavlm.student.text.templates import CHAT

from .llava_hf_template import exported_template

Turns = Sequence[dict[str, str]]


class _Prompt(NamedTuple):
    turns: Turns
    is_open: bool
    tokens: list[str]
    """As in training, task tokens behind the image."""


def _turns(*texts: str) -> Turns:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


_PROBES = (
    _turns(f"{IMAGE_TOKEN}\nWhat is this?", "A cup, 3 spoons.", "Is it full?", "Yes."),
    _turns(f"What is this? {IMAGE_TOKEN}", " A cup."),
    _turns("Name two animals.", "A dog and a cat.", f"{IMAGE_TOKEN}\nAnd here?", "None."),
    _turns("  Is it?\n", "Yes"),
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer with its chat template, and what its users should know."""

    tokenizer: PreTrainedTokenizerBase
    task_tokens: list[str]
    """In the order of insertion."""
    image_alone: bool
    """Whether task tokens follow an `<image>` of a prompt that no template wrote, too."""
    beginning: str
    """What is ahead of every prompt, such as BOS; empty for a chat template of the tokenizer's own, which writes it."""
    writes_beginning: bool
    """Whether the chat template writes that, or else the tokenizer adds it."""


def task_token_names(names: Sequence[str], number: int) -> list[str]:
    """`<gen_0>` and so on: `number` of each task, task after task."""
    return [f"<{name}_{i}>" for name in names for i in range(number)]


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str, task_tokens: list[str]) -> ExportedTokenizer:
    """A copy for stock tools; ends of an answer are its EOS token, and it pads on the left, as generation needs.

    Args:
        tokenizer: of the model, which stays as it is.
        template: name of the model's prompt template, which has roles.
        task_tokens: to be added, all new.

    Raises:
        ModelError: a token that is there already, or prompts that stock tools cannot be given exactly.
    """
    known = [token for token in task_tokens if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(f"the tokenizer has a token {known[0]!r} already, which a task token would be called")
    beginning = _beginning(tokenizer, template)
    wanted = _wanted(tokenizer, template, task_tokens)
    difference = ""
    for writes_beginning in (True, False) if beginning else (True,):
        for image_alone in (True, False) if task_tokens else (False,):
            content = _content(tokenizer, task_tokens, writes_beginning, image_alone)
            jinja = exported_template(tokenizer, template, task_tokens, beginning if writes_beginning else "")
            exported = _reloaded(_of_content(tokenizer, content, jinja, terminator_id(tokenizer, template)))
            difference = _difference(exported, wanted, task_tokens, image_alone)
            if not difference:
                return ExportedTokenizer(exported, task_tokens, image_alone, beginning, writes_beginning)
    raise ModelError(f"prompts of template {template} are other ones with stock tools: {difference}")


def generic_tokenizer_class(folder: Path) -> None:
    """Has a saved tokenizer be read from `tokenizer.json` as it is, by any version of the library."""
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beginning(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What the tokenizer adds ahead of a prompt; a tokenizer's own chat template writes all itself."""
    if template == CHAT:
        return ""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    ahead = len(whole) - len(bare)
    if whole[ahead:] != bare:
        raise ModelError(
            "the tokenizer adds tokens behind a prompt, ahead of the answer; stock tools cannot leave them"
        )
    return "".join(tokenizer.convert_ids_to_tokens(whole[:ahead]))


def _wanted(tokenizer: PreTrainedTokenizerBase, template: str, task_tokens: list[str]) -> list[_Prompt]:
    prompts = []
    for turns in _PROBES:
        for is_open, ids in (
            (False, encode(tokenizer, turns, template)["input_ids"]),
            (True, encode_prompt(tokenizer, turns[:-1], template)),
        ):
            tokens = _with_tasks(tokenizer.convert_ids_to_tokens(ids), task_tokens)
            prompts.append(_Prompt(turns[:-1] if is_open else turns, is_open, tokens))
    return prompts


def _with_tasks(tokens: list[str], task_tokens: list[str]) -> list[str]:
    return [token for one in tokens for token in (one, *(task_tokens if one == IMAGE_TOKEN else ()))]


def _difference(
    tokenizer: PreTrainedTokenizerBase, wanted: list[_Prompt], task_tokens: list[str], image_alone: bool
) -> str:
    """Where stock tools get other tokens than wanted; empty if nowhere."""

    def tokens(text: str, added: bool = True) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=added)["input_ids"])

    for turns, is_open, prompt in wanted:
        for messages in _messages(turns):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
            expanded = text.replace(IMAGE_TOKEN, 3 * IMAGE_TOKEN)  # as the processor puts image tokens in
            thrice = [token for one in prompt for token in [one] * (3 if one == IMAGE_TOKEN else 1)]
            for got, right in ((tokens(text), prompt), (tokens(expanded), thrice)):
                if got != right:
                    at = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), 0)
                    return f"{got[at : at + 5]} in place of {right[at : at + 5]} in {text!r}"
    if image_alone:
        behind = _with_tasks([IMAGE_TOKEN], task_tokens)
        for text in (f"USER: {IMAGE_TOKEN}\nWhat?", f"{2 * IMAGE_TOKEN} What?", f"What? {IMAGE_TOKEN} ASSISTANT:"):
            at = text.rindex(IMAGE_TOKEN)
            if tokens(text, False) != tokens(text[:at] + "".join(behind) + text[at + len(IMAGE_TOKEN) :], False):
                return f"no task tokens follow in {text!r}"
            if not set(behind) <= set(tokens(text)):
                return f"no task tokens in {text!r}"
    return ""


def _messages(turns: Turns) -> Iterator[list[dict[str, Any]]]:
    """Turns as messages of the library: with text for content, and with lists of parts."""
    roles = {"human": "user", "gpt": "assistant"}
    yield [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    yield [{"role": roles[turn["from"]], "content": _parts(turn["value"])} for turn in turns]


def _parts(text: str) -> list[dict[str, str]]:
    pieces = re.split(f"({IMAGE_TOKEN})", text)
    return [{"type": "image"} if piece == IMAGE_TOKEN else {"type": "text", "text": piece} for piece in pieces if piece]


def _content(
    tokenizer: PreTrainedTokenizerBase, task_tokens: list[str], writes_beginning: bool, image_alone: bool
) -> dict[str, Any]:
    """What `tokenizer.json` is to hold."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}
    first = 1 + max(tokenizer.get_vocab().values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": first + i, "content": token, **plain} for i, token in enumerate(task_tokens)]
    if image_alone:  # only tokens that are looked for in normalised text can be put in by the normaliser
        for token in content["added_tokens"]:
            token["normalized"] |= token["content"] in (IMAGE_TOKEN, *task_tokens)
        content["normalizer"] = _after_image(content["normalizer"], task_tokens)
    if writes_beginning:
        content["post_processor"] = _without_template(content["post_processor"])
    return content


def _after_image(normalizer: dict[str, Any] | None, task_tokens: list[str]) -> dict[str, Any]:
    """Puts task tokens behind the last of a run of image tokens, unless they are there, or the text ends with it: the
    normaliser is applied to the names of tokens too, and `<image>` must stay what it is called."""
    pattern = f"(?<={IMAGE_TOKEN})(?=[\\s\\S])(?!{IMAGE_TOKEN}|{re.escape(task_tokens[0])})"
    insert = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "".join(task_tokens)}
    if normalizer is None:
        return insert
    return {"type": "Sequence", "normalizers": [normalizer, insert]}


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor that adds no tokens."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_template, processor["processors"]) if part is not None]
        return {"type": "Sequence", "processors": kept} if kept else None
    return None


def _of_content(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], jinja: str, terminator: int | None
) -> PreTrainedTokenizerBase:
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if terminator is not None:
        named["eos_token"] = tokenizer.convert_ids_to_tokens(terminator)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: token for name, token in named.items() if token is not None},
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        padding_side="left",
        chat_template=jinja,
    )


def _reloaded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """As its users get it."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        generic_tokenizer_class(Path(folder))
        return AutoTokenizer.from_pretrained(folder)
