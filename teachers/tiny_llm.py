"""The tiny LLM of `make_tiny`: a small Llama with Llama-3's special tokens, chat format and a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, HEADER, END_HEADER, EOT, PAD = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
VOCABULARY = 1024
WORDS = (  # how Llama-3 cuts text before byte-pair merging
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# What the tokenizer is trained on: the words of captions and of questions about pictures, and the chat format's own.
TEXT = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. You are a helpful assistant. system user assistant
A photograph of a red bicycle leaning against a brick wall beside a small wooden table with two blue cups on it.
A brown dog and a white cat are sitting together on the green grass in front of an old stone house near the river.
An aerial view of a large city at night, with bright lights, tall buildings, long bridges and many cars on the road.
The picture shows a woman in a yellow coat walking with three children along the beach under a cloudy sky.
A black and white portrait of a man with a hat, looking at the camera, with mountains and trees in the background.
Several boats are in the harbour; the nearest boat is painted orange, and behind it there is a lighthouse.
How many people are in the image? There are four people in the image, two on the left and two on the right.
What is the colour of the object on the table? The object on the table is blue. Is the door open? Yes. No.
Which object is closer to the camera, the chair or the lamp? Answer with the option's letter from the given choices
directly. (A) the chair (B) the lamp (C) the window (D) the flowers. The answer is (A). The chair is closer.
Where is the bird relative to the tree? The bird is above the tree, to the left of the roof, far from the ground.
Describe the image in two lines. Describe the scene briefly. What is happening here? Where was this photo taken?
What can you see behind the train? Estimate the distance between the two buildings. It is about ten metres away.
The depth of the scene increases from the bottom to the top of the picture, and the sky is the farthest region.
In the kitchen, someone has left a bowl of fresh oranges, a knife and a loaf of bread next to the silver sink.
Two young girls wearing striped shirts are playing tennis while their friends watch from a bench under the shade.
The museum's main hall displays ancient statues, golden coins, maps and an enormous painting of a storm at sea.
Snow covers the mountain village; smoke rises slowly from chimneys, and a narrow path leads towards the forest.
Read the sign and tell me which word is written on it. It says "market", in green capital letters on a pale board.
Name three kinds of vehicles that appear. A motorcycle, a delivery truck and an airplane appear; none is moving.
Is there more than one bottle beside the laptop? Exactly seven bottles, most of them empty, stand beside the laptop.
Imagine a story for this drawing. Once upon a time, a tiny dragon lived inside a volcano and was afraid of fire.
Explain why the umbrella casts such a short shadow. The sun is almost directly overhead, so shadows are short.
Compare both pictures carefully and list every difference, however minor, that you notice between them.
I cannot answer that from the image alone, because the relevant part is hidden, blurred or outside the frame.
zero one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 10 12 20 24 50 100 1000 , . ; : ! ? ( ) ' "
"""


def write_llm(folder: Path) -> None:
    """Write the model, its generation config and its tokenizer; random numbers come from torch's global generator."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    bos, eot, pad = tokenizer.convert_tokens_to_ids([BOS, EOT, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eot,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eot, pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the layout of Llama-3's: BOS is put before every text, nothing after it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [BOS, HEADER, END_HEADER, EOT, PAD]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT.replace("\n", "\n\n")], trainer)  # a blank line is one token, as in Llama-3
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[HEADER, END_HEADER],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
