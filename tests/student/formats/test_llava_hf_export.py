"""Our models as stock LLaVA: the same prompts, logits and answers from plain transformers, or a refusal and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from olavlm.cache import decode_rgb
from olavlm.student.errors import ModelError
from olavlm.student.formats.llava_hf import from_llava_hf
from olavlm.student.formats.llava_hf_export import to_llava_hf
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import IMAGE_TOKEN, encode_prompt, load_tokenizer
from olavlm.student.tokens import TaskSpec

TASKS = (
    TaskSpec("seg", tokens=16, dim=8, layers=(1,)),
    TaskSpec("gen", tokens=1, dim=8, layers=(2,)),
    TaskSpec("depth", tokens=16, dim=8),
)
SIDE, PATCH = 56, 14
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 3}
HEADS = {"num_key_value_heads": 2}
LLMS = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, vocab_size=size)),
    "phi3": lambda size: Phi3ForCausalLM(Phi3Config(**SIZES, **HEADS, vocab_size=size, pad_token_id=0)),
    "qwen2": lambda size: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **HEADS, vocab_size=size + 40, tie_word_embeddings=True)
    ),
    "gpt2": lambda size: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=size)),
    "gemma3": lambda size: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, head_dim=16, vocab_size=size)),
    "gemma2": lambda size: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, head_dim=16, vocab_size=size)),
    "phi": lambda size: PhiForCausalLM(PhiConfig(**SIZES, vocab_size=size)),
}
ENCODERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)),
}
CASES = {  # language model, encoder, and settings
    "llama-clip": ("llama", "clip", {"tasks": TASKS, "num_task_tokens": 4}),
    "llama-clip-no-tasks": ("llama", "clip", {"num_task_tokens": 0}),
    "phi3-siglip": (
        "phi3",
        "siglip",
        {"tasks": TASKS, "num_task_tokens": 2, "template": "phi_3", "geometry": "pad", "select_layer": -1},
    ),
    "qwen2-siglip": ("qwen2", "siglip", {"tasks": TASKS[:2], "num_task_tokens": 8, "geometry": "squash"}),
    "gpt2-clip": ("gpt2", "clip", {"tasks": TASKS, "num_task_tokens": 1, "template": "chat", "geometry": "pad"}),
    "gemma3-clip": ("gemma3", "clip", {"tasks": TASKS, "num_task_tokens": 4}),
}
QUESTIONS = [  # the file, LLaVA turns, and the same with lists of parts for content, as users write them
    ("astronaut.jpg", [f"{IMAGE_TOKEN}\nWhat is she wearing?"], ["image", "What is she wearing?"]),
    ("bison.jpg", [f"Which is closer? {IMAGE_TOKEN}"], ["Which is closer?", "image"]),
    (
        "cameraman.jpg",
        [f"{IMAGE_TOKEN}\nDescribe it.", "A man with a camera.", "Why is he\nthere?"],
        ["image", "Describe it."],
    ),
    (None, ["Name three animals.", "A dog and 2 cats.", "Another."], ["Name three animals."]),
]


def build(folder: Path, tiny: Path, llm: str, encoder: str, settings: dict) -> OlaVLM:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], special_tokens=True)
    torch.manual_seed(3)
    for name, model in (("llm", LLMS[llm](len(tokenizer))), ("encoder", ENCODERS[encoder]())):
        for key, parameter in model.named_parameters():  # wide enough that a wrong layer or row shows in the logits
            if parameter.dim() > 1 and "embed" not in key:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "llm")
    square = {"height": SIDE, "width": SIDE}
    if encoder == "clip":
        processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    else:
        processor = SiglipImageProcessor(size=square)
    processor.save_pretrained(folder / "encoder")
    return OlaVLM.build(folder / "llm", folder / "encoder", load_tokenizer(folder / "llm"), **settings).eval()


def turns_of(texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages_of(texts, first):
    """(messages with lists of parts, messages with text)."""
    roles = ["user" if i % 2 == 0 else "assistant" for i in range(len(texts))]
    content = [[{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in first]]
    content += [[{"type": "text", "text": text}] for text in texts[1:]]
    return [[{"role": r, "content": c} for r, c in zip(roles, given, strict=True)] for given in (content, texts)]


@pytest.fixture(scope="module")
def photograph(sample_images):
    return lambda name: decode_rgb((sample_images / name).read_bytes(), name)


@pytest.fixture(scope="module")
def cases(tiny, photograph, sample_images, tmp_path_factory):
    """By name, (folder of the stock model, ids, logits and answers of ours); all folders were asked in one process."""
    root, wanted = tmp_path_factory.mktemp("exported"), {}
    for name, (llm, encoder, settings) in CASES.items():
        model = build(root / f"{name}-parts", tiny["llm"], llm, encoder, settings)
        wanted[name] = [of_ours(model, file, turns_of(texts), photograph) for file, texts, _ in QUESTIONS]
        pixels = np.stack([pixels for *_, pixels in wanted[name]])
        exported = to_llava_hf(model, model.tokenizer)
        exported.save(root / name)
        np.save(root / name / "pixels.npy", pixels)
        asked = [
            (None if file is None else str(sample_images / file), *messages_of(texts, parts))
            for file, texts, parts in QUESTIONS
        ]
        (root / name / "asked.json").write_text(json.dumps(asked))
    script = str(Path(__file__).with_name("stock_llava.py"))
    subprocess.run(
        [sys.executable, "-P", script, *(str(root / name) for name in CASES)],
        check=True, timeout=200, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {name: (root / name, wanted[name]) for name in CASES}


@torch.no_grad()
def of_ours(model, file, turns, photograph):
    """Ids with image and task tokens by number, logits, answer and pixels."""
    image = None if file is None else photograph(file)
    ids = encode_prompt(model.tokenizer, turns, model.config.template)
    pixels = np.zeros((3, SIDE, SIDE), np.float32) if image is None else model.config.image_transform(image)
    logits = model(torch.tensor([ids]), pixel_values=torch.from_numpy(pixels)[None]).logits[0]
    answer = model.reply(model.tokenizer, turns, image, 8)
    return ids, logits.numpy(), answer, pixels


def with_placeholders(ids, model_config, stock):
    """Our ids with what takes the place of `<image>` in a stock prompt."""
    image, count = model_config.image_token_id, model_config.image_seq_length
    tasks = [i for i in stock.suppress_tokens if i != image]
    return [token for one in ids for token in ([*[image] * count, *tasks] if one == image else [one])]


@pytest.mark.parametrize("case", CASES)
def test_prompts_logits_and_answers_are_ours(cases, case):
    folder, wanted = cases[case]
    said, found = json.loads((folder / "said.json").read_text()), np.load(folder / "said.npz")
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    tasks = CASES[case][2]
    assert len(generation.suppress_tokens) == 1 + len(tasks.get("tasks", ())) * tasks["num_task_tokens"]
    for number, (ids, logits, answer, _) in enumerate(wanted):
        right = with_placeholders(ids, config, generation)
        for way, got in enumerate(said["answers"][number]["ids"]):
            assert got == right, (number, way)
        vocabulary = min(generation.suppress_tokens) + 1  # `<image>` was the last token ahead of the task tokens
        difference = np.abs(found[f"logits{number}"][:, :vocabulary] - logits[:, :vocabulary]).max()
        assert difference < 1e-4, number
        assert logits.std() > 0.05, "logits that say something"
        assert said["answers"][number]["answer"] == answer
    assert wanted[0][2] != wanted[3][2], "answers that differ"


@pytest.mark.parametrize("case", CASES)
def test_stock_pictures_apart(cases, case):
    """Of the library's Pillow backend to rounding ours; its default, torchvision, is up to a grey level of 255 off."""
    folder, wanted = cases[case]
    found = np.load(folder / "said.npz")
    std = np.float32(json.loads((folder / "processor_config.json").read_text())["image_processor"]["image_std"])
    levels = {
        name: max(
            float(np.abs((found[f"{name}{i}"] - wanted[i][3]) * std[:, None, None] * 255).max()) for i in range(3)
        )
        for name in ("pil", "default")
    }
    assert levels["pil"] < 1e-3
    assert 0 < levels["default"] < 1.01


def test_a_prompt_without_template_has_task_tokens_and_what_stops(cases):
    said = {case: json.loads((folder / "said.json").read_text()) for case, (folder, _) in cases.items()}
    alone = said["llama-clip"]["alone"]
    assert alone[alone.index(IMAGE_TOKEN) :][:14] == [
        IMAGE_TOKEN, *(f"<{name}_{i}>" for name in ("seg", "gen", "depth") for i in range(4)), "Ċ"
    ]  # fmt: skip
    assert said["llama-clip-no-tasks"]["alone"].count(IMAGE_TOKEN) == 1
    assert (said["llama-clip"]["eos"], said["phi3-siglip"]["eos"]) == ("<|eot_id|>", "<|end|>")
    assert {s["side"] for s in said.values()} == {"left"}
    assert None not in {s["pad"] for s in said.values()}


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """small(**settings) -> a model of ours; `llm` and `encoder` choose its parts."""

    def make(llm="llama", encoder="clip", **settings):
        settings = {"tasks": TASKS, "num_task_tokens": 4} | settings
        return build(tmp_path_factory.mktemp("small"), tiny["llm"], llm, encoder, settings)

    return make


@pytest.mark.parametrize("pads_with_an_end", [False, True])
def test_what_becomes_of_the_vocabulary(small, pads_with_an_end):
    model = small("qwen2")
    if pads_with_an_end:  # of which copies would take their part of the probability of ending
        model.tokenizer.pad_token = model.tokenizer.eos_token
    words = len(model.tokenizer)
    read, write = (m.weight.clone() for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    pooled = model.task_tokens().detach()
    exported = to_llava_hf(model, model.tokenizer)
    ids = exported.processor.tokenizer.convert_tokens_to_ids(exported.text.task_tokens)
    assert ids == list(range(words, words + 12)), "rows that had no token"
    stock = exported.model
    assert stock.get_input_embeddings().weight.shape == (len(read), 64)
    assert torch.equal(stock.get_input_embeddings().weight[ids], pooled)
    assert torch.equal(stock.get_input_embeddings().weight[:words], read[:words])
    like = model.config.image_token_id if pads_with_an_end else model.tokenizer.pad_token_id
    assert torch.equal(stock.lm_head.weight[ids], write[like].expand(12, -1))
    assert torch.equal(stock.lm_head.weight[:words], write[:words])
    assert stock.lm_head.weight is not stock.get_input_embeddings().weight
    assert not stock.config.tie_word_embeddings
    image = model.config.image_token_id
    assert stock.generation_config.suppress_tokens == [image, *ids]
    assert stock.generation_config.do_sample is not True


@pytest.mark.parametrize(
    ("wanted", "own", "note"),
    [
        (None, torch.bfloat16, "projector and task tokens: bfloat16, and float32 in the run"),
        (torch.float32, torch.float32, "language model: float32, and bfloat16 in the run"),
    ],
)
def test_weights_have_one_type(small, wanted, own, note):
    model = small(dtype=torch.bfloat16)
    assert model.projector[0].weight.dtype == torch.float32
    exported = to_llava_hf(model, model.tokenizer, wanted)
    assert {parameter.dtype for parameter in exported.model.parameters()} == {own}
    assert exported.notes[0] == note


def test_values_that_a_type_cannot_hold(small):
    model = small()
    torch.nn.init.constant_(model.projector[0].bias, 1e5)
    with pytest.raises(ModelError, match=r"linear_1\.bias has values that are not finite in float16; use --dtype"):
        to_llava_hf(model, model.tokenizer, torch.float16)


@pytest.mark.parametrize("tasks", [TASKS, ()])
def test_back_again(small, tmp_path, photograph, tasks):
    """Without task tokens it is the same model; with them one without tasks, whose template writes the tokens."""
    model = small(tasks=tasks, geometry="pad")
    question = turns_of([f"{IMAGE_TOKEN}\nWhat is she wearing?"])
    ids, logits, answer, _ = of_ours(model, "astronaut.jpg", question, photograph)
    to_llava_hf(model, model.tokenizer).save(tmp_path)
    back = from_llava_hf(tmp_path)
    stays = "template chat writes <seg_0> to <depth_3> behind an image: they stay vocabulary rows, and the model has no"
    assert back.notes == ([f"{stays} task tokens of its own"] if tasks else [])
    again, after, same, _ = of_ours(back.model, "astronaut.jpg", question, photograph)
    assert back.model.config.geometry == "pad"
    assert back.model.config.template == "chat", "it writes the prompts of llama_3, BOS too"
    assert len(again) == len(ids) + 4 * len(tasks)
    assert (again == ids) == (not tasks)
    vocabulary = len(model.tokenizer)
    np.testing.assert_allclose(after[-20:, :vocabulary], logits[-20:, :vocabulary], atol=1e-4)
    assert same == answer
    never_said = back.model.llm.generation_config.suppress_tokens
    assert len(never_said) == 1 + 4 * len(tasks)
    once_more = to_llava_hf(back.model, back.model.tokenizer).model
    assert once_more.generation_config.suppress_tokens == never_said, "task tokens stay unsaid"


@pytest.mark.parametrize("kind", ["llama_clip", "qwen2_siglip"])
def test_stock_there_and_back(llava, photograph, tmp_path, kind):
    """A stock model that became ours and stock again, its own chat template around which ours stands."""
    first = llava(kind)
    converted = from_llava_hf(first)
    to_llava_hf(converted.model, converted.model.tokenizer).save(tmp_path)
    question = [{"type": "text", "text": "Which is closer?"}, {"type": "image", "image": photograph("bison.jpg")}]
    logits = []
    for folder in (first, tmp_path):
        stock, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            logits.append(stock.eval()(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert AutoConfig.from_pretrained(tmp_path).text_config.architectures[0].endswith("ForCausalLM")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"llm": "gemma2"}, "Gemma2ForCausalLM scales, caps or shifts its logits"),
        ({"llm": "phi"}, "PhiForCausalLM has lm_head.bias, which stock LLaVA leaves out|scales, caps or shifts"),
        ({"template": "plain"}, "template 'plain' has no roles to answer in"),
    ],
)
def test_what_stock_llava_does_not_compute_is_refused(small, settings, reason):
    model = small(**settings)
    with pytest.raises(ModelError, match=reason):
        to_llava_hf(model, model.tokenizer)


def test_encoders_that_stock_llava_does_not_run_are_refused(small, tmp_path):
    model = small()
    model.vision.image_size = 70
    with pytest.raises(ModelError, match="pictures of 70 pixels and was made for 56"):
        to_llava_hf(model, model.tokenizer)
    model.vision.tower.config.model_type = "dinov2"
    with pytest.raises(ModelError, match=r"the encoder is a 'dinov2'; .* CLIP and SigLIP"):
        to_llava_hf(model, model.tokenizer)
    model.config.fusion = "token_concat"
    with pytest.raises(ModelError, match=r"fusion baseline \(token_concat\)"):
        to_llava_hf(model, model.tokenizer)
