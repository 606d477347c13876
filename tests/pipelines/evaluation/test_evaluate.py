"""olavlm-eval over models of every kind: the same predictions, what is kept, what fails, and what is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from olavlm.pipelines import evaluate
from olavlm.pipelines.evaluation import one_bos
from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.tasks import TASKS
from olavlm.student.model import OlaVLM

WORDS = 8
"""New tokens of an answer: these models never end one."""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "cv_bench", replace(TASKS["cv_bench"], max_new_tokens=WORDS))
        yield


@pytest.fixture(scope="module")
def run(cv_bench):
    """run(checkpoint, *words) -> exit status, over the small CV-Bench."""

    def call(*words):
        return evaluate.main(["--tasks", "cv_bench", "--data", str(cv_bench), "--device", "cpu", *map(str, words)])

    return call


@pytest.fixture(scope="module")
def evaluated(run, ours, exported, tmp_path_factory):
    """Outputs of whole evaluations of the same weights: as ours, exported as a LLaVA, as any model of transformers."""
    root = tmp_path_factory.mktemp("evaluated")
    words = {
        "ours": [ours],
        "together": [ours, "--batch-size", "5"],
        "llava": [exported],
        "transformers": [exported, "--backend", "olavlm_transformers", "--batch-size", "5"],
    }
    for name, arguments in words.items():
        assert run(*arguments, "--output", root / name) == 0
    return {name: root / name for name in words}


def predictions_of(output):
    return Predictions(output / "predictions").done("cv_bench")


def lines(output):
    return (output / "predictions" / "cv_bench.jsonl").read_bytes()


def test_all_ways_to_a_model_give_the_same_predictions(evaluated):
    first, *others = (predictions_of(output) for output in evaluated.values())
    assert list(first) == list(range(12))
    answers = [p.answer for p in first.values()]
    assert len(set(answers)) > 6, "pictures and questions matter"
    for other in others:
        assert [p.answer.strip() for p in other.values()] == answers
        assert [(p.prompt, p.item, p.parsed, p.score) for p in other.values()] == [
            (p.prompt, p.item, p.parsed, p.score) for p in first.values()
        ]


def test_what_was_asked_is_the_benchmarks_prompt(evaluated):
    asked = predictions_of(evaluated["ours"])[1]
    assert asked.prompt == (
        "What is on picture 1? Select from the following choices.\n(A) 1 (B) a cat (C) a dog\n"
        "Only answer the option as the output. For example, if your answer is the option A, answer (A)."
    )
    assert asked.item == {"kind": "Relation", "source": "COCO", "options": 3, "answer": "(B)"}


def test_what_an_evaluation_leaves(evaluated, ours, capsys):
    folder = evaluated["ours"]
    assert {f.name for f in folder.iterdir()} == {
        "eval.json", "scores.json", "table.md", "lmms_eval.log", "predictions"
    }  # fmt: skip
    scores = json.loads((folder / "scores.json").read_text())
    cv_bench = scores["tasks"]["cv_bench"]
    assert (cv_bench["items"], cv_bench["expected"]) == (12, 2638)
    values = [p.score for p in predictions_of(folder).values()]
    assert cv_bench["figures"]["3D"]["value"] == pytest.approx(sum(values[8:]) / 4)
    assert scores["model"]["checkpoint"] == str(ours)
    assert scores["model"]["identity"].startswith("sha256 ")
    assert scores["versions"]["lmms-eval"]
    table = (folder / "table.md").read_text()
    assert "LLaVA-1.5" in table
    assert "12 of the 2,638 items of CV-Bench" in table
    recorded = json.loads((folder / "eval.json").read_text())
    assert recorded["tasks"]["cv_bench"]["rows"] == 12
    assert list(recorded["tasks"]["cv_bench"]["files"]) == ["test_2d.parquet", "test_3d.parquet"]
    log = (folder / "lmms_eval.log").read_text()
    assert "Running generate_until requests" in log
    assert "\r" not in log


def test_nothing_is_asked_twice_and_another_model_is_refused(
    evaluated, run, ours, exported, capsys, monkeypatch, tmp_path
):
    folder = tmp_path / "again"
    shutil.copytree(evaluated["ours"], folder)
    before = lines(folder)
    monkeypatch.setattr(OlaVLM, "replies", lambda *_, **__: pytest.fail("asked"))
    assert run(ours, "--output", folder) == 0
    assert lines(folder) == before
    out, err = capsys.readouterr()
    assert "loading" not in err
    assert "CV-Bench   3D" in out
    for words, message in (
        ([exported], "model.backend was olavlm, is llava_hf"),
        ([ours, "--dtype", "bfloat16"], "model.dtype was auto, is bfloat16"),
    ):
        assert run(*words, "--output", folder) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert message in err
        assert "give another --output" in err
    recorded = json.loads((folder / "eval.json").read_text())
    recorded["tasks"]["cv_bench"]["files"]["test_2d.parquet"] = "0" * 64
    (folder / "eval.json").write_text(json.dumps(recorded))
    assert run(ours, "--output", folder) == 1
    assert "cv_bench.files.test_2d.parquet was 000" in capsys.readouterr().err


def test_scores_again_and_compares_without_a_model(evaluated, run, ours, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "scored"
    shutil.copytree(evaluated["ours"], folder)
    (folder / "scores.json").unlink()
    monkeypatch.setattr(evaluate, "ask_model", lambda *_: pytest.fail("asked"))
    other = evaluated["llava"]
    assert run(ours, "--output", folder, "--score-only", "--compare", other) == 0
    assert "McNemar, exact" in capsys.readouterr().out
    found = json.loads((folder / "scores.json").read_text())["compared"]
    assert found["tasks"]["cv_bench"]["figures"]["Overall"]["p"] == 1
    assert "McNemar" in (folder / "table.md").read_text()
    assert run("another/model", "--output", folder, "--score-only") == 0
    assert "another/model" not in (folder / "table.md").read_text(), "a table names the model whose answers they are"
    assert run(ours, "--output", tmp_path / "none", "--score-only") == 1
    assert "holds no prediction of cv_bench; leave out --score-only" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_prompts_begin_once(run, stock, monkeypatch, tmp_path):
    """As transformers' own tokenising has them; left to itself lmms-eval asks with two beginning-of-sequence tokens."""

    def answers(name, *words):
        assert run(stock, "--output", tmp_path / name, "--limit", 6, *words) == 0
        return [p.answer.strip() for p in predictions_of(tmp_path / name).values()]

    once = answers("once")
    assert once == answers("transformers", "--backend", "olavlm_transformers")
    monkeypatch.setattr(one_bos, "begin_once", lambda model: False)
    assert answers("twice") != once


def test_an_error_that_lmms_eval_hides_fails_the_run(evaluated, run, exported, monkeypatch, tmp_path, capsys):
    """llava_hf logs what generation raises, and answers nothing."""
    from transformers import LlavaForConditionalGeneration

    generate, calls = LlavaForConditionalGeneration.generate, []

    def fails_at_fourth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory, say")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fails_at_fourth)
    assert run(exported, "--output", tmp_path / "failed") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "cv_bench row 3: the model gave no answer (Error out of memory, say in generating)" in err
    assert list(predictions_of(tmp_path / "failed")) == [0, 1, 2]
    assert not (tmp_path / "failed" / "scores.json").exists()
    assert run(exported, "--output", tmp_path / "failed") == 0, "the same command goes on"
    assert lines(tmp_path / "failed") == lines(evaluated["llava"])
    assert len(calls) == 4 + 9


def test_an_honest_empty_answer_is_unparsed(run, ours, monkeypatch, tmp_path):
    monkeypatch.setattr(OlaVLM, "replies", lambda self, tokenizer, dialogues, **_: ["" for _ in dialogues])
    assert run(ours, "--output", tmp_path, "--limit", 2) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"]["cv_bench"]["unparsed"] == 2


def test_an_error_of_the_model_is_one_line_and_its_traceback_in_the_log(run, ours, monkeypatch, tmp_path, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(OlaVLM, "replies", broken)
    assert run(ours, "--output", tmp_path, "--batch-size", 5) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "cv_bench row 0, 1, 2, 3 ...: the model gave no answer (ZeroDivisionError: division by zero)" in err
    assert "Traceback" in (tmp_path / "lmms_eval.log").read_text()


@pytest.fixture
def server():
    """A served model that speaks OpenAI's API: it answers `(B)`, but nothing while a question is in `fails`."""
    state = SimpleNamespace(asked=[], fails=set(), keys=set())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            picture, question = body["messages"][0]["content"]
            state.asked.append((self.path, body["model"], body["max_tokens"], picture["image_url"]["url"][:22]))
            state.keys.add(self.headers["Authorization"])
            failing = any(word in question["text"] for word in state.fails)
            message = {"role": "assistant", "content": "(B)"}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                      "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
            content = json.dumps(
                {"error": {"message": f"bad request by {self.headers['Authorization']}"}} if failing else answer
            ).encode()
            self.send_response(400 if failing else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{serving.server_port}/v1"
    yield state
    serving.shutdown()


def test_a_served_model(run, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key-123")
    words = ["my-model", "--endpoint", server.url, "--api-key-env", "MY_KEY", "--output", tmp_path]
    words += ["--batch-size", 2, "--backend-args", "max_retries=2,retry_backoff_s=0"]
    server.fails.add("picture 5?")
    assert run(*words) == 1
    out, err = capsys.readouterr()
    assert "cv_bench row 3: the model gave no answer ([LMMS_EVAL_REQUEST_FAILED after 2 retries]" in err
    assert "bad request by Bearer [secret]" in err
    server.fails.clear()
    assert run(*words) == 0
    found = predictions_of(tmp_path)
    assert {p.answer for p in found.values()} == {"(B)"}
    # Rows of 2D are pictures 0, 1, 4, 5, 8, 9, 12, 13, of 3D 2, 3, 6, 7; the answer is (B) where 3 divides one less.
    assert [p.score for p in found.values()] == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert len(server.asked) == 14, "the failing question twice, and then, as the others, once"
    assert set(server.asked) == {("/v1/chat/completions", "my-model", WORDS, "data:image/png;base64,")}
    assert server.keys == {"Bearer secret-key-123"}
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or "secret-key-123" not in file.read_text(), file
    assert "secret-key-123" not in out + err


def test_models_are_shown_by_the_end_of_their_path(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    shown = {given: evaluate.shown_name(given) for given in (".", "..", "/x", "x", "/x/y/z/", "x/y", "../y")}
    assert shown == {".": "b", "..": "a", "/x": "x", "x": "x", "/x/y/z/": "y/z", "x/y": "x/y", "../y": "../y"}


def test_wrong_usage_is_status_2(run, ours, capsys, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    for words, message in (
        (["--tasks", "cvbench"], "there is no task 'cvbench'; the tasks are cv_bench, mmstar, realworldqa, ok_vqa"),
        (["--tasks", ","], "--tasks names none"),
        (["--tasks", "cv_bench", "--data", "mmstar=x"], "--data mmstar=x: mmstar is not among --tasks"),
        (["--tasks", "cv_bench", "--data", "nope=x"], "there is no task 'nope'"),
        (["--tasks", "cv_bench", "--data", "x", "--data", "y"], "write TASK=DIR for each of several"),
        (["--tasks", "cv_bench", "--api-key-env", "X"], "--api-key-env is for --endpoint"),
        (
            ["--tasks", "cv_bench", "--endpoint", "http://x", "--api-key-env", "NO_KEY"],
            "--api-key-env NO_KEY: the environment has no such variable",
        ),
        (["--tasks", "cv_bench", "--endpoint", "localhost:8000"], "give a URL, such as http://"),
        (["--tasks", "cv_bench", "--endpoint", "http://["], "--endpoint http://[: Invalid IPv6 URL"),
        (["--tasks", "cv_bench", "--endpoint", "http://me:pw@x/v1"], "--endpoint with a user or password in it"),
        (["--tasks", "cv_bench", "--backend-args", "x"], "--backend-args x: write NAME=VALUE"),
        (["--tasks", "cv_bench", "--teacher", "depth"], "--teacher depth: give NAME=MODEL"),
    ):
        assert evaluate.main([str(ours), *words]) == 2, words
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
    assert run(ours, "--backend", "olavlmm", "--output", ours / "x") == 2
    assert "--backend olavlmm: lmms-eval has no such model; near it: olavlm" in capsys.readouterr().err


def test_what_cannot_be_asked_is_one_line(run, cv_bench, ours, stock, tiny, store32, capsys, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    output = ["--output", tmp_path / "output"]
    for words, message in (
        (
            [tiny["depth"]],
            "holds a 'depth_anything' model, which answers no questions about pictures; give a run folder",
        ),
        ([tiny["llm"]], "holds a 'llama' model, which answers no questions about pictures"),
        ([store32], "holds no checkpoint: neither adapter.json (from pt) nor config.json"),
        ([tmp_path / "empty"], "empty holds no checkpoint"),
        ([tmp_path / "none"], "none': it is neither a local folder nor reachable as a hub id"),
        ([ours, "--data", "cv_bench=nowhere"], "--data nowhere does not exist; give the folder of test*.parquet"),
        ([ours, "--data", f"cv_bench={cv_bench / 'README.md'}"], "README.md is a file; give the folder"),
        (
            [ours, "--data", f"cv_bench={tmp_path}"],
            "holds no test*.parquet of nyu-visionx/CV-Bench, here or below; it ",
        ),
        ([ours, "--compare", tmp_path], "holds no predictions; give the output of another olavlm-eval"),
        ([ours, "--device", "cuda:99"], "olavlm-eval: error: device 'cuda:99': this machine offers no CUDA device"),
        ([ours, "--teacher", "depth=x"], "teacher 'depth': this model reads no teacher"),
    ):
        assert run(*words, *output) == 1, words
        errors = capsys.readouterr().err
        assert errors.splitlines()[-1].startswith("olavlm-eval: error: ")
        assert message in errors.splitlines()[-1], words
        assert "Traceback" not in errors
    assert run(stock, "--batch-size", 2, *output) == 2
    assert "llava_hf answers one question at a time" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert run(ours, *output) == 1
    assert 'pip install "olavlm[eval]"' in capsys.readouterr().err


def test_a_dataset_that_is_nowhere_is_one_line(ours, capsys, tmp_path):
    """Without --data the hub is asked, which the tests cannot reach."""
    assert evaluate.main([str(ours), "--tasks", "mmstar", "--output", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "Lin-Chen/MMStar is neither on this machine nor reachable on the hub" in errors
    assert "give --data mmstar=DIR" in errors


KILLED = """
import os, signal, sys
from dataclasses import replace
from olavlm.pipelines import evaluate
from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.tasks import TASKS
TASKS["cv_bench"] = replace(TASKS["cv_bench"], max_new_tokens=8)
append, calls = Predictions.append, []
def killed(self, predictions):
    calls.append(1)
    if len(calls) == 6:  # in the middle of a line
        with open(self.folder / "cv_bench.jsonl", "a") as file:
            file.write('{"task": "cv_bench", "index": 5, "prompt": "What is o')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, predictions)
Predictions.append = killed
evaluate.main(sys.argv[1:])
"""


def test_a_kill_loses_nothing(evaluated, run, ours, cv_bench, tmp_path):
    words = [ours, "--tasks", "cv_bench", "--data", cv_bench, "--device", "cpu", "--output", tmp_path]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(predictions_of(tmp_path)) == [0, 1, 2, 3, 4]
    assert run(ours, "--output", tmp_path) == 0
    assert lines(tmp_path) == lines(evaluated["ours"])


def test_several_processes_give_the_same(evaluated, ours, cv_bench, tmp_path):
    """Two processes on seven of the twelve rows, then one on the rest."""
    from olavlm.pipelines.launch_configs import launch_configs

    program = "from dataclasses import replace\nimport sys\nfrom olavlm.pipelines import evaluate\n" + (
        "from olavlm.pipelines.evaluation.tasks import TASKS\n"
        "TASKS['cv_bench'] = replace(TASKS['cv_bench'], max_new_tokens=8)\nsys.exit(evaluate.main(sys.argv[1:]))\n"
    )
    (tmp_path / "program.py").write_text(program)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_configs()["ddp"]]
    launch += ["--num_processes", "2", "--main_process_port", "0", tmp_path / "program.py"]
    words = [ours, "--tasks", "cv_bench", "--data", cv_bench, "--output", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run(
        [*map(str, launch), *map(str, words), "--limit", "7"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(tmp_path / "out") == b"".join(lines(evaluated["ours"]).splitlines(keepends=True)[:7])
    assert [f.name for f in (tmp_path / "out" / "predictions").iterdir()] == ["cv_bench.jsonl"]
    assert (tmp_path / "out" / "lmms_eval.log.1").is_file(), "the second process did its part"
    assert done.stdout.count("Table 1") == 1
    assert evaluate.main([*map(str, words)]) == 0
    assert lines(tmp_path / "out") == lines(evaluated["ours"])


TASK = """
task: own_cv
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{folder}/*.parquet"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function own_functions.visual
doc_to_text: !function own_functions.text
doc_to_target: answer
process_results: !function own_functions.results
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
import json
with open({file!r}) as file:
    ANSWERS = {{line["prompt"]: line["answer"] for line in map(json.loads, file)}}
def visual(doc):
    return [doc["image"]]
def text(doc):
    return doc["prompt"] + {suffix!r}
def results(doc, answers):
    return {{"same": float(answers[0] == ANSWERS[text(doc)].split("\\n\\n")[0].strip())}}
"""


def test_lmms_eval_itself_runs_our_checkpoints(evaluated, ours, cv_bench, tmp_path):
    """By its own command, on a task of its own kind over the same rows: the same answers."""
    from olavlm.pipelines.evaluation.tasks.cv_bench import SUFFIX

    answers = str(evaluated["ours"] / "predictions" / "cv_bench.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(folder=cv_bench))
    (tmp_path / "tasks" / "own_functions.py").write_text(FUNCTIONS.format(file=answers, suffix=SUFFIX))
    command = [sys.executable, "-m", "lmms_eval", "--model", "olavlm", "--model_args", f"pretrained={ours}",
               "--tasks", "own_cv", "--include_path", tmp_path / "tasks", "--batch_size", "4", "--device", "cpu",
               "--output_path", tmp_path / "out"]  # fmt: skip
    caches = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*map(str, command)], env={**ENVIRONMENT, **caches}, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["own_cv"]["same,none"] == 1.0


def test_the_log_keeps_what_the_terminal_does_not_show(evaluated, run, ours, capfd, tmp_path):
    assert run(ours, "--output", tmp_path, "--limit", 1) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0].startswith("CV-Bench: 12 rows, and the published split has 2638")
    assert err.splitlines()[1:] == [f"loading {ours} as lmms-eval's olavlm; its log is {tmp_path / 'lmms_eval.log'}"]
    assert out.startswith("arXiv 2412.09585, Table 1")


def test_answers_to_other_questions_are_refused(evaluated, run, ours, tmp_path, capsys):
    shutil.copytree(evaluated["ours"], tmp_path / "other")
    file = tmp_path / "other" / "predictions" / "cv_bench.jsonl"
    file.write_text(file.read_text().replace("picture 4?", "drawing 4?"))
    assert run(ours, "--output", tmp_path / "other") == 1
    assert "another dataset or protocol" in " ".join(capsys.readouterr().err.split())
