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
import secrets
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from olavlm.cache import (
    BadImage,
    Dataset,
    FeatureStore,
    ImageRoots,
    LeaseHeld,
    ShardTask,
    StoreBuilder,
    StoreError,
    TeacherFeatures,
    pending,
)
from olavlm.cache.codec import DTYPES
from olavlm.cache.files import publish
from olavlm.cache.records import canonical_json
from olavlm.teachers import GEOMETRIES, TeacherError, store_key
from olavlm.teachers.base import resolve_device

from .cli import JobFailed, Progress, Stopped, UsageError, command, stop_on_signals, versions
from .extractor import ShardExtractor, ShardResult, TeacherSpec, spec_dict

ATTEMPTS = 3  # of one shard, before it is given up
HELD_SECONDS = 2.0  # before a shard that another writer holds is tried again
NAMED_FAILURES = 20  # rows named in the summary; `olavlm-cache status` lists all


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
    p.add_argument("--store", required=True, help="folder of the feature store; made if absent")
    one = p.add_argument_group("with exactly one --teacher")
    one.add_argument("--model", help="hub id or local folder")
    one.add_argument("--revision", help="commit of the hub model")
    one.add_argument("--recipe", help="which features, e.g. depth: mean4 (default) or last")
    one.add_argument("--as", dest="key", help="name in the store (default: the teacher's, with its recipe)")
    p.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the stored features (default float16)")
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
        if eq and args.model:
            raise UsageError(f"the model is given twice: --teacher {text} and --model {args.model}")
        try:
            key = args.key or store_key(name, args.recipe)
        except TeacherError as e:
            raise UsageError(str(e)) from None
        specs.append(TeacherSpec(key, name, model or args.model, args.revision, args.recipe, args.geometry))
    if len({s.key for s in specs}) < len(specs):
        raise UsageError(f"two teachers want the same store key: {', '.join(s.key for s in specs)}")
    return specs


@dataclass
class Tally:
    """What a run did; printed, and kept in the store."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    quarantined: int = 0
    forward_seconds: float = 0.0
    worker_seconds: float = 0.0
    failed_shards: list[str] = field(default_factory=list)

    def add(self, result: ShardResult) -> None:
        self.shards += 1
        self.rows += result.task.num_rows
        self.bytes += result.bytes
        self.quarantined += result.quarantined
        self.forward_seconds += result.forward_seconds
        self.worker_seconds += result.seconds


@command("olavlm-extract")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    specs = teacher_specs(args)
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
            spec.key, cards[spec.key], dtype=args.dtype, shard_rows=args.shard_rows, replace=args.replace
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
    return summarise(builder.path, specs, args.limit, tally, time.monotonic() - began, stopped)


def run_tasks(args: argparse.Namespace, specs: list[TeacherSpec], device: str, tasks: list[ShardTask], tally: Tally):
    """Let actors pull `tasks` until all are done or given up. Raises `Stopped` on SIGINT and SIGTERM."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(address=args.address or "local", include_dashboard=None if args.address else False, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    try:
        with stop_on_signals():  # after ray.init, which sets handlers of its own
            slots = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1))
            num_workers = min(args.workers or slots, len(tasks))
            needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": min(1, slots / num_workers)}
            actor = ray.remote(ShardExtractor).options(**needs)
            threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
            settings = {"batch_size": args.batch_size, "device": device, "threads": threads}
            # Paths are made absolute: actors have another working directory.
            portable = [spec if "://" in (spec.model or "") else _absolute_model(spec) for spec in specs]
            images = [_absolute_root(i) for i in args.images]

            def new_worker():
                return actor.remote(str(Path(args.store).absolute()), portable, images, **settings)

            idle = deque(new_worker() for _ in range(num_workers))
            queue, attempts, held = deque(tasks), dict.fromkeys(tasks, 0), {}
            running: dict[object, tuple[object, ShardTask]] = {}
            progress = Progress(sum(t.num_rows for t in tasks), "rows", "extracting")
            while queue or running or held:
                queue.extend(t for t, due in held.items() if due <= time.monotonic())
                held = {t: due for t, due in held.items() if due > time.monotonic()}
                while queue and idle:
                    worker, task = idle.popleft(), queue.popleft()
                    running[worker.extract.remote(task)] = worker, task
                if not running:
                    time.sleep(min(HELD_SECONDS, 0.1))
                    continue
                done, _ = ray.wait(list(running), timeout=HELD_SECONDS)
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
                            tally.failed_shards.append(f"{task.key} shard {task.shard}: {reason}")
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


def _absolute_model(spec: TeacherSpec) -> TeacherSpec:
    if spec.model and Path(spec.model).exists():
        return TeacherSpec(**{**asdict(spec), "model": str(Path(spec.model).absolute())})
    return spec


def _absolute_root(text: str) -> str:
    prefix, eq, location = text.partition("=")
    if not eq or "://" in prefix or Path(text).exists():
        prefix, eq, location = "", "", text
    return text if "://" in location else f"{prefix}{eq}{Path(location).absolute()}"


def sweep(builder: StoreBuilder, tasks: list[ShardTask]) -> None:
    """Drop what stopped actors had in flight: their staged files and leases."""
    deadline = time.monotonic() + 10  # for killed actors to be gone
    for key in {t.key for t in tasks}:
        group = FeatureStore(builder.path)[key]
        leases = group.folder / "leases"
        for shard in sorted({t.shard for t in tasks if t.key == key and (leases / f"{t.shard:06d}").exists()}):
            while True:
                try:
                    builder.writer(group).sweep(shard)
                    break
                except LeaseHeld:
                    if time.monotonic() > deadline:
                        break  # a writer of another run; it is at work
                    time.sleep(0.1)


def summarise(
    store: Path, specs: list[TeacherSpec], limit: int | None, tally: Tally, seconds: float, stopped: str | None
) -> int:
    """Print what was done and what is left; 1 if a wanted row is quarantined or missing."""
    opened = FeatureStore(store)
    bad, missing = [], 0
    for spec in specs:
        group: TeacherFeatures = opened[spec.key]
        rows = opened.rows.rows[:limit]
        coverage = group.coverage(rows)
        print(f"{spec.key}: {coverage}")
        wanted = set(rows.tolist())
        bad += [(spec.key, row, failure) for row, failure in group.failures() if row in wanted]
        missing += coverage.missing
    if tally.shards:
        busy = 100 * tally.forward_seconds / tally.worker_seconds if tally.worker_seconds else 0.0
        print(
            f"extracted {tally.rows} rows in {tally.shards} shards, {tally.bytes / 1e6:.1f} MB, {seconds / 3600:.4f} h: "
            f"{tally.rows / seconds:.2f} rows/s, {tally.bytes / 1e6 / seconds:.2f} MB/s, device busy {busy:.0f} %"
        )
    _name_failures(bad)
    if stopped:
        raise JobFailed(
            f"stopped by {stopped}: {tally.shards} shards were committed by this run, those in flight were dropped; "
            "run the same command again to finish"
        )
    if tally.failed_shards:
        raise JobFailed(
            f"{len(tally.failed_shards)} shards were given up after {ATTEMPTS} attempts: {tally.failed_shards[0]}"
        )
    if missing or bad:
        raise JobFailed(
            f"incomplete: {len(bad)} rows quarantined, {missing} missing; "
            + ("--retry-failed tries quarantined rows again" if bad else "run the same command again")
        )
    return 0


def _name_failures(bad: list[tuple[str, int, BadImage]]) -> None:
    for key, row, failure in bad[:NAMED_FAILURES]:
        print(f"{key} row {row}: {failure}", file=sys.stderr)
    if len(bad) > NAMED_FAILURES:
        print(f"... and {len(bad) - NAMED_FAILURES} more; olavlm-cache status lists them all", file=sys.stderr)


def record_run(store: Path, args: argparse.Namespace, specs: list[TeacherSpec], tally: Tally, seconds: float) -> None:
    """Keep the resolved configuration, versions and cost of this run beside its output."""
    now = datetime.now(UTC)
    content = {
        "when": now.isoformat(timespec="seconds"),
        "arguments": {k: v for k, v in vars(args).items() if v is not None},
        "teachers": [spec_dict(s) for s in specs],
        "versions": versions(),
        "seconds": seconds,
        "done": asdict(tally),
    }
    publish(store / "runs" / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.json", canonical_json(content) + b"\n")


def dry_run(args: argparse.Namespace, teachers: dict, images, roots: ImageRoots, device: str) -> int:
    """Rows, bytes per teacher, free space, measured rows/s on a few images, ETA. Writes nothing."""
    rows = min(args.limit or len(images), len(images))
    sample, failures = [], []
    for image in images[: min(rows, 8)].to_pylist():
        try:
            sample.append(roots.open(image))
        except BadImage as e:
            failures.append(e)
    if not sample:
        raise JobFailed(f"none of the first {len(failures)} images can be read; the first: {failures[0]}")
    folder = Path(args.store).absolute()
    while not folder.exists():
        folder = folder.parent
    free, total, hours = shutil.disk_usage(folder).free, 0, 0.0
    print(f"{rows} rows, {len(failures)} of the first {len(sample) + len(failures)} images cannot be read")
    for key, teacher in teachers.items():
        card = teacher.card
        size = rows * card.tokens * card.dim * DTYPES[args.dtype].itemsize
        teacher.encode(sample[:1])  # warm up
        began = time.perf_counter()
        teacher.encode(sample)
        rate = len(sample) / (time.perf_counter() - began)
        total, hours = total + size, hours + rows / rate / 3600
        print(f"{key}: {card.tokens} x {card.dim} {args.dtype}, {size / 1e9:.3f} GB, {rate:.2f} rows/s a worker, "
              f"ETA {rows / rate / 3600:.2f} h with one worker")  # fmt: skip
    print(f"all: {total / 1e9:.3f} GB of {free / 1e9:.1f} GB free at {folder}, {hours:.2f} h with one {device} worker")
    if total > free:
        raise StoreError(
            f"{folder} has {free / 1e9:.1f} GB free, the features need {total / 1e9:.1f} GB; use another disk"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
