import hashlib

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForDepthEstimation,
    AutoTokenizer,
    CLIPVisionModelWithProjection,
    OneFormerModel,
)

from olavlm.teachers import TeacherError, make_tiny

LOADERS = {
    "depth": AutoModelForDepthEstimation,
    "seg": OneFormerModel,
    "gen": CLIPVisionModelWithProjection,
    "encoder": AutoModel,
    "llm": AutoModelForCausalLM,
}


def digests(folders) -> dict[str, str]:
    return {
        f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, folder in folders.items()
        for path in folder.iterdir()
    }


def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path):
    torch.manual_seed(99)  # the caller's generator has no part in it
    state = torch.get_rng_state()
    assert digests(make_tiny(tmp_path / "again")) == digests(tiny)
    assert torch.equal(torch.get_rng_state(), state)
    other = digests(make_tiny(tmp_path / "other", seed=1))
    changed = {path for path, digest in digests(tiny).items() if other[path] != digest}
    assert changed == {f"{name}/model.safetensors" for name in LOADERS}


def test_a_second_call_leaves_the_folders_alone(tiny):
    before = {path: path.stat().st_mtime_ns for folder in tiny.values() for path in folder.iterdir()}
    root = tiny["depth"].parent
    assert make_tiny(root) == tiny
    assert {path: path.stat().st_mtime_ns for folder in tiny.values() for path in folder.iterdir()} == before
    assert sorted(path.name for path in root.iterdir()) == sorted(LOADERS)


def test_other_content_is_not_overwritten(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "mine.txt").write_text("keep")
    with pytest.raises(TeacherError, match="llm: exists"):
        make_tiny(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["llm", "mine.txt"]


def test_it_is_small(tiny):
    assert sum(path.stat().st_size for folder in tiny.values() for path in folder.iterdir()) < 10e6


@pytest.mark.parametrize("name", LOADERS)
def test_loads_whole(name, tiny):
    _, report = LOADERS[name].from_pretrained(tiny[name], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_encoder_and_its_processor_fit(tiny, pictures):
    encoder = AutoModel.from_pretrained(tiny["encoder"]).eval()
    pixels = AutoImageProcessor.from_pretrained(tiny["encoder"])(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert encoder(pixels).last_hidden_state.shape == (4, 1 + 16, 64)


def test_tokenizer_speaks_llama_3(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["llm"])
    ids = tokenizer("The answer is 12, naïve!\n\n").input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert tokenizer.decode(ids[1:]) == "The answer is 12, naïve!\n\n"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert len(tokenizer("\n\n", add_special_tokens=False).input_ids) == 1
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        assert tokenizer(token, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert set(tokenizer.all_special_tokens) >= {"<|start_header_id|>", "<|end_header_id|>"}


def test_chat_template_is_llama_3s(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["llm"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is it? "},
        {"role": "assistant", "content": "A dog."},
    ]
    system, user, assistant = (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant")
    )
    text = f"<|begin_of_text|>{system}Be brief.<|eot_id|>{user}What is it?<|eot_id|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{text}{assistant}A dog.<|eot_id|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == text + assistant


def test_llm_generates(tiny):
    tokenizer, llm = AutoTokenizer.from_pretrained(tiny["llm"]), AutoModelForCausalLM.from_pretrained(tiny["llm"])
    assert llm.config.vocab_size == len(tokenizer)
    assert llm.get_input_embeddings().weight is not llm.get_output_embeddings().weight
    inputs = tokenizer("A picture of", return_tensors="pt")
    output = llm.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs.input_ids.shape[1] < output.shape[1] <= inputs.input_ids.shape[1] + 3
