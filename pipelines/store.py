"""olavlm-cache: make a plan, look into a feature store, and keep it sound.

olavlm-cache plan features --data pt.json              make the plan, or extend it by new images
olavlm-cache status features                           coverage, failures by reason, bytes; a running job's ETA
olavlm-cache info features --json                      cards, shapes, dtypes, codecs, sizes, statistics, plan
olavlm-cache verify features --live 16                 every checksum, then the teachers again on 16 random rows
olavlm-cache repair features                           extract again exactly what is broken
olavlm-cache convert features small --dtype int8       another storage dtype, or --compress zstd for an archive
olavlm-cache merge features from-a from-b              stores of one plan, filled on several machines, into one
olavlm-cache gc features                               left-overs of killed writers
olavlm-cache drop features seg                         one teacher

STORE is a folder or an fsspec URL. Everything takes --json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from olavlm.cache import Dataset, FeatureStore, Finding, StoreBuilder, TeacherFeatures, Transfer, convert, merge, verify
from olavlm.cache.codec import CODECS
from olavlm.cache.errors import MissingFeatures, StoreError
from olavlm.cache.files import location
from olavlm.cache.garbage import YOUNG_SECONDS, collect
from olavlm.cache.lease import is_live, leased
from olavlm.cache.shard import COMPRESSIONS
from olavlm.cache.verify import open_teachers, shards_to_verify
from olavlm.cache.wording import counted, printable, storage

from .cli import JobFailed, Progress, UsageError, command, natural, positive
from .extraction.record import Running, record_copy, running_extractions
from .failed_rows import SHOWN, failed_rows, named

RATE_SECONDS = 900.0  # a running job's rate is that of its shards committed in this time

_LINES = [line.partition("  ")[0] for line in __doc__.splitlines() if line.startswith("olavlm-cache ")]
EXAMPLES = {line.split()[1]: line for line in _LINES}
"""By subcommand, of the text above."""

Answer = tuple[dict, str, bool]
"""What a command found as JSON and as text, and whether all is well."""


def arguments() -> argparse.ArgumentParser:
    """The command line of `olavlm-cache`."""
    p = argparse.ArgumentParser(
        prog="olavlm-cache",
        description="Make a plan, look into a feature store, and keep it sound.",
        epilog=f"example: {EXAMPLES['verify']}",
    )
    commands = p.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], Answer]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        sub.add_argument("store", metavar="STORE", help="folder or fsspec URL")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        sub.set_defaults(run=run)
        return sub

    def teachers(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--teacher", action="append", metavar="KEY", help="only this one; repeat for several")

    def extraction(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--images", nargs="+", action="extend", metavar="[PREFIX=]DIR|ZIP|URL",
                         help="image roots (default: those of the extractions into the store)")  # fmt: skip
        sub.add_argument("--model", action="append", default=[], metavar="KEY=MODEL",
                         help="where a teacher's model is now, if not where its card says")  # fmt: skip
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sub = add("plan", "make the plan of a dataset, or extend it by the images that are new", plan)
    sub.add_argument("--data", nargs="+", action="extend", metavar="FILE", help="LLaVA files; without, show the plan")
    add("status", "coverage, failures by reason, bytes, and rate and ETA of a running job", status)
    add("info", "cards, shapes, dtypes, codecs, sizes, statistics, plan", info)
    sub = add(
        "verify",
        "find what is not as it was written: features to the byte, plan and metadata by content; exit status 1 if so",
        verify_store,
    )
    teachers(sub)
    sub.add_argument("--fast", action="store_true", help="records and sizes only, not every checksum")
    sub.add_argument("--live", type=natural, default=0, metavar="N",
                     help="also run the teacher on N random rows and compare: cosine at least 0.999")  # fmt: skip
    sub.add_argument("--seed", type=natural, help="random seed of the rows (default: drawn, and printed)")
    extraction(sub)
    sub = add(
        "repair",
        "extract again exactly what verify finds broken; sound rows whose images are gone are kept, and exit status 1 "
        "means that some broken rows could not be restored",
        repair,
    )
    teachers(sub)
    extraction(sub)
    sub.add_argument("--fast", action="store_true", help="what records and sizes show, not every checksum")
    sub.add_argument("--workers", type=positive, help="actors (default: one a GPU, or one a CPU core)")
    sub.add_argument("--address", help="running Ray cluster (default: this machine alone)")
    sub = add(
        "convert",
        "write the features to another store in another storage dtype, and say what it cost; exit status 1 if the "
        "dtype cannot hold a row",
        convert_store,
    )
    sub.add_argument("target", metavar="OUT", help="the store to write; run again to finish it")
    sub.add_argument(
        "--dtype", choices=list(CODECS), help="int8 halves float16, int4 quarters it (default: as they are)"
    )
    sub.add_argument("--compress", choices=COMPRESSIONS, default="none", help="zstd, row by row, for archives")
    teachers(sub)
    sub = add("merge", "copy into STORE the shards that it lacks and SOURCE has", merge_stores)
    sub.add_argument("sources", nargs="+", metavar="SOURCE", help="stores of the same plan and teachers")
    sub = add("gc", "remove left-overs of killed writers and what was superseded", gc)
    sub.add_argument("--older-than", type=float, default=YOUNG_SECONDS, metavar="SECONDS",
                     help=f"age of private files to remove (default {YOUNG_SECONDS:.0f})")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="only say what would go")
    sub = add("drop", "remove one teacher's features", drop)
    sub.add_argument("key", metavar="KEY", nargs="?", help="the teacher; --teacher KEY says the same")
    sub.add_argument("--teacher", metavar="KEY", help=argparse.SUPPRESS)
    return p


@command("olavlm-cache")
def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status is 1 where something is left to be done."""
    args = arguments().parse_args(argv)
    value, text, sound = args.run(args)
    print(json.dumps(value, indent=1) if args.json else text)
    return 0 if sound else 1


def plan(args: argparse.Namespace) -> Answer:
    """Make the plan of these datasets, or extend the one that is there; without `--data`, tell of it."""
    added = 0
    if args.data:
        images = Dataset(args.data).images()
        if not len(images):
            raise JobFailed(f"{', '.join(args.data)}: no sample has an image; a plan has at least one row")
        _, added = StoreBuilder(args.store).extend_plan(images)
    rows = FeatureStore(args.store).rows
    value = {
        "plan": rows.hash,
        "images": rows.num_images,
        "added": added,
        "segments": [{"start": s.start, "images": len(s.images), "sha256": s.hash} for s in rows.segments],
    }
    text = (
        f"plan {rows.hash[:12]}: {counted(rows.num_images, 'image')} in {counted(len(rows.segments), 'segment')}, "
        f"{added} added now"
    )
    return value, text, True


def status(args: argparse.Namespace) -> Answer:
    """Coverage, failures and bytes of every teacher, and the pace of extractions that run."""
    store = FeatureStore(args.store)
    value: dict = {"images": store.rows.num_images, "teachers": {}}
    lines = [f"{args.store}: {counted(store.rows.num_images, 'image')}, {counted(len(store), 'teacher')}"]
    extractions = running_extractions(store.path)
    for group in open_teachers(store):
        if isinstance(group, Finding):
            value["teachers"][group.key] = {"damaged": group.detail}
            lines.append(str(group))
            continue
        ledger, coverage = group.ledger(), group.coverage()
        job = running_job(group, extractions.get(group.key))
        failures = list(failed_rows(group).values())
        value["teachers"][group.key] = {
            **asdict(coverage),
            "covered": coverage.covered,
            "missing": coverage.missing,
            "complete": coverage.complete,
            "bytes": ledger.bytes,
            "running": job,
            "damaged_shards": {str(shard): why for shard, why in ledger.damaged.items()},
            "failures": failures,
        }
        lines.append(f"{group.key}: {coverage}, {storage(ledger.bytes)} in {counted(ledger.table.num_rows, 'shard')}")
        if job:
            rate, eta, wanted = job["rows_per_second"], job["eta_seconds"], job["rows_wanted"]
            pace = f", {rate:.2f} rows/s, ETA {eta / 3600:.2f} h" if rate else ", none committed lately"
            of = f"an extraction of {wanted} rows{pace}" if wanted is not None else "no extraction that is on record"
            lines.append(f"  running: {counted(job['shards'], 'shard')} being written by {of}")
        lines += [f"  damaged: {why}" for why in list(ledger.damaged.values())[:SHOWN]]
        lines += [f"  row {f['row']} {printable(f['image'])}: {f['reason']}" for f in failures]
    return value, "\n".join(lines), True


def running_job(group: TeacherFeatures, extraction: Running | None) -> dict | None:
    """Shards that somebody writes, and of a running extraction rows/s, and seconds until all that it wants is there.

    The rate is that of the shards committed since it began, `RATE_SECONDS` ago at most. Others, such as `merge`, write
    shards without saying how many there will be.
    """
    shards = [shard for shard, lease in leased(group.folder / "leases").items() if is_live(lease)]
    if not shards:
        return None
    rate = missing = None
    if extraction is not None:
        ledger, now = group.ledger(), time.time()
        rows = dict(zip(ledger.table["shard"].to_pylist(), (ledger.stops - ledger.starts).tolist(), strict=True))
        since = max(extraction.began, now - RATE_SECONDS)
        rate = sum(rows[s] for s, at in ledger.times.items() if s in rows and at > since) / max(now - since, 1e-9)
        missing = group.coverage(group.plan.rows[: extraction.limit]).missing
    return {
        "what": "extraction" if extraction else "another command",
        "shards": len(shards),
        "rows_wanted": None if extraction is None else len(group.plan.rows[: extraction.limit]),
        "rows_per_second": rate,
        "eta_seconds": missing / rate if rate else None,
    }


def info(args: argparse.Namespace) -> Answer:
    """What the features are: shapes, storage, cards and statistics."""
    store = FeatureStore(args.store)
    value = {
        "store": str(store.path),
        "plan": {"sha256": store.rows.hash, "images": store.rows.num_images, "segments": len(store.rows.segments)},
        "teachers": {key: group.info() for key, group in store.items()},
    }
    lines = [f"{args.store}: plan {store.rows.hash[:12]}, {store.rows.num_images} images"]
    for key, about in value["teachers"].items():
        packed = "" if about["compress"] == "none" else f" + {about['compress']}"
        lines.append(
            f"{key}: shape {tuple(about['shape'])}, {about['dtype']}{packed}, {about['shard_rows']} rows a shard, "
            f"{about['row_bytes']} bytes a row, {about['shards']} shards, {storage(about['bytes'])}"
        )
        lines.append(f"  statistics: {json.dumps(about['statistics'])}")
        lines += [f"  {name}: {json.dumps(v)}" for name, v in about["card"].items()]
    return value, "\n".join(lines), True


def verify_store(args: argparse.Namespace) -> Answer:
    """Every finding of `verify`, and with `--live` of the teachers run again; 1 if there is any."""
    store = _opened(args)
    findings, checked = find_damage(store, args.teacher, fast=args.fast)
    value: dict = {"store": str(store.path), "fast": args.fast, "checked": checked}
    lines = []
    if args.live:
        from .reextract import compare_live

        try:
            live, wrong = compare_live(store, args)
        except BaseException:  # what was found already took hours, perhaps: a stop loses it no more than an error
            for finding in findings:
                print(printable(str(finding)), file=sys.stderr)
            raise
        value["live"] = live
        findings += wrong
        lines += [
            f"{key}: {n['rows']} rows run again (seed {live['seed']}), cosine {n['worst']:.6f} at worst"
            for key, n in live["teachers"].items()
            if n["rows"]
        ]
    value |= {"sound": not findings, "findings": [asdict(f) for f in findings]}
    what = "records and sizes" if args.fast else "every checksum"
    lines = [f"{key}: {n['shards']} shards, {n['rows']} rows, {what}" for key, n in checked.items()] + lines
    lines += _named(findings)
    lines.append(f"{counted(len(findings), 'finding')}{_remedy(findings, args.store)}" if findings else "sound")
    return value, "\n".join(lines), not findings


def _remedy(findings: list[Finding], store: str) -> str:
    """What mends those that something mends; of what `--live` finds a person has to say which side is wrong."""
    if any(f.shard is not None and f.kind != "live" for f in findings):
        return f"; olavlm-cache repair {store} extracts these shards again"
    keys = sorted({f.key for f in findings if f.shard is None})
    return f"; restore these files from a copy, or drop {', '.join(keys)} and extract it anew" if keys else ""


def find_damage(store: FeatureStore, keys: list[str] | None, *, fast: bool) -> tuple[list[Finding], dict]:
    """Every finding of `verify`, and what was looked at: shards and rows a teacher."""
    findings, checked = [], {}
    for group in open_teachers(store, keys):
        if isinstance(group, Finding):
            findings.append(group)
            continue
        shards = shards_to_verify(group)
        progress = Progress(len(shards), "shards", f"verifying {group.key}")
        findings += verify(group, fast=fast, on_shard=lambda shard, bar=progress: bar.update(1))
        progress.close()
        checked[group.key] = {"shards": len(shards), "rows": group.coverage().covered}
    return findings, checked


def repair(args: argparse.Namespace) -> Answer:
    """Extract again what is broken; 1 if something still is, or was lost."""
    from .repair import repair_store

    FeatureStore(args.store)  # is it one? a builder would make it
    StoreBuilder(args.store).grow()
    store = _opened(args)
    findings, _ = find_damage(store, args.teacher, fast=args.fast)
    if not findings:
        return {"findings": [], "repaired": {}, "sound": True}, "sound: nothing to repair", True
    print("\n".join(_named(findings)), file=sys.stderr)
    repaired = repair_store(store, findings, args)
    left, _ = find_damage(FeatureStore(args.store), args.teacher, fast=args.fast)
    value = {
        "findings": [asdict(f) for f in findings],
        "repaired": repaired.extracted,
        "removed": repaired.removed,
        "carried_over": repaired.carried_over,
        "quarantined": repaired.quarantined,
        "left": [asdict(f) for f in left],
        "sound": not left,
    }
    return value, "\n".join([*repaired.lines(), *_named(left)]), not left and not repaired.quarantined


def convert_store(args: argparse.Namespace) -> Answer:
    """A store in another storage dtype; 1 if rows could not be copied."""
    source = _opened(args)
    keys = args.teacher or source.teachers
    progress = Progress(sum(source[key].coverage().covered for key in keys), "rows", "converting")
    done = convert(args.store, args.target, dtype=args.dtype, compress=args.compress, keys=keys,
                   on_shard=lambda key, rows: progress.update(rows))  # fmt: skip
    progress.close()
    record_copy(location(args.target), args)
    target, value, lines = FeatureStore(args.target), {"store": args.store, "target": args.target, "teachers": {}}, []
    for transfer in done:
        before, after = source[transfer.key].info(), target[transfer.key].info()
        saved = 1 - after["bytes"] / before["bytes"] if before["bytes"] else 0.0
        value["teachers"][transfer.key] = {
            **asdict(transfer),
            "from": {k: before[k] for k in ("dtype", "compress", "bytes")},
            "to": {k: after[k] for k in ("dtype", "compress", "bytes")},
            "saved": saved,
            "fidelity": {k: v for k, v in after["statistics"].items() if not k.startswith("norm")},
        }
        fidelity = value["teachers"][transfer.key]["fidelity"]
        lines.append(
            f"{transfer.key}: {before['dtype']} {storage(before['bytes'])} "
            f"to {after['dtype']} {storage(after['bytes'])}, {100 * saved:.1f} % saved"
            + (
                f"; cosine {fidelity['cosine_mean']:.6f} mean, {fidelity['cosine_worst']:.6f} worst, relative error "
                f"{fidelity['relative_error_mean']:.2e} mean, {fidelity['relative_error_worst']:.2e} worst"
                if fidelity
                else ""
            )
        )
        lines += named(transfer.key, transfer.quarantined)
    return value, "\n".join(lines + _left(done)), not any(t.held or t.damaged or t.quarantined for t in done)


def merge_stores(args: argparse.Namespace) -> Answer:
    """Rows of several stores in one; 1 if wanted ones could not be copied."""
    rows = sum(g.coverage().covered for s in args.sources for g in FeatureStore(s).values())
    progress = Progress(rows, "rows", "merging")
    done = merge(args.store, args.sources, on_shard=lambda key, rows: progress.update(rows))
    progress.close()
    record_copy(location(args.store), args)
    store = FeatureStore(args.store)
    value = {
        "store": args.store,
        "sources": args.sources,
        "transfers": [asdict(t) for t in done],
        "teachers": {key: asdict(group.coverage()) for key, group in store.items()},
    }
    lines = [f"{t.key}: {counted(t.copied, 'shard')} copied, {t.already_there} there already" for t in done]
    for key, group in store.items():
        lines.append(f"{key}: {group.coverage()}")
        lines += named(key, list(failed_rows(group).values()))
    return value, "\n".join(lines + _left(done)), not any(t.held or t.damaged for t in done)


def gc(args: argparse.Namespace) -> Answer:
    """Remove what nobody needs."""
    found = list(collect(args.store, older_than=args.older_than, dry_run=args.dry_run))
    counts, sizes = Counter(), Counter()
    for item in found:
        counts[item.what] += 1
        sizes[item.what] += item.bytes
    total = sum(sizes.values())
    value = {"dry_run": args.dry_run, "bytes": total, "items": [asdict(item) for item in found]}
    lines = [f"{n} {what}, {storage(sizes[what])}" for what, n in sorted(counts.items())]
    verb = "would be removed" if args.dry_run else "removed"
    return value, "\n".join([*lines, f"{counted(len(found), 'item')}, {storage(total)} {verb}"]), True


def drop(args: argparse.Namespace) -> Answer:
    """Remove the features of one teacher."""
    if (args.key is None) == (args.teacher is None):
        raise UsageError("drop removes one teacher: olavlm-cache drop STORE KEY")
    store, key = FeatureStore(args.store), args.key or args.teacher
    try:
        size = store[key].ledger().bytes if key in store.teachers else 0
    except StoreError:
        size = 0  # damaged, which is a reason to drop it
    StoreBuilder(args.store).drop(key)
    value = {"store": args.store, "dropped": key, "bytes": size, "left": FeatureStore(args.store).teachers}
    return value, f"{key}: dropped, {storage(size)}; left: {', '.join(value['left']) or 'none'}", True


def _opened(args: argparse.Namespace) -> FeatureStore:
    store = FeatureStore(args.store)
    moved = [text.partition("=")[0] for text in getattr(args, "model", []) if "=" in text]
    for key in [*(args.teacher or []), *moved]:
        if key not in store.teachers:
            raise MissingFeatures(f"{args.store} has no features '{key}'; it has {', '.join(store.teachers) or 'none'}")
    return store


def _named(findings: list[Finding]) -> list[str]:
    rest = [f"... and {len(findings) - SHOWN} more; --json lists them all"] if len(findings) > SHOWN else []
    return [printable(str(f)) for f in findings[:SHOWN]] + rest


def _left(done: list[Transfer]) -> list[str]:
    held, damaged = sum(t.held for t in done), [d for t in done for d in t.damaged]
    lines = [f"{counted(held, 'shard')} in the hands of another writer; run the same command again"] if held else []
    return lines + [f"damaged, not copied: {printable(d)}" for d in damaged[:SHOWN]]


if __name__ == "__main__":
    sys.exit(main())
