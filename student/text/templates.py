"""Prompt templates by name: those of LLaVA and of the models that arXiv 2412.09585 trains."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from olavlm.student.errors import RecipeError

from .chat_template import check_chat_template

_ASSISTANT_SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """System text, then role + message + separator for each turn. An open prompt ends with the assistant's role."""

    system: str
    user: str
    assistant: str
    user_end: str
    assistant_end: str
    instruction: str = ""
    """What of the system text tells the model how to behave."""
    chat: bool = True
    """False for a template that has no roles: image and caption alone."""


TEMPLATES = {
    "llama_3": Template(
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{_ASSISTANT_SENTENCES}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        user_end="<|eot_id|>",
        assistant_end="<|eot_id|>",
        instruction=_ASSISTANT_SENTENCES,
    ),
    "phi_3": Template(
        system="<|system|>\nYou are a helpful AI assistant.<|end|>",
        user="\n<|user|>\n",
        assistant="\n<|assistant|>\n",
        user_end="<|end|>",
        assistant_end="<|end|>",
        instruction="You are a helpful AI assistant.",
    ),
    "vicuna_v1": Template(
        system=f"{_ASSISTANT_SENTENCES} ",
        user="USER: ",
        assistant="ASSISTANT: ",
        user_end=" ",
        assistant_end="</s>",
        instruction=_ASSISTANT_SENTENCES,
    ),
    "plain": Template(system="", user="", assistant="", user_end="", assistant_end="\n", chat=False),
}
CHAT = "chat"
"""Names the tokenizer's own template."""
ALIASES = {"llava_llama_3": "llama_3", "llava_phi_3": "phi_3", "v1": "vicuna_v1"}


def get_template(name: str) -> Template:
    """The template of a name or alias, which is not `chat`; RecipeError with the valid names otherwise."""
    try:
        return TEMPLATES[ALIASES.get(name, name)]
    except KeyError:
        valid = ", ".join([CHAT, *TEMPLATES, *ALIASES])
        raise RecipeError(f"template {name!r} is unknown; choose one of: {valid}") from None


def check_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """RecipeError for an unknown name, and for `chat` with a tokenizer whose template cannot be masked exactly."""
    if name != CHAT:
        get_template(name)
    elif tokenizer is not None:
        check_chat_template(tokenizer)
