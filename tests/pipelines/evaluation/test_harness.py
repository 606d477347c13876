"""Between lmms-eval and its models: what is asked, how, and what is kept."""

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger

from olavlm.pipelines.cli import JobFailed, Progress, UsageError
from olavlm.pipelines.evaluation import resolved
from olavlm.pipelines.evaluation.asked_task import AskedTask
from olavlm.pipelines.evaluation.backends import Backend, arguments_of, choose
from olavlm.pipelines.evaluation.datasets import open_rows
from olavlm.pipelines.evaluation.harness import unanswered
from olavlm.pipelines.evaluation.lmms_chat import batches, check, cut, generation
from olavlm.pipelines.evaluation.lmms_model import OlaVLMModel, dialogue_of
from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.quiet import hidden
from olavlm.pipelines.evaluation.recorder import Recorder, chunks
from olavlm.pipelines.evaluation.tasks import TASKS
from olavlm.student.adapter import save_adapter
from olavlm.student.errors import ModelError, SampleError
from olavlm.student.model import OlaVLM
from olavlm.student.processes import Process
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.tokens import TaskSpec
from olavlm.teachers.checkpoint import weights_digest

CV_BENCH = TASKS["cv_bench"]


class Simple(lmms):
    """A model of lmms-eval's older kind: it takes a text and pictures apart."""

    def __init__(self, say=lambda index: "(A)"):
        super().__init__()
        self.say, self.asked = say, []

    def generate_until(self, requests):
        self.asked.append([r.doc_id for r in requests])
        answers = []
        for text, options, to_visual, index, task, split in (r.args for r in requests):
            (picture,) = to_visual(self.task_dict[task][split][index])
            assert isinstance(picture, Image.Image)
            assert text.endswith("answer (A).")
            assert options.pop("until") == [], "each has options of its own"
            answers.append(self.say(index))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


@pytest.fixture
def record(cv_bench, tmp_path):
    """record(model, chunk, rows) -> answers of a recorder ahead of the model, whose predictions are kept."""
    rows = open_rows(CV_BENCH, cv_bench)

    def make(model, chunk=4, limit=None):
        asked = AskedTask(CV_BENCH, rows, chat=not model.is_simple)
        recorder = Recorder(model, {"cv_bench": asked}, Predictions(tmp_path), Progress(12, "", "", silent=True), chunk)
        asked.build_all_requests(limit=limit)
        *answers, copy = recorder.generate_until([*asked.instances, asked.instances[-1]])  # as lmms-eval pads
        assert copy == answers[-1]
        return answers

    return make


def test_simple_models_are_asked_in_chunks_and_once(record, tmp_path):
    model = Simple(lambda index: f"({index})")
    assert record(model, limit=6) == [f"({i})" for i in range(6)]
    assert model.asked == [[0, 1, 2, 3], [4, 5]]
    assert record(model) == [f"({i})" for i in range(12)]
    assert model.asked[2:] == [[6, 7, 8, 9], [10, 11]]
    assert record(model) == [f"({i})" for i in range(12)]
    assert len(model.asked) == 4
    assert list(Predictions(tmp_path).done("cv_bench")) == list(range(12))


@pytest.mark.parametrize(
    ("answer", "error"),
    [("", "went wrong"), (" \n", "went wrong"), ("[LMMS_EVAL_REQUEST_FAILED after 5 retries] 500", None)],
)
def test_what_hides_an_error_is_no_answer(record, tmp_path, answer, error):
    def say(index):
        if index == 2 and error:
            logger.error(error)
        return answer if index == 2 else "(A)"

    with pytest.raises(JobFailed, match=r"cv_bench row 2: the model gave no answer \((went wrong|\[LMMS_EVAL_REQ)"):
        record(Simple(say))
    assert list(Predictions(tmp_path).done("cv_bench")) == [0, 1, 3], "the rest of the chunk is kept"


def test_an_empty_answer_without_an_error_is_one_and_so_is_an_error_with_an_answer(record, tmp_path):
    def say(index):
        if index == 3:
            logger.error("of no consequence")
        return {0: "", 1: None, 3: "(B)"}.get(index, "(A)")

    record(Simple(lambda index: GenerationResult(say(index))), chunk=1)
    found = Predictions(tmp_path).done("cv_bench")
    assert [found[i].answer for i in range(4)] == ["", "", "(A)", "(B)"]
    assert found[0].parsed is None


def test_too_few_answers_fail(record):
    model = Simple()
    model.generate_until = lambda requests: ["(A)"]
    with pytest.raises(JobFailed, match="1 answers to 4 questions"):
        record(model)


def test_a_chunk_is_of_one_task():
    def request(task, index):
        metadata = {"task": task, "doc_id": index, "repeats": 1}
        return Instance(request_type="generate_until", arguments=(), idx=0, metadata=metadata)

    requests = [request("a", 0), request("a", 1), request("a", 2), request("b", 0)]
    assert [[(r.task_name, r.doc_id) for r in chunk] for chunk in chunks(requests, 2)] == [
        [("a", 0), ("a", 1)], [("a", 2)], [("b", 0)]
    ]  # fmt: skip


def test_processes_share_the_rows(cv_bench, tmp_path):
    rows = open_rows(CV_BENCH, cv_bench)
    asked = AskedTask(CV_BENCH, rows, chat=True)
    found = []
    for rank in range(5):
        asked.build_all_requests(limit=7, rank=rank, world_size=5)
        own = [r.doc_id for r in asked.instances]
        assert own == unanswered(rows, Predictions(tmp_path), Process(rank, 5), 7)
        assert [index for index, _ in asked.doc_iterator(rank=rank, limit=7, world_size=5)] == own
        found += own
    assert sorted(found) == list(range(7))


def test_lmms_eval_is_given_the_score_of_an_answer(cv_bench):
    asked = AskedTask(CV_BENCH, open_rows(CV_BENCH, cv_bench), chat=True)
    assert [asked.process_results(asked.rows.text(i), ["(B)"])["score"] for i in range(3)] == [0, 1, 1]
    assert asked.aggregation()["score"]([0.0, 1.0, 1.0]) == pytest.approx(2 / 3)


def test_generation_options_are_honoured():
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1}
    for given, expected in (
        ({}, {"max_new_tokens": 1024, **greedy}),
        ({"max_new_tokens": 5, "temperature": 0, "do_sample": True}, {"max_new_tokens": 5, **greedy}),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 3}, {**greedy, "max_new_tokens": 1024, "num_beams": 3}),
        (
            {"temperature": 0.7, "top_p": 0.9},
            {"max_new_tokens": 1024, "num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        ),
    ):
        assert generation(given)[0] == expected, given
    assert generation({"do_sample": True})[0]["temperature"] == 1.0
    assert generation({"until": "\n"})[1] == ["\n"]
    assert generation({"until": ["\n", ""]})[1] == ["\n"]
    assert generation({"until": None})[1] == []


def test_an_answer_ends_at_the_first_of_the_texts():
    assert cut("a cat. No\n\n", ["\n\n", ". "]) == "a cat"
    assert cut(" a cat ", []) == "a cat"


def test_a_batch_has_one_kind_of_options():
    a, b = {"max_new_tokens": 1}, {"max_new_tokens": 2}
    assert batches([a, a, a, b, a, dict(a)], 2) == [[0, 1], [2], [3], [4, 5]]


def test_chats_become_dialogues():
    picture = Image.new("L", (4, 4))
    text = {"type": "text", "text": "What <image> is this?"}
    turns, image = dialogue_of([{"role": "user", "content": [text, {"type": "image", "url": picture}]}])
    assert turns == [{"from": "human", "value": "<image>\nWhat < image> is this?"}]
    assert image.mode == "RGB"
    chat = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant", "user")]
    assert dialogue_of(chat) == ([{"from": f, "value": v} for f, v in (
        ("human", "user"), ("gpt", "assistant"), ("human", "user")
    )], None)  # fmt: skip
    for messages, reason in (
        ([{"role": "system", "content": [text]}], "the prompt template has its own"),
        ([{"role": "user", "content": [{"type": "image", "url": picture}] * 2}], "2 pictures in a question"),
    ):
        with pytest.raises(SampleError, match=reason):
            dialogue_of(messages)
    with pytest.raises(SampleError, match="video in a question"):
        check([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_the_plugin_takes_what_lmms_eval_gives(ours, monkeypatch):
    model = OlaVLMModel.create_from_arg_string(
        f"pretrained={ours},dtype=bfloat16", {"batch_size": 3, "max_batch_size": None, "device": "cpu"}
    )
    assert str(model.model.llm.dtype) == "torch.bfloat16"
    assert (model.batch_size, str(model.device), model.rank, model.world_size) == (3, "cpu", 0, 1)
    with pytest.raises(NotImplementedError, match="take a task whose output_type is generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="pretraned is no argument of the model olavlm"):
        OlaVLMModel(pretrained=str(ours), pretraned="x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="2 processes, of which each takes itself for the only one"):
        OlaVLMModel(pretrained=str(ours))


def test_arguments_are_those_that_the_class_takes():
    class Older:
        def __init__(self, model="x", device_map="", device="cuda", trust_remote_code=True, batch_size=1):
            pass

    class Newer(Older):
        def __init__(self, frames=1, **kwargs):
            super().__init__(**kwargs)

    backend = Backend("any", "here", {"batch_size": 4}, {"frames": 2}, "cpu")
    given = {"model": "here", "device": "cpu", "trust_remote_code": False, "batch_size": 4, "frames": 2}
    assert arguments_of(Newer, backend, 1) == given | {"device_map": "cpu"}
    assert arguments_of(Newer, backend, 2) == given, "each process finds its own device"
    own = Backend("any", "here", {}, {"model": "there", "trust_remote_code": True, "device": "cuda:3"}, "cpu")
    taken = arguments_of(Older, own, 2)
    assert taken == {"model": "there", "trust_remote_code": True, "device": "cuda:3"}
    with pytest.raises(UsageError, match="--dtype float16: lmms-eval's any does not let one choose"):
        arguments_of(Newer, Backend("any", "here", {"dtype": "float16"}), 1)


def test_the_kind_of_a_checkpoint_chooses_the_model(ours, exported, tiny):
    assert choose(str(ours), options={}).name == "olavlm"
    assert choose(str(exported), options={}).name == "llava_hf"
    served = choose("m", options={"batch_size": 5}, endpoint="http://x/v1", api_key=None)
    assert (served.name, served.chunk, served.own["api_key"]) == ("openai", 10, "none")
    with pytest.raises(JobFailed, match="'clip_vision_model' model, which answers no questions"):
        choose(str(tiny["gen"]), options={})


def test_what_pt_leaves_is_a_checkpoint_too(tiny, tmp_path):
    """An adapter on base models, in the dtype asked for."""
    tokenizer, config = load_tokenizer(tiny["llm"]), {"template": "llama_3"}
    bases = {"llm": str(tiny["llm"]), "encoder": str(tiny["encoder"])}
    model = OlaVLM.build(*bases.values(), tokenizer, [TaskSpec("depth", tokens=16, dim=24)], **config)
    save_adapter(tmp_path, model, tokenizer, **bases, config=config, recipe_hash="0")
    backend = choose(str(tmp_path), options={"dtype": "bfloat16"}, device="cpu")
    assert backend.name == "olavlm"
    loaded = OlaVLMModel(**arguments_of(OlaVLMModel, backend, 1))
    assert str(loaded.model.llm.dtype) == "torch.bfloat16"
    assert resolved.identity(str(tmp_path)) == f"sha256 {weights_digest((tmp_path / 'adapter.safetensors',))}"


def test_a_key_is_recorded_nowhere(cv_bench):
    served = choose("m", options={}, endpoint="http://x/v1", api_key="secret")
    content = resolved.resolve(served, {"cv_bench": open_rows(CV_BENCH, cv_bench)}, 0)
    assert "secret" not in str(content)
    assert content["model"]["arguments"] == {"base_url": "http://x/v1"}
    own = {"api_key": 123456, "hf_token": "abc", "max_tokens": 5}
    other = choose("m", options={}, name="any", own=own)
    assert other.secrets == ("123456", "abc")
    assert resolved.resolve(other, {}, 0)["model"]["arguments"] == {"max_tokens": 5}


def test_nor_is_the_beginning_of_a_key_shown():
    """lmms-eval cuts what a server said."""
    key = "sk-0123456789\nabc"
    for shown in (key, key[:11], key[:8], repr(key)[1:-1]):
        assert "0123" not in hidden(f"refused: Bearer {shown}", ["", key])
    assert hidden("Bearer sk-0123", [key]) == "Bearer sk-0123"
    assert hidden("by abc", ["abc"]) == "by [secret]"


def test_differences_are_named():
    before = {"a": {"b": 1, "c": [1]}, "d": None}
    assert list(resolved.differences(before, {"a": {"b": 2, "c": [1]}, "d": "x"}, "model")) == [
        "model.a.b was 1, is 2", "model.d was nothing, is x"
    ]  # fmt: skip


def test_the_same_weights_elsewhere_go_on(tmp_path):
    model = {"checkpoint": "a", "identity": "sha256 1", "backend": "olavlm"}
    before = {"model": model, "tasks": {"mmstar": {"rows": 3}, "ok_vqa": {"rows": 1}}}
    now = {"model": {**model, "checkpoint": "b"}, "tasks": {"cv_bench": {"rows": 2}}}
    joined = resolved.joined(before, now, {"mmstar"}, tmp_path)
    assert joined == {"model": now["model"], "tasks": {"mmstar": {"rows": 3}, "cv_bench": {"rows": 2}}}
    other = {**now, "model": {**model, "identity": "sha256 2"}}
    with pytest.raises(JobFailed, match=r"model.identity was sha256 1, is sha256 2; give another --output"):
        resolved.joined(before, other, {"mmstar"}, tmp_path)
    assert resolved.joined(before, other, set(), tmp_path) == other, "nothing was answered"
    with pytest.raises(JobFailed, match=r"no eval\.json that says of which model"):
        resolved.joined(None, now, {"mmstar"}, tmp_path)
    (tmp_path / resolved.FILE).write_text("{")
    with pytest.raises(JobFailed, match="is damaged"):
        resolved.read(tmp_path)
