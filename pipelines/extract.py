"""olavlm-extract: run frozen teachers over a dataset's images, once, into a feature store.

    olavlm-extract --teacher depth --teacher seg --teacher gen \\
        --data LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain/images.zip --store features

On a laptop, with the tiny checkpoints of `olavlm-tiny tiny`:

    olavlm-extract --teacher depth=tiny/depth --data pt.json --images images --store features

The plan's shards are shared out in blocks to workers, which are Ray actors (`extraction/`); a shard is the unit of
retry and resume. Running the same command again finishes what a crash left, and does nothing when all is done.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from olavlm.cache import Dataset, FeatureStore, ImageRoots, LeaseHeld, ShardTask, StoreBuilder, StoreError, pending
from olavlm.cache.builder import check_key
from olavlm.cache.codec import CODECS
from olavlm.cache.files import location
from olavlm.cache.lease import leased
from olavlm.cache.shard import COMPRESSIONS
from olavlm.cache.wording import counted
from olavlm.student.vision.encoder_name import TEACHER, EncoderName
from olavlm.teachers import GEOMETRIES, TeacherError, store_key
from olavlm.teachers.base import COMPUTE_DTYPES, resolve_device

from .cli import JobFailed, Stopped, UsageError, command, positive, positive_real
from .extraction.extractor import TeacherSpec
from .extraction.places import Job, find_cluster
from .extraction.preflight import dry_run, readable
from .extraction.record import RunRecord
from .extraction.scheduler import STALL_SECONDS
from .extraction.summary import Tally, summarise

BATCH_SIZE = 16  # images a forward, unless another is asked for
SWEEP_SECONDS = 10.0  # for killed workers to be gone


def arguments() -> argparse.ArgumentParser:
    """The command line of `olavlm-extract`."""
    p = argparse.ArgumentParser(
        prog="olavlm-extract",
        description="Run frozen vision teachers over a dataset's images into a feature store. Resumable.",
        epilog="example: olavlm-extract --teacher depth --data LLaVA-Pretrain/blip_laion_cc_sbu_558k.json "
        "--images LLaVA-Pretrain/images.zip --store features",
    )
    p.add_argument("--teacher", action="append", required=True, metavar="NAME[=MODEL]",
                   help="depth, seg, gen, timm:MODEL, open_clip:MODEL/PRETRAINED, or base, a recipe's model.encoder; "
                   "after =, the hub id, folder or (timm, open_clip) file of the weights; repeat for several, which "
                   "share decoded images")  # fmt: skip
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
    p.add_argument(
        "--dtype", choices=list(CODECS), default="float16", help="storage dtype of the features (%(default)s)"
    )
    p.add_argument("--compress", choices=COMPRESSIONS, default="none", help="zstd, row by row, for archives")
    p.add_argument("--geometry", choices=GEOMETRIES, default="reference", help="what a teacher sees of an image")
    p.add_argument("--compute-dtype", choices=list(COMPUTE_DTYPES), default="float32",
                   help="dtype that teachers compute in (%(default)s), part of the fingerprint")  # fmt: skip
    p.add_argument("--shard-rows", type=positive, help="rows a shard (default 128; 4096 for one-token teachers)")
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of the full plan")
    p.add_argument("--retry-failed", action="store_true", help="try quarantined rows again")
    p.add_argument("--replace", action="store_true", help="drop features of another card, plan or dtype first")
    p.add_argument("--dry-run", action="store_true", help="print rows, bytes, speed and ETA; write nothing")
    run = p.add_argument_group(
        "workers", "On a cluster, run this on one of its nodes; image roots, store and models must be at the same "
        "paths on all of them."
    )  # fmt: skip
    run.add_argument("--batch-size", type=positive, default=BATCH_SIZE, help="images a forward (%(default)s)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--compile", action="store_true", help="torch.compile the teachers: minutes first, then faster")
    run.add_argument("--address", help="running Ray cluster, HOST:PORT or auto (default: this machine alone)")
    run.add_argument("--workers", type=positive, help="most workers (default: one a GPU, or one a CPU core)")
    run.add_argument("--worker-gpus", type=_gpus, metavar="X", help="GPUs a worker: 1, or a part of one (default 1)")
    run.add_argument("--worker-cpus", type=positive_real, metavar="X",
                     help="CPUs a worker, for images (default: its share of a GPU node, or 1)")  # fmt: skip
    run.add_argument("--stall", type=positive_real, default=STALL_SECONDS, metavar="SECONDS",
                     help=f"without progress until a worker counts as stuck (default {STALL_SECONDS:.0f})")  # fmt: skip
    return p


def _gpus(text: str) -> float:
    if positive_real(text) > 1:
        raise argparse.ArgumentTypeError(f"{text}: a worker computes on one GPU; give 1, or less to share it")
    return float(text)


def teacher_specs(args: argparse.Namespace) -> list[TeacherSpec]:
    """The teachers that are asked for, each with the key under which the store keeps its features."""
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
        model = absolute_model(name, model or args.model)
        specs.append(
            TeacherSpec(args.key or key, name, model, args.revision, args.recipe, args.geometry, args.compute_dtype)
        )
    if args.key is not None:
        try:
            check_key(args.key)
        except StoreError as e:
            raise UsageError(f"--as: {e}") from None
    if len({s.key for s in specs}) < len(specs):
        raise UsageError(f"two teachers want the same store key: {', '.join(s.key for s in specs)}")
    return specs


def absolute_model(teacher: str, model: str | None) -> str | None:
    """With local paths in full: workers have another working directory, and so has who reads the card later."""
    if model and teacher == TEACHER:
        return EncoderName.parse(model).absolute()
    return str(Path(model).absolute()) if model and Path(model).exists() else model


@command("olavlm-extract")
def main(argv: list[str] | None = None) -> int:
    """Extract; 1 if shards or rows are missing at the end."""
    args = arguments().parse_args(argv)
    specs = teacher_specs(args)
    location(args.store)  # can it be opened here at all? teachers take long to load
    images = Dataset(args.data).images()
    if not len(images):
        raise JobFailed(f"{', '.join(args.data)}: no sample has an image; there is nothing to extract")
    roots = ImageRoots(args.images)
    if args.address:
        find_cluster(args.address)
    job = Job(
        store=args.store,
        images=args.images,
        specs=specs,
        batch_size=args.batch_size,
        device=args.device if args.address else str(resolve_device(args.device)),
        compile=args.compile,
        address=args.address,
        workers=args.workers,
        worker_gpus=args.worker_gpus,
        worker_cpus=args.worker_cpus,
        stall=args.stall,
        known_images=readable(roots, images),
    )
    if args.dry_run:
        return dry_run(args, specs, images, job)
    cards = {spec.key: spec.load("cpu").card.to_dict() for spec in specs}  # the workers load their own

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
        doing = f"{counted(len(todo), 'shard')} to do" if todo else "all committed, nothing to do"
        print(f"{spec.key}: {group.layout.tokens} x {group.layout.dim} {args.dtype}, {rows} rows wanted, {doing}")
        tasks += todo
    tally, stopped, seconds = extract(builder, job, tasks, args) if tasks else (Tally(), None, 0.0)
    return summarise(builder.path, specs, args.limit, tally, seconds, stopped)


def extract(
    builder: StoreBuilder, job: Job, tasks: list[ShardTask], args: argparse.Namespace
) -> tuple[Tally, str | None, float]:
    """Do `tasks`, leave nothing half-done, and keep a record; what was done, the signal it was stopped by, seconds."""
    from .extraction.cluster import run_tasks  # Ray takes long to import

    tally, stopped, outcome = Tally(), None, "failed"
    record = RunRecord(builder.path, args, list(job.specs))
    try:
        run_tasks(job, tasks, tally)
        outcome = "broken off" if tally.broken_off else "shards given up" if tally.given_up else "done"
    except Stopped as e:
        stopped, outcome = str(e), f"stopped by {e}"
    finally:
        if outcome != "done":
            sweep(builder, tasks)
        seconds = record.end(tally, outcome)
        builder.index()
    return tally, stopped, seconds


def sweep(builder: StoreBuilder, tasks: list[ShardTask]) -> None:
    """Drop what killed workers had in flight: their staged files and leases."""
    deadline = time.monotonic() + SWEEP_SECONDS
    for key in {t.key for t in tasks}:
        group = FeatureStore(builder.path)[key]
        for shard in sorted(leased(group.folder / "leases").keys() & {t.shard for t in tasks if t.key == key}):
            while True:
                try:
                    builder.writer(group).sweep(shard)
                    break
                except LeaseHeld:
                    if time.monotonic() > deadline:
                        break  # a writer of another run is at work, or a worker on a node that cannot be asked
                    time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
