"""Our checkpoints as lmms-eval asks models.

    python -m lmms_eval --model olavlm --model_args pretrained=runs/ift,dtype=float16 --tasks mmstar --batch_size 8

On several devices by `accelerate launch -m lmms_eval ...`; on CPUs with `accelerate launch --cpu`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from olavlm.student import load_checkpoint
from olavlm.student.errors import SampleError
from olavlm.student.text.conversation import IMAGE_TOKEN
from olavlm.student.text.dialogue import as_text, sampling

SPEAKERS = {"user": "human", "assistant": "gpt"}
TEACHER = "teacher_"
"""Prefix of arguments that give the place of a fused teacher, such as `teacher_depth=FOLDER`."""


class OlaVLMModel(lmms):
    """A run folder of olavlm-train, of any stage.

    Args:
        pretrained: the run folder.
        dtype: of LLM and encoder: float32, bfloat16, float16; auto: what they were trained in.
        batch_size: questions that are answered in one pass.
        device: cpu, cuda, cuda:N; by default CUDA where there is one. Of several processes each has its own.
        max_batch_size: taken since lmms-eval gives it, and of no use here.
        places: teacher_NAME=MODEL, for a fusion baseline whose teachers have moved.

    Raises:
        StudentError: a checkpoint that cannot be used, and why.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **places: str,
    ) -> None:
        super().__init__()
        if unknown := [name for name in places if not name.startswith(TEACHER)]:
            raise ValueError(
                f"{unknown[0]} is no argument of the model olavlm: pretrained, dtype, batch_size, device, {TEACHER}NAME"
            )
        self.accelerator = Accelerator()
        alone = self.accelerator.num_processes == 1
        self.device = torch.device(device) if alone and device not in (None, "auto") else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.model, self.tokenizer = load_checkpoint(pretrained, None if dtype == "auto" else getattr(torch, dtype))
        self.model.to(self.device).eval()
        if self.model.fused_teachers:
            self.model.load_teachers({name.removeprefix(TEACHER): place for name, place in places.items()})

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order asked. What goes wrong is raised."""
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="olavlm", disable=self.rank != 0)
        for places in batches([request.args[2] for request in requests], self.batch_size):
            dialogues = [self._dialogue(*requests[place].args) for place in places]
            options, until = generation(requests[places[0]].args[2])
            if until:
                options |= {"stop_strings": until, "tokenizer": self.tokenizer}
            replies = self.model.replies(self.tokenizer, dialogues, **options)
            answers |= {place: cut(reply, until) for place, reply in zip(places, replies, strict=True)}
            bar.update(len(places))
        bar.close()
        return [GenerationResult(answers[place]) for place in range(len(requests))]

    def _dialogue(
        self, context: str, doc_to_messages: Any, options: Mapping[str, Any], index: int, task: str, split: str
    ) -> tuple[list[dict[str, str]], Any]:
        """Turns and picture of a request, whose fields the arguments are."""
        try:
            return dialogue_of(doc_to_messages(self.task_dict[task][split][index]))
        except SampleError as e:
            raise SampleError(f"{task} row {index}: {e}") from None

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not ours: the benchmarks of the paper are answered in words."""
        raise NotImplementedError("the model olavlm answers in words; take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not ours."""
        raise NotImplementedError("the model olavlm answers a question at a time; take another task")


def dialogue_of(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], Any]:
    """LLaVA turns and the picture of a chat; the picture stands ahead of the first question, as in training.

    Raises:
        SampleError: what a model of ours was never trained on: several pictures, other media, a system message.
    """
    turns, pictures = [], []
    for message in messages:
        if message["role"] not in SPEAKERS:
            raise SampleError(f"a message of the role {message['role']!r}; the prompt template has its own")
        texts = []
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image":
                pictures.append(part["url"])
            else:
                raise SampleError(f"{part['type']} in a question; these models see a picture and read text")
        turns.append({"from": SPEAKERS[message["role"]], "value": as_text("\n".join(texts))})
    if len(pictures) > 1:
        raise SampleError(f"{len(pictures)} pictures in a question; these models see one")
    if pictures:
        turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
    return turns, pictures[0].convert("RGB") if pictures else None


def batches(options: Sequence[Mapping[str, Any]], size: int) -> list[list[int]]:
    """Places of requests, in order, up to `size` together, all of a batch with the same generation options."""
    found: list[list[int]] = []
    for place, own in enumerate(options):
        if not found or len(found[-1]) == size or options[found[-1][0]] != own:
            found.append([])
        found[-1].append(place)
    return found


def generation(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate`, and what ends an answer, of an lmms-eval task's `generation_kwargs`.

    As everywhere in lmms-eval a temperature above 0 means sampling, and none means greedy.
    """
    temperature = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
    if options.get("do_sample") and "temperature" not in options:
        temperature = 1.0
    arguments = {
        "max_new_tokens": int(options.get("max_new_tokens", 1024)),
        "num_beams": int(options.get("num_beams") or 1),
        **sampling(temperature, float(options.get("top_p") or 1.0)),
    }
    until = options.get("until") or []
    return arguments, [text for text in ([until] if isinstance(until, str) else until) if text]


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    return answer[: min((at for text in until if (at := answer.find(text)) >= 0), default=None)].strip()
