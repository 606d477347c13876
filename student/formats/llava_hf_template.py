"""The chat template of an exported model: the prompts that it was trained with, from messages of the library.

A message's content is text, in which `<image>` may stand, or a list of parts, among them an image; either way the image
moves to the beginning of its turn, as in training. Behind each `<image>` the template writes the task tokens, so that
they follow the image tokens once the processor has put these in its place.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from olavlm.student.text.chat_template import IMAGE_TOKEN, SOME_DAY, takes_parts
from olavlm.student.text.templates import CHAT, get_template

_TEXT_OF = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content if part.type == 'text' -%}"
    "{{- part.text if loop.first else '\\n' + part.text -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}\n"
)
_IMAGE_AND_TEXT = (
    "{%- set text = text_of(message.content) -%}\n"
    "{%- set images = 0 -%}\n"
    "{%- if message.role == 'user' -%}\n"
    "{%- set parts = [] if message.content is string else message.content -%}\n"
    "{%- set images = parts | selectattr('type', 'in', ['image', 'image_url']) | list | length"
    " + text.count('<image>') -%}\n"
    "{%- if images -%}{%- set text = text.replace(image, '').replace('<image>', '').strip() -%}{%- endif -%}\n"
    "{%- endif -%}\n"
)


def exported_template(
    tokenizer: PreTrainedTokenizerBase, template: str, task_tokens: list[str], beginning: str = ""
) -> str:
    """A Jinja template, for tokenizer and processor alike.

    Args:
        tokenizer: the one the model was trained with.
        template: name of the prompt template the model was trained with, which has roles.
        task_tokens: what follows an image.
        beginning: tokens ahead of everything, such as BOS. None for `chat`, which writes them itself.
    """
    image = _quoted(IMAGE_TOKEN + "".join(task_tokens))
    head = f"{{%- set image = {image} -%}}\n{_TEXT_OF}"
    return head + (_wrapped(tokenizer) if template == CHAT else _named(template, beginning))


def _named(name: str, beginning: str) -> str:
    template = get_template(name)
    ahead, behind = template.system.split(template.instruction)
    user, user_end, assistant, assistant_end, open_end = map(
        _quoted,
        (template.user, template.user_end, template.assistant, template.assistant_end, template.assistant.rstrip(" ")),
    )
    return (
        "{%- if messages and messages[0].role == 'system' -%}\n"
        "{%- set instruction = text_of(messages[0].content) -%}\n"
        f"{{%- else -%}}\n{{%- set instruction = {_quoted(template.instruction)} -%}}\n{{%- endif -%}}\n"
        f"{{{{- {_quoted(beginning + ahead)} + instruction + {_quoted(behind)} -}}}}\n"
        "{%- for message in messages -%}\n"
        f"{_IMAGE_AND_TEXT}"
        "{%- if message.role == 'user' -%}\n"
        f"{{{{- {user} + (image + '\\n') * images + text + {user_end} -}}}}\n"
        "{%- elif message.role == 'assistant' -%}\n"
        f"{{{{- {assistant} + text + {assistant_end} -}}}}\n"
        "{%- elif not (message.role == 'system' and loop.first) -%}\n"
        "{{- raise_exception('roles are user and assistant, and system in the first message alone') -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- {open_end} -}}}}{{%- endif -%}}\n"
    )


def _wrapped(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, given the messages as in training, and then the task tokens put in."""
    own = tokenizer.get_chat_template()
    content = "('<image>\\n' * images) + text"
    if takes_parts(own):
        content = "[{'type': 'image'}] * images + [{'type': 'text', 'text': text}]"
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return (
        "{%- set turns = namespace(all=[]) -%}\n"
        "{%- for message in messages -%}\n"
        f"{_IMAGE_AND_TEXT}"
        f"{{%- set turns.all = turns.all + [{{'role': message.role, 'content': {content}}}] -%}}\n"
        "{%- endfor -%}\n"
        "{%- set messages = turns.all -%}\n"
        + "".join(f"{{%- set {name} = {_quoted(token)} -%}}\n" for name, token in tokens.items() if token is not None)
        + (SOME_DAY if "strftime_now" in own else "")
        + f"{{%- set prompt %}}{own}{{% endset -%}}\n"
        "{%- if add_generation_prompt -%}{%- set prompt = prompt.rstrip(' ') -%}{%- endif -%}\n"
        "{{- prompt.replace('<image>', image) -}}\n"
    )


def _quoted(text: str) -> str:
    return json.dumps(text)
