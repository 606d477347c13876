"""Prompts: a LLaVA conversation to the text of a chat template, and to token ids with labels.

A prompt is tokenised once, as a whole; labels follow from the character spans of the answers.
The templates are those of LLaVA, and `chat`, the tokenizer's own (`chat_template`).
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from olavlm.student.errors import ModelError, SampleError
from olavlm.student.loading import why_not_loaded

from .chat_template import (
    IMAGE_TOKEN,
    mark_answers,
    open_prompt,
    terminator,
    use_chat_template,
)
from .templates import CHAT, Template, get_template

PAD_TOKEN = "<pad>"
IGNORE_INDEX = -100


class Segment(NamedTuple):
    """A piece of a prompt, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class _Turn:
    human: bool
    text: str
    image: bool


def check_turns(turns: Sequence[Mapping[str, str]], template: str, sample_id: Any = None) -> None:
    """RecipeError and SampleError as `render`, as far as they are known without a tokenizer."""
    parsed = _parse(turns, sample_id)
    if template != CHAT:
        _render(parsed, get_template(template), sample_id)


def render(turns: Sequence[Mapping[str, str]], template: str, sample_id: Any = None) -> list[Segment]:
    """The training prompt in pieces; their texts joined are the whole prompt, without BOS.

    Args:
        turns: LLaVA turns, {"from": "human" | "gpt", "value": text}. Turns ahead of the first human one are dropped.
            `<image>` in a human turn moves to the turn's beginning.
        template: a name in `TEMPLATES` or `ALIASES`; `chat` needs a tokenizer and is for `encode`.
        sample_id: names the sample in errors.

    Raises:
        RecipeError: unknown template.
        SampleError: unknown speaker, no turns, roles that do not alternate, more than one `<image>`.
    """
    return _render(_parse(turns, sample_id), get_template(template), sample_id)


def generation_prompt(turns: Sequence[Mapping[str, str]], template: str, sample_id: Any = None) -> str:
    """The prompt that the model continues: the last turn is a human one, the text ends with the assistant's role.

    Raises:
        RecipeError, SampleError: as `render`; also a template without roles, or a last turn that is not a human one.
    """
    return _render_open(_parse(turns, sample_id), template, sample_id)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    template: str,
    max_length: int | None = None,
    sample_id: Any = None,
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation, from one tokenisation of the whole prompt.

    Labels are the ids of the answers and their terminators, and -100 elsewhere. A token that holds characters of an
    answer and, beside them, only white space of the prompt (SentencePiece joins a word to the space before it) belongs
    to the answer. Special tokens written out in a message lose their meaning: `<|eot_id|>` becomes `< |eot_id|>`.

    Args:
        tokenizer: a fast tokenizer that knows `<image>` (`prepare_tokenizer`).
        max_length: longest list returned; the end is cut.

    Returns:
        `input_ids` and `labels`, lists of one length.

    Raises:
        RecipeError, SampleError: as `render`; also a token that joins an answer to other visible text, and what
            `chat_template` cannot mark exactly.
    """
    parsed = _neutralise(_parse(turns, sample_id), tokenizer)
    text, spans = _mark_chat(tokenizer, parsed, sample_id) if template == CHAT else _mark(parsed, template, sample_id)
    ids, extents = _tokenise(tokenizer, text, template)
    labels = [IGNORE_INDEX] * len(ids)
    ends = [end for _, end in spans]  # ascending
    for index, extent in enumerate(extents):
        if extent is not None and _is_answer(text, extent, spans[bisect_right(ends, extent[0]) :], sample_id):
            labels[index] = ids[index]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    template: str,
    sample_id: Any = None,
) -> list[int]:
    """Token ids of `generation_prompt`, special tokens in messages neutralised as in `encode`."""
    parsed = _neutralise(_parse(turns, sample_id), tokenizer)
    if template == CHAT:
        _check_question(parsed, sample_id)
        with _named(sample_id):
            text = open_prompt(tokenizer, _messages(parsed))
    else:
        text = _render_open(parsed, template, sample_id)
    return _tokenise(tokenizer, text, template)[0]


def terminator_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """Id of the token that ends an answer; None when the tokenizer writes the terminator in several tokens."""
    end = terminator(tokenizer) if template == CHAT else get_template(template).assistant_end
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds `<image>` and, where there is no padding token, `<pad>`, in place; pads on the right. Idempotent."""
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def load_tokenizer(
    path: str | Path, chat_template: str | Path | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint (hub id or folder), prepared.

    Args:
        chat_template: a Jinja file in place of its own chat template.
        config: of the model, where the library cannot read the checkpoint's own.

    Raises:
        ModelError: there is no tokenizer.
        RecipeError: no such file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), config=config)
    except Exception as error:  # what the tokenizers library raises has no class of its own
        reason = why_not_loaded(path, error)
        if Path(path).is_dir() and not any(f.name.startswith(("tokenizer", "vocab")) for f in Path(path).iterdir()):
            reason = "the folder has no tokenizer.json; save the model's tokenizer into it"
        raise ModelError(f"no tokenizer in {str(path)!r}: {reason}") from error
    if chat_template is not None:
        use_chat_template(tokenizer, chat_template)
    return prepare_tokenizer(tokenizer)


@contextmanager
def _named(sample_id: Any) -> Iterator[None]:
    """Puts the sample into an error."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{_where(sample_id)}{error}") from error


def _where(sample_id: Any) -> str:
    return "" if sample_id is None else f"sample {sample_id}: "


def _parse(turns: Sequence[Mapping[str, str]], sample_id: Any) -> list[_Turn]:
    where = _where(sample_id)
    roles = [turn.get("from") for turn in turns]
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        raise SampleError(f"{where}speaker {unknown[0]!r} is unknown; turns are from 'human' or 'gpt'")
    if "human" not in roles:
        raise SampleError(f"{where}no human turn among {len(turns)} turns")
    turns = turns[roles.index("human") :]
    parsed = []
    for index, turn in enumerate(turns):
        human, text = turn["from"] == "human", turn.get("value")
        if not isinstance(text, str):
            raise SampleError(f"{where}turn {index} has the value {text!r}; it must be text")
        if human != (index % 2 == 0):
            raise SampleError(f"{where}turn {index} is again from {turn['from']!r}; roles must alternate")
        image = human and IMAGE_TOKEN in text
        if human and text.count(IMAGE_TOKEN) + sum(turn.image for turn in parsed) > 1:
            raise SampleError(f"{where}more than one {IMAGE_TOKEN}; a sample has one image at most")
        parsed.append(_Turn(human, text.replace(IMAGE_TOKEN, "").strip() if image else text, image))
    return parsed


def _render(turns: Sequence[_Turn], template: Template, sample_id: Any) -> list[Segment]:
    where = _where(sample_id)
    if not template.chat:
        if len(turns) != 2:
            raise SampleError(f"{where}{len(turns)} turns; the plain template takes one question and one caption")
        image = [Segment(IMAGE_TOKEN, False)] if turns[0].image else []
        return [*image, Segment(turns[1].text + template.assistant_end, True)]
    segments = [Segment(template.system, False)]
    for turn in turns:
        if turn.human:
            image = f"{IMAGE_TOKEN}\n" if turn.image else ""
            segments.append(Segment(f"{template.user}{image}{turn.text}{template.user_end}", False))
        else:
            segments.append(Segment(template.assistant, False))
            segments.append(Segment(turn.text + template.assistant_end, True))
    return segments


def _mark(turns: Sequence[_Turn], template: str, sample_id: Any) -> tuple[str, list[tuple[int, int]]]:
    """The prompt of a named template, and where its answers stand."""
    text, spans = "", []
    for segment in _render(turns, get_template(template), sample_id):
        if segment.supervised:
            # From where the open prompt ends: a space ahead of an answer is the model's to write, and SentencePiece
            # gives it a token of its own before a digit.
            spans.append((len(text.rstrip(" ")), len(text) + len(segment.text)))
        text += segment.text
    return text, spans


def _mark_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[_Turn], sample_id: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The same of the tokenizer's own template."""
    with _named(sample_id):
        marked = mark_answers(tokenizer, _messages(turns))
    return marked.text, marked.answers


def _messages(turns: Sequence[_Turn]) -> list[dict[str, str]]:
    """Turns as chat templates take them, an image ahead of its turn's text."""
    return [
        {"role": "user" if turn.human else "assistant", "content": f"{IMAGE_TOKEN}\n" * turn.image + turn.text}
        for turn in turns
    ]


def _check_question(turns: Sequence[_Turn], sample_id: Any) -> None:
    if not turns[-1].human:
        raise SampleError(f"{_where(sample_id)}the last turn is an answer; a prompt to continue ends with a human turn")


def _render_open(turns: Sequence[_Turn], template: str, sample_id: Any) -> str:
    if not get_template(template).chat:
        raise SampleError(f"{_where(sample_id)}template {template!r} has no roles to answer in; choose a chat template")
    _check_question(turns, sample_id)
    segments = _render(turns, get_template(template), sample_id)
    return "".join(segment.text for segment in segments) + get_template(template).assistant.rstrip(" ")


def _neutralise(turns: Iterable[_Turn], tokenizer: PreTrainedTokenizerBase) -> list[_Turn]:
    """Splits special tokens that are written out in a message, so that they are read as ordinary text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    if not pattern:
        return list(turns)
    return [
        replace(turn, text=re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", turn.text)) for turn in turns
    ]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, template: str
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Ids, and for each the characters it stands for; None for those that the tokenizer adds ahead, such as BOS.

    What it adds behind, such as the EOS of some, is left out: an answer begins there, or has ended as its template
    says. A chat template writes all of them itself. White space that some tokenizers leave out of their offsets counts
    to the token after it.
    """
    encoding = tokenizer(text, add_special_tokens=template != CHAT, return_offsets_mapping=True, truncation=False)
    extents: list[tuple[int, int] | None] = []
    covered = 0
    for (start, end), sequence in zip(encoding["offset_mapping"], encoding.sequence_ids(0), strict=True):
        if sequence is None:
            extents.append(None)
            continue
        extents.append((min(start, covered), end))
        covered = max(covered, end)
    length = max((index + 1 for index, extent in enumerate(extents) if extent is not None), default=len(extents))
    return encoding["input_ids"][:length], extents[:length]


def _is_answer(text: str, extent: tuple[int, int], spans: Sequence[tuple[int, int]], sample_id: Any) -> bool:
    """Whether a token belongs to one of the answers, given in order; SampleError when it belongs to other visible text
    beside it."""
    start, end = extent
    for span_start, span_end in spans:
        if span_start >= max(end, start + 1):
            return False
        if span_start <= start < span_end and end <= span_end:
            return True
        inside = text[max(start, span_start) : min(end, span_end)]
        outside = text[start:span_start] + text[max(start, span_end) : end]
        if inside.strip() and outside.strip():
            raise SampleError(
                f"{_where(sample_id)}token {text[start:end]!r} joins an answer to other text, so that labels cannot be "
                "exact; use a template whose terminators are tokens of this tokenizer"
            )
        if inside.strip():
            return True
    return False
