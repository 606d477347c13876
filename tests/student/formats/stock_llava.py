"""Exported folders asked by plain transformers, in a process of its own in which `olavlm` cannot be imported.

python -P stock_llava.py FOLDER [FOLDER ...]     reads asked.json and pixels.npy of each, writes said.npz and said.json
"""

import importlib
import importlib.abc
import json
import sys
from pathlib import Path


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "olavlm":
            raise ModuleNotFoundError(f"{name} is not to be had here")


sys.meta_path.insert(0, Blocked())
for package in ("olavlm", "olavlm.student"):
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{package} can be imported")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration  # noqa: E402


def of_messages(messages, image, processor):
    """Ids by the three ways that tools take: lists of parts, text by the processor's template, by the tokenizer's."""
    parts, text = messages
    options = {"add_generation_prompt": True}
    if image is not None:
        for part in (part for message in parts for part in message["content"] if part["type"] == "image"):
            part["image"] = image
    whole = processor.apply_chat_template(parts, tokenize=True, return_dict=True, return_tensors="pt", **options)
    yield whole
    images = {} if image is None else {"images": image}
    for source in (processor, processor.tokenizer):
        prompt = source.apply_chat_template(text, tokenize=False, **options)
        yield processor(text=prompt, return_tensors="pt", **images)
        yield processor(text=prompt, return_tensors="pt", add_special_tokens=False, **images)


@torch.no_grad()
def ask(folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    own, found = np.load(folder / "pixels.npy"), {}
    asked, said = json.loads((folder / "asked.json").read_text()), []
    rest = [processor, AutoProcessor.from_pretrained(folder)]  # the second: the library's default backend
    for number, (file, *messages) in enumerate(asked):
        image = None if file is None else Image.open(file)
        inputs, *others = of_messages(messages, image, processor)
        ids = [other["input_ids"][0].tolist() for other in (inputs, *others)]
        pixels = {} if image is None else {"pixel_values": torch.from_numpy(own[number])[None]}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found[f"logits{number}"] = model(**text, **pixels).logits[0].numpy()
        new = model.generate(**text, **pixels, max_new_tokens=8)[0, len(ids[0]) :]
        said.append({"ids": ids, "answer": processor.decode(new, skip_special_tokens=True).strip()})
        if image is not None:
            for name, other in zip(("pil", "default"), rest, strict=True):
                found[f"{name}{number}"] = other(images=image, text="<image>", return_tensors="np")["pixel_values"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "said.json").write_text(json.dumps({
        "answers": said, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token_id, "side": tokenizer.padding_side,
        "alone": tokenizer.convert_ids_to_tokens(tokenizer("USER: <image>\nWhat?")["input_ids"]),
    }))  # fmt: skip
    np.savez(folder / "said.npz", **found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        ask(Path(name))
