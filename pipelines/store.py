"""olavlm-cache: make a plan, and look into a feature store.

olavlm-cache plan features --data pt.json      make the plan, or extend it by new images
olavlm-cache status features                   coverage, and every quarantined image with its reason
olavlm-cache info features --json              cards, shapes, dtypes, sizes, plan
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from olavlm.cache import Dataset, FeatureStore, StoreBuilder

from .cli import JobFailed, command


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-cache",
        description="Make a plan, and look into a feature store.",
        epilog="example: olavlm-cache status features --json",
    )
    commands = p.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="make the plan of a dataset, or extend it by the images that are new")
    plan.add_argument("--data", nargs="+", action="extend", metavar="FILE", help="LLaVA files; without, show the plan")
    status = commands.add_parser("status", help="coverage and quarantined images of every teacher")
    info = commands.add_parser("info", help="cards, shapes, dtypes, sizes, plan")
    for sub in (plan, status, info):
        sub.add_argument("store", metavar="STORE")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
    return p


@command("olavlm-cache")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    value, text = {"plan": plan, "status": status, "info": info}[args.command](args)
    print(json.dumps(value, indent=1) if args.json else text)
    return 0


def plan(args: argparse.Namespace) -> tuple[dict, str]:
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
    text = f"plan {rows.hash[:12]}: {rows.num_images} images in {len(rows.segments)} segments, {added} added now"
    return value, text


def status(args: argparse.Namespace) -> tuple[dict, str]:
    store = FeatureStore(args.store)
    value: dict = {"images": store.rows.num_images, "teachers": {}}
    lines = [f"{args.store}: {store.rows.num_images} images, {len(store)} teachers"]
    for key, group in store.items():
        coverage = group.coverage()
        failures = [
            {"row": row, "image": f.image, "reason": f.reason, "detail": f.detail} for row, f in group.failures()
        ]
        value["teachers"][key] = {
            **asdict(coverage),
            "covered": coverage.covered,
            "missing": coverage.missing,
            "complete": coverage.complete,
            "bytes": coverage.valid * group.layout.row_bytes,
            "failures": failures,
        }
        lines.append(f"{key}: {coverage}, {coverage.valid * group.layout.row_bytes / 1e6:.1f} MB of features")
        lines += [f"  row {f['row']} {f['image']}: {f['reason']}" for f in failures]
    return value, "\n".join(lines)


def info(args: argparse.Namespace) -> tuple[dict, str]:
    store = FeatureStore(args.store)
    value = {
        "store": str(store.path),
        "plan": {"sha256": store.rows.hash, "images": store.rows.num_images, "segments": len(store.rows.segments)},
        "teachers": {key: group.info() for key, group in store.items()},
    }
    lines = [f"{args.store}: plan {store.rows.hash[:12]}, {store.rows.num_images} images"]
    for key, group in store.items():
        lines += [
            f"{key}: shape {group.shape}, {group.dtype}, {group.layout.shard_rows} rows a shard, "
            f"{group.layout.row_bytes} bytes a row",
            *(f"  {name}: {json.dumps(v)}" for name, v in group.card.items()),
        ]
    return value, "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
