"""What our models of lmms-eval share: processes, batches, generation options, and errors that are raised."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from olavlm.student.errors import ModelError, SampleError
from olavlm.student.processes import Process
from olavlm.student.text.dialogue import sampling

Messages = Sequence[Mapping[str, Any]]
"""A chat: roles, each with a content of parts of a type: text with its `text`, an image with its picture at `url`."""


class ChatModel(lmms):
    """A model on one device of each process.

    Args:
        batch_size: questions that are answered in one pass.
        device: cpu, cuda, cuda:N; by default CUDA where there is one. Of several processes each has its own.

    Raises:
        ModelError: processes that do not see each other.
    """

    is_simple = False
    title: str
    """In what is said of it."""

    def __init__(self, batch_size: int | str = 1, device: str | None = None) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        if (launched := Process.launched().count) != self.accelerator.num_processes:
            raise ModelError(
                f"{launched} processes, of which each takes itself for the only one; without an accelerator set "
                "ACCELERATE_USE_CPU=true, or use olavlm-eval"
            )
        alone = self.accelerator.num_processes == 1
        self.device = torch.device(device) if alone and device not in (None, "auto") else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)

    @abc.abstractmethod
    def replies(self, chats: Sequence[Messages], options: Mapping[str, Any]) -> list[str]:
        """The answer to each chat; `options` are arguments of transformers' `generate`."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order asked. What goes wrong is raised."""
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc=self.title, disable=self.rank != 0)
        for places in batches([request.args[2] for request in requests], self.batch_size):
            options, until = generation(requests[places[0]].args[2])
            chats = [self._chat(*requests[place].args) for place in places]
            replies = self.replies(chats, options | ({"stop_strings": until} if until else {}))
            answers |= {place: cut(reply, until) for place, reply in zip(places, replies, strict=True)}
            bar.update(len(places))
        bar.close()
        return [GenerationResult(answers[place]) for place in range(len(requests))]

    def _chat(self, context: str, to_messages: Any, options: Any, index: int, task: str, split: str) -> Messages:
        """The chat of a request, whose arguments these are."""
        messages = to_messages(self.task_dict[task][split][index])
        try:
            check(messages)
        except SampleError as e:
            raise SampleError(f"{task} row {index}: {e}") from None
        return messages

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not ours: the benchmarks of the paper are answered in words."""
        raise NotImplementedError(f"{self.title} answers in words; take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not ours."""
        raise NotImplementedError(f"{self.title} answers a question at a time; take another task")


def check(messages: Messages) -> None:
    """SampleError for what is neither a picture nor text."""
    for message in messages:
        for part in message["content"]:
            if part["type"] not in ("image", "text"):
                raise SampleError(f"{part['type']} in a question; this model sees pictures and reads text")


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


def dtype_of(name: str) -> torch.dtype | None:
    """None for auto."""
    return None if name == "auto" else getattr(torch, name)
