"""olavlm-extract: run frozen teachers over a dataset's images, once, into a feature store.

    olavlm-extract --teacher depth --teacher seg --teacher gen \\
        --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain/images.zip --store features

On a laptop, with the tiny checkpoints of `olavlm-tiny tiny`:

    olavlm-extract --teacher depth=tiny/depth --data pt.json --images images --store features

The plan's shards are pulled by Ray actors (`extractor.py`); a shard is the unit of work, retry and resume. Running the
same command again finishes what a crash left, and does nothing when all is done.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from pathlib import Path

from olavlm.cache import Dataset, FeatureStore, ImageRoots, LeaseHeld, ShardTask, StoreBuilder, pending
from olavlm.cache.codec import CODECS
from olavlm.cache.files import is_local, location
from olavlm.cache.lease import leased
from olavlm.cache.shard import COMPRESSIONS
from olavlm.student.signals import stop_requests
from olavlm.teachers import GEOMETRIES, TeacherError, store_key
from olavlm.teachers.base import resolve_device

from .cli import JobFailed, Progress, Stopped, UsageError, command
from .extraction_summary import Tally, dry_run, record_run, summarise
from .extractor import ShardExtractor, ShardResult, TeacherSpec

ATTEMPTS = 3  # of one shard, before it is given up
WAIT_SECONDS = 0.5  # between two looks at whether to stop
HELD_SECONDS = 2.0  # before a shard that another writer holds is tried again


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-extract",
        description="Run frozen vision teachers over a dataset's images into a feature store. Resumable.",
        epilog="example: olavlm-extract --teacher depth --data blip_laion_cc_sbu_558k.json "
        "--images LLaVA-Pretrain/images --store features",
    )
    p.add_argument("--teacher", action="append", required=True, metavar="NAME[=MODEL]",
                   help="depth, seg or gen; MODEL is a hub id or a local folder; repeat for several")  # fmt: skip
    p.add_argument(
        "--data", nargs="+", action="extend", required=True, metavar="FILE", help=".json, .jsonl or .parquet"
    )
    p.add_argument("--images", nargs="+", action="extend", required=True, metavar="[PREFIX=]DIR|ZIP|URL",
                   help="image roots; a root with PREFIX serves the paths that begin with it")  # fmt: skip
    p.add_argument("--store", required=True, help="folder or fsspec URL of the feature store; made if absent")
    one = p.add_argument_group("with exactly one --teacher")
    one.add_argument("--model", help="hub id or local folder")
    one.add_argument("--revision", help="commit of the hub model")
    one.add_argument("--recipe", help="which features, e.g. depth: mean4 (default) or last")
    one.add_argument("--as", dest="key", help="name in the store (default: the teacher's, with its recipe)")
    p.add_argument("--dtype", choices=list(CODECS), default="float16", help="of the stored features (default float16)")
    p.add_argument("--compress", choices=COMPRESSIONS, default="none", help="zstd, row by row, for archives")
    p.add_argument("--geometry", choices=GEOMETRIES, default="reference", help="what a teacher sees of an image")
    p.add_argument("--shard-rows", type=_positive, help="rows a shard (default 128; 4096 for one-token teachers)")
    p.add_argument("--batch-size", type=_positive, default=16, help="images a forward (default 16)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--address", help="of a Ray cluster (default: a Ray of this machine, for this run)")
    p.add_argument("--workers", type=_positive, help="actors (default: one a GPU, or one a CPU core)")
    p.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows of the full plan")
    p.add_argument("--retry-failed", action="store_true", help="try quarantined rows again")
    p.add_argument("--replace", action="store_true", help="drop features of another card, plan or dtype first")
    p.add_argument("--dry-run", action="store_true", help="print rows, bytes, speed and ETA; write nothing")
    return p


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def teacher_specs(args: argparse.Namespace) -> list[TeacherSpec]:
    if len(args.teacher) > 1 and (only := [o for o in ("model", "revision", "recipe", "key") if getattr(args, o)]):
        flag = "--as" if only[0] == "key" else f"--{only[0]}"
        raise UsageError(f"{flag} goes with exactly one --teacher; {len(args.teacher)} were given")
    specs = []
    for text in args.teacher:
        name, eq, model = text.partition("=")
        if (eq and not model) or args.model == "":
            raise UsageError(f"--teacher {text}: the model is empty; name a hub id or a folder, or leave it out")
        if eq and args.model:
            raise UsageError(f"the model is given twice: --teacher {text} and --model {args.model}")
        try:
            key = store_key(name, args.recipe)  # which knows names and recipes; asked whatever the key is to be
        except TeacherError as e:
            raise UsageError(str(e)) from None
        model = _absolute_folder(model or args.model)
        specs.append(TeacherSpec(args.key or key, name, model, args.revision, args.recipe, args.geometry))
    if len({s.key for s in specs}) < len(specs):
        raise UsageError(f"two teachers want the same store key: {', '.join(s.key for s in specs)}")
    return specs


@command("olavlm-extract")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    specs = teacher_specs(args)
    location(args.store)  # can it be opened here at all? teachers take long to load
    dataset = Dataset(args.data)
    images = dataset.images()
    if not len(images):
        raise JobFailed(f"{', '.join(args.data)}: no sample has an image; there is nothing to extract")
    roots = ImageRoots(args.images)
    device = str(resolve_device(args.device))
    teachers = {spec.key: spec.load(device) for spec in specs}
    if args.dry_run:
        return dry_run(args, teachers, images, roots, device)
    cards = {key: teacher.card.to_dict() for key, teacher in teachers.items()}
    del teachers  # the actors load their own

    builder = StoreBuilder(args.store)
    plan, added = builder.extend_plan(images, replace=args.replace)
    print(f"plan {plan.hash[:12]}: {plan.num_images} images" + (f", {added} of them new" if added else ""))
    tasks: list[ShardTask] = []
    for spec in specs:
        group = builder.ensure_teacher(
            spec.key,
            cards[spec.key],
            dtype=args.dtype,
            shard_rows=args.shard_rows,
            compress=args.compress,
            replace=args.replace,
        )
        todo = pending(group, args.limit, retry_failed=args.retry_failed)
        rows = min(args.limit or plan.num_images, plan.num_images)
        doing = f"{len(todo)} shards to do" if todo else "all committed, nothing to do"
        print(f"{spec.key}: {group.layout.tokens} x {group.layout.dim} {args.dtype}, {rows} rows wanted, {doing}")
        tasks += todo

    began, tally, stopped = time.monotonic(), Tally(), None
    if tasks:
        try:
            run_tasks(args, specs, device, tasks, tally)
        except Stopped as e:
            stopped = str(e)
            sweep(builder, tasks)
        finally:
            record_run(builder.path, args, specs, tally, time.monotonic() - began)
            builder.index()
    return summarise(builder.path, specs, args.limit, tally, time.monotonic() - began, stopped)


def run_tasks(args: argparse.Namespace, specs: list[TeacherSpec], device: str, tasks: list[ShardTask], tally: Tally):
    """Let actors pull `tasks` until all are done or given up. Raises `Stopped` on SIGINT and SIGTERM."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(address=args.address or "local", include_dashboard=None if args.address else False, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    try:
        with stop_requests() as stop:  # after ray.init, which sets handlers of its own
            slots = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1))
            num_workers = min(args.workers or slots, len(tasks))
            needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": min(1, slots / num_workers)}
            actor = ray.remote(ShardExtractor).options(**needs)
            threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
            settings = {"batch_size": args.batch_size, "device": device, "threads": threads}
            images, store = [_absolute_root(i) for i in args.images], _absolute_store(args.store)

            def new_worker():
                return actor.remote(store, specs, images, **settings)

            idle = deque(new_worker() for _ in range(num_workers))
            queue, attempts, held = deque(tasks), dict.fromkeys(tasks, 0), {}
            running: dict[object, tuple[object, ShardTask]] = {}
            progress = Progress(sum(t.num_rows for t in tasks), "rows", "extracting")
            while queue or running or held:
                if stop:  # noted, not raised: an exception in the middle of Ray's own code would be Ray's
                    raise Stopped(stop[0])
                queue.extend(t for t, due in held.items() if due <= time.monotonic())
                held = {t: due for t, due in held.items() if due > time.monotonic()}
                while queue and idle:
                    worker, task = idle.popleft(), queue.popleft()
                    running[worker.extract.remote(task)] = worker, task
                if not running:
                    time.sleep(min(HELD_SECONDS, 0.1))
                    continue
                done, _ = ray.wait(list(running), timeout=WAIT_SECONDS)
                for reference in done:
                    worker, task = running.pop(reference)
                    try:
                        result: ShardResult = ray.get(reference)
                    except ray.exceptions.RayError as e:
                        dead = isinstance(e, ray.exceptions.RayActorError)
                        idle.append(new_worker() if dead else worker)
                        attempts[task] += 1
                        reason = " ".join(str(getattr(e, "cause", None) or e).split())[:300]
                        print(f"{task.key} shard {task.shard}, attempt {attempts[task]} of {ATTEMPTS}: {reason}",
                              file=sys.stderr, flush=True)  # fmt: skip
                        if attempts[task] < ATTEMPTS:
                            queue.append(task)
                        else:
                            tally.failed_shards.append(f"{task.key} shard {task.shard}, {ATTEMPTS} times: {reason}")
                            progress.update(task.num_rows)
                        continue
                    idle.append(worker)
                    if result.outcome == "committed":
                        tally.add(result)
                        progress.update(task.num_rows)
                    elif result.outcome == "done":
                        progress.update(task.num_rows)
                    else:
                        held[task] = time.monotonic() + HELD_SECONDS
            progress.close()
    finally:
        ray.shutdown()  # actors do not outlive their driver


def _absolute_folder(model: str | None) -> str | None:
    """A local folder by its full path: actors have another working directory, and so has who reads the card later."""
    return str(Path(model).absolute()) if model and Path(model).exists() else model


def _absolute_store(text: str) -> str:
    where = location(text)
    return str(where.absolute() if is_local(where) else where)


def _absolute_root(text: str) -> str:
    prefix, eq, root = text.partition("=")
    if not eq or "://" in prefix or os.path.exists(text):  # noqa: PTH110 - a long URL is no error here
        prefix, eq, root = "", "", text
    return text if "://" in root else f"{prefix}{eq}{Path(root).absolute()}"


def sweep(builder: StoreBuilder, tasks: list[ShardTask]) -> None:
    """Drop what stopped actors had in flight: their staged files and leases."""
    deadline = time.monotonic() + 10  # for killed actors to be gone
    for key in {t.key for t in tasks}:
        group = FeatureStore(builder.path)[key]
        for shard in sorted(leased(group.folder / "leases").keys() & {t.shard for t in tasks if t.key == key}):
            while True:
                try:
                    builder.writer(group).sweep(shard)
                    break
                except LeaseHeld:
                    if time.monotonic() > deadline:
                        break  # a writer of another run; it is at work
                    time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
