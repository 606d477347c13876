"""olavlm-eval: score a model of any kind on the paper's benchmarks, beside the paper's rows.

    olavlm-eval runs/ift --tasks cv_bench,mmstar,realworldqa,ok_vqa
    olavlm-eval runs/ift --tasks cv_bench --data cv_bench=CV-Bench               from a local folder, without network
    olavlm-eval llava-hf/llava-1.5-7b-hf --tasks cv_bench --output llava --dtype float16
    olavlm-eval runs/ift --tasks cv_bench --compare llava                        are they different?
    olavlm-eval my-model --endpoint http://localhost:8000/v1 --tasks mmstar      a served model

On a laptop: `olavlm-eval runs/tiny/ift --tasks cv_bench --limit 20`. On several devices:

    accelerate launch --config_file $(olavlm-train accelerate ddp) --num_processes 8 \\
        -m olavlm.pipelines.evaluate runs/ift --tasks cv_bench,mmstar

lmms-eval runs the models; what is asked and how answers are read is ours, as the paper had it (`evaluation/tasks`). The
same command goes on where a run stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from olavlm.student.processes import Process

from .cli import JobFailed, UsageError, add_device_argument, command, positive, quiet_models, seed
from .evaluation.tasks import TASKS, Task, task_named
from .generate import add_teacher_argument, places_of

if TYPE_CHECKING:
    from .evaluation.backends import Backend
    from .evaluation.predictions import Prediction, Predictions
    from .evaluation.sheet import Sheet

PREDICTIONS, SCORES, TABLE, LOG = "predictions", "scores.json", "table.md", "lmms_eval.log"
MISSING = 'olavlm-eval asks models through lmms-eval, which is not installed: pip install "olavlm[eval]"'


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-eval",
        description="Ask a model the questions of benchmarks and score its answers as the paper did, with intervals, "
        "beside the paper's rows. What an interrupted run has asked is not asked again.",
        epilog="example: olavlm-eval runs/ift --tasks cv_bench,mmstar,realworldqa,ok_vqa",
        allow_abbrev=False,
    )
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="run folder of olavlm-train, folder or hub id of an image-text model of transformers, or with --endpoint "
        "the name of a served model",
    )
    p.add_argument("--tasks", metavar="NAME[,...]", required=True, help=f"of {', '.join(TASKS)}")
    p.add_argument(
        "--data",
        metavar="[TASK=]DIR",
        action="append",
        default=[],
        help="folder with a benchmark's parquet files as published, or with such folders; by default the hub is asked",
    )
    p.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="predictions, scores.json, table.md (default: CHECKPOINT/benchmarks, or benchmarks/NAME of what is no "
        "local folder)",
    )
    p.add_argument("--limit", metavar="N", type=positive, help="the first N rows of each benchmark")
    p.add_argument("--batch-size", metavar="N", type=positive, help="questions in one pass, or at once to an endpoint")
    add_device_argument(p)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    p.add_argument(
        "--seed", metavar="N", type=seed, default=0, help="random seed of a model that samples; answers are greedy"
    )
    add_teacher_argument(p)
    p.add_argument("--endpoint", metavar="URL", help="a server that speaks OpenAI's API, such as vLLM's")
    p.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the endpoint's key (OPENAI_API_KEY)",
    )
    p.add_argument("--backend", metavar="NAME", help="any model of lmms-eval by its name")
    p.add_argument("--backend-args", metavar="K=V[,...]", help="arguments of lmms-eval's model, as it takes them")
    p.add_argument(
        "--compare", metavar="DIR", type=Path, help="output of another evaluation, to compare with on the same rows"
    )
    p.add_argument("--score-only", action="store_true", help="score the predictions that are there, ask nothing")
    return p


@command("olavlm-eval")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    tasks = tasks_of(args.tasks)
    folders = folders_of(args.data, tasks)
    check_usage(args)
    output: Path = args.output or default_output(args.checkpoint)
    # Only now, so that help and a wrong flag are answered at once.
    from .evaluation.predictions import Predictions

    process = Process.launched()
    predictions = Predictions(output / PREDICTIONS, process.rank)
    if not args.score_only:
        ask_model(args, tasks, folders, output, predictions)
    if process.is_main:
        report(args, tasks, output, predictions)
    return 0


def tasks_of(names: str) -> list[Task]:
    """UsageError, with the names there are, for one that is none."""
    found = [task_named(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError(f"--tasks names none; there are {', '.join(TASKS)}")
    return list(dict.fromkeys(found))


def folders_of(data: Sequence[str], tasks: Sequence[Task]) -> dict[str, Path | None]:
    """The folder of each task's dataset, None for the hub. UsageError for one that is no task's."""
    shared: Path | None = None
    own: dict[str, Path] = {}
    for text in data:
        name, equals, folder = text.partition("=")
        if equals and not Path(text).exists():
            task = task_named(name)
            if task not in tasks:
                raise UsageError(f"--data {text}: {task.name} is not among --tasks")
            own[task.name] = Path(folder)
        elif shared is not None:
            raise UsageError(f"--data {shared} and {text}: write TASK=DIR for each of several")
        else:
            shared = Path(text)
    return {task.name: own.get(task.name, shared) for task in tasks}


def check_usage(args: argparse.Namespace) -> None:
    """UsageError for arguments that cannot be, or not together."""
    if args.api_key_env and not args.endpoint:
        raise UsageError("--api-key-env is for --endpoint")
    if args.api_key_env and args.api_key_env not in os.environ:
        raise UsageError(f"--api-key-env {args.api_key_env}: the environment has no such variable")
    if args.endpoint and not args.endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint {args.endpoint}: give a URL, such as http://localhost:8000/v1")
    try:
        place = urlsplit(args.endpoint or "").netloc
    except ValueError as e:
        raise UsageError(f"--endpoint {args.endpoint}: {e}") from None
    if "@" in place:
        raise UsageError("--endpoint with a user or password in it, which eval.json would show; see --api-key-env")
    if args.endpoint and (args.dtype or args.teacher):
        raise UsageError("--dtype and --teacher are for a model that is loaded here; a server has chosen its own")
    if args.backend_args:
        own_arguments(args.backend_args)
    if args.compare is not None and not (args.compare / PREDICTIONS).is_dir():
        raise JobFailed(f"--compare {args.compare} holds no {PREDICTIONS}; give the output of another olavlm-eval")
    places_of(args.teacher)


def own_arguments(text: str) -> dict[str, Any]:
    """`k=v,...`: numbers, true and false are read as such. UsageError for what is not that."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise UsageError(f"--backend-args {part}: write NAME=VALUE")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found


def default_output(checkpoint: str) -> Path:
    """Beside the model where it is a folder here."""
    folder = Path(checkpoint)
    return folder / "benchmarks" if folder.is_dir() else Path("benchmarks", checkpoint.strip("/").replace("/", "--"))


def ask_model(
    args: argparse.Namespace,
    tasks: Sequence[Task],
    folders: Mapping[str, Path | None],
    output: Path,
    predictions: Predictions,
) -> None:
    """Everything that can be wrong about data and checkpoint is found before a model is loaded."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise JobFailed(MISSING)
    from olavlm.cache import files

    from .evaluation import resolved
    from .evaluation.datasets import open_rows
    from .evaluation.harness import ask

    quiet_models()
    process = Process.launched()
    rows = {task.name: open_rows(task, folders[task.name]) for task in tasks}
    backend = backend_of(args)
    if process.is_main:
        for of in rows.values():
            if len(of) != of.task.published.items:
                print(
                    f"{of.task.title}: {len(of)} rows, and the published split has {of.task.published.items}: its "
                    "figures are not the benchmark's",
                    file=sys.stderr,
                )
        now = resolved.resolve(backend, rows, args.seed, limit=args.limit, processes=process.count)
        answered = {task for task in TASKS if predictions.done(task)}
        content = resolved.joined(resolved.read(output), now, answered, output)
        files.make_folder(output)
        files.replace(output / resolved.FILE, _as_json(content))
    files.make_folder(output)
    log = output / (LOG if process.is_main else f"{LOG}.{process.rank}")
    ask(backend, rows, predictions, process, limit=args.limit, seed=args.seed, log=log)


def backend_of(args: argparse.Namespace) -> Backend:
    """What the arguments say of the model."""
    from .evaluation.backends import OURS, TEACHER, choose

    options = {"dtype": args.dtype, "batch_size": args.batch_size}
    places = {f"{TEACHER}{name}": place for name, place in places_of(args.teacher).items()}
    backend = choose(
        args.checkpoint,
        options={name: value for name, value in options.items() if value is not None},
        device=args.device,
        name=args.backend,
        own=places | (own_arguments(args.backend_args) if args.backend_args else {}),
        endpoint=args.endpoint,
        api_key=os.environ.get(args.api_key_env or "OPENAI_API_KEY"),
    )
    if places and backend.name != OURS:
        raise UsageError("--teacher is for a fusion baseline of olavlm-train")
    return backend


def report(args: argparse.Namespace, tasks: Sequence[Task], output: Path, predictions: Predictions) -> None:
    """Score what is there of the tasks, and of those before; write scores.json and table.md, print the tables.

    Raises:
        JobFailed: there is nothing of a task, or not the same in the evaluation to compare with.
    """
    from .evaluation.resolved import all_versions
    from .evaluation.table import all_figures, beside_paper, compared

    model = recorded_model(output)
    found = answers_of(predictions, tasks, args.score_only)
    name = shown_name(str((model or {}).get("checkpoint", args.checkpoint)))  # whose answers they are
    with libraries_to(output / LOG, found):
        by_task = {task: scores_of(task, those) for task, those in found.items()}
    sheets = [*beside_paper({name: by_task}), all_figures(name, by_task)]
    content: dict[str, Any] = {"model": model, "tasks": by_task, "versions": all_versions()}
    save(output, content, sheets)
    print("\n".join(sheet.text() for sheet in sheets))
    if args.compare is not None:
        with libraries_to(output / LOG, found):
            other, comparisons = comparison(args.compare, {task.name: found[task.name] for task in tasks})
        sheets.append(compared(name, other, comparisons))
        save(output, content | {"compared": {"with": other, "tasks": comparisons}}, sheets)
        print(sheets[-1].text())
    print(f"{output / SCORES}, {output / TABLE}")


def save(output: Path, content: Mapping[str, Any], sheets: Sequence[Sheet]) -> None:
    """Replace scores.json and table.md."""
    from olavlm.cache import files

    files.replace(output / SCORES, _as_json(content))
    files.replace(output / TABLE, "\n".join(sheet.markdown() for sheet in sheets).encode())


def answers_of(predictions: Predictions, tasks: Sequence[Task], score_only: bool) -> dict[str, list[Prediction]]:
    """What there is of each task, and of others. JobFailed, with the remedy, if there is nothing of a task.

    The files of several processes become one, but for `score_only`, which may look at an evaluation that is at work.
    """
    for task in tasks:
        if not predictions.done(task.name):
            remedy = "leave out --score-only" if score_only else "ask again"
            raise JobFailed(f"{predictions.folder} holds no prediction of {task.name}; {remedy}")
        if not score_only:
            predictions.merge(task.name)
    return {name: list(those.values()) for name in TASKS if (those := predictions.done(name))}


def scores_of(task: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Scores of one task, as scores.json holds them."""
    from .evaluation.scores import scores

    return scores(TASKS[task], predictions)


def comparison(folder: Path, found: Mapping[str, Sequence[Prediction]]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The other model's name, and what is found of the tasks that both were asked; JobFailed if there is none."""
    from .evaluation.comparison import compare
    from .evaluation.predictions import Predictions

    others = Predictions(folder / PREDICTIONS)
    both = {
        task: compare(TASKS[task], those, other.values())
        for task, those in found.items()
        if (other := others.done(task))
    }
    if not both:
        raise JobFailed(f"--compare {folder} holds no predictions of {', '.join(found)}")
    return shown_name(str((recorded_model(folder) or {}).get("checkpoint", folder))), both


def recorded_model(output: Path) -> dict[str, Any] | None:
    """What eval.json of an evaluation says of its model."""
    from .evaluation import resolved

    content = resolved.read(output)
    return content and content[resolved.MODEL]


def shown_name(checkpoint: str) -> str:
    """In tables: the last two parts of a path or hub id."""
    path = Path(checkpoint)
    if path.name in ("", ".."):
        return path.resolve().name
    return "/".join([part for part in path.parts if part != path.anchor][-2:])


def libraries_to(log: Path, found: Mapping[str, object]) -> AbstractContextManager[None]:
    """OK-VQA is judged by lmms-eval's normaliser: what the library says goes there. Without it the task says so."""
    from .evaluation.quiet import output_to

    return output_to(log) if "ok_vqa" in found and importlib.util.find_spec("lmms_eval") else nullcontext()


def _as_json(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
