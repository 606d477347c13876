"""The tokenizer of the tiny OneFormer: CLIP's own kind, with merges for the words of its task text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WORDS = ("the", "task", "is", "semantic")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> CLIPTokenizer:
    """Every byte is a token, alone and at the end of a word (`</w>`); each of `WORDS` is merged from left to right."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            left, right, *rest = pieces
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            pieces = [left + right, *rest]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
