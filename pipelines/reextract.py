"""The teachers once more, as they were: loaded again, and run on a few rows to compare with what is stored.

What is needed to load a teacher is on its card, and where the images were, and in which batches they went, is in the
records of the extractions (STORE/runs). Both can be given anew, for a store that has moved to another machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets

import numpy as np

from olavlm.cache import (
    BadImage,
    CorruptFeatures,
    FeatureStore,
    Finding,
    ImageRoots,
    StoreError,
    TeacherFeatures,
)
from olavlm.cache import files as cache_files
from olavlm.cache.images import decode_rgb
from olavlm.cache.recorded_roots import extracted_from
from olavlm.teachers import Teacher
from olavlm.teachers.base import resolve_device

from .cli import JobFailed, UsageError
from .extract import absolute_model
from .extraction.extractor import TeacherSpec

LIVE_COSINE = 0.999  # of a stored row with the teacher's answer of now, stored alike
BATCH = 8


def compare_live(store: FeatureStore, args: argparse.Namespace) -> tuple[dict, list[Finding]]:
    """Run every wanted teacher on `args.live` random valid rows; what is less alike than `LIVE_COSINE` is a finding.

    The teacher's answer is compared as it would be stored, or rounding to int4 alone would be one. An image whose bytes
    are not those of the extraction, or that cannot be read now, is one too.
    """
    seed = args.seed if args.seed is not None else secrets.randbits(32)
    roots, answer, wrong = image_roots(store, args.images), {"seed": seed, "teachers": {}}, []
    for key in args.teacher or store.teachers:
        try:
            group, rng = store[key], np.random.default_rng(seed)
        except StoreError:
            continue  # its metadata is damaged, which is a finding already
        rows = group.plan.rows[group.ledger().covered(group.plan.rows)]
        rows = rows[~np.isin(rows, group.ledger().failures.rows)]
        rows = np.sort(rng.choice(rows, min(args.live, len(rows)), replace=False)) if len(rows) else rows
        teacher = load_again(group, args) if len(rows) else None
        worst = 1.0
        for start in range(0, len(rows), BATCH):
            alike, found = _compare(group, teacher, roots, rows[start : start + BATCH].tolist())
            worst, wrong = min([worst, *alike]), wrong + found
        answer["teachers"][key] = {"rows": len(rows), "worst": worst}
    return answer, wrong


def _compare(
    group: TeacherFeatures, teacher: Teacher, roots: ImageRoots, rows: list[int]
) -> tuple[list[float], list[Finding]]:
    pictures, alike, found = {}, [], []

    def tell(row: int, detail: str) -> None:
        shard = group.layout.shard_of(row)
        found.append(Finding(group.key, shard, "live", f"row {row} ({group.plan.image_of(row)}): {detail}"))

    for row in rows:
        image, record = group.plan.image_of(row), group.record(group.layout.shard_of(row))
        try:
            data = roots.read(image)
            pictures[row] = decode_rgb(data, image)
        except BadImage as e:
            tell(row, f"the image cannot be read now: {e.reason}")
            continue
        if hashlib.sha256(data).hexdigest() != record.images_sha256[row - record.rows[0]]:
            tell(row, "the image is not the one that was extracted")
    answers = teacher.encode(list(pictures.values())).numpy() if pictures else ()
    for row, answer in zip(pictures, answers, strict=True):
        try:
            values = group[row]
        except CorruptFeatures as e:
            tell(row, str(e))
            continue
        parts, fault, _ = group.layout.codec.encode(answer)
        if parts is None:
            tell(row, f"the teacher's answer of now could not be stored: {fault}")
            continue
        stored = values.ravel().astype(np.float64)
        fresh = group.layout.codec.decode(parts).ravel().astype(np.float64)
        norms = np.linalg.norm(stored) * np.linalg.norm(fresh)
        cosine = float(stored @ fresh / norms) if norms else float(np.array_equal(stored, fresh))
        alike.append(cosine)
        if cosine < LIVE_COSINE:
            tell(row, f"cosine {cosine:.6f} with the teacher's answer of now, at least {LIVE_COSINE} is expected")
    return alike, found


def image_roots(store: FeatureStore, given: list[str] | None) -> ImageRoots:
    """The roots that are given, or those on record; JobFailed if none is known."""
    roots = given or extracted_from(store)
    if not roots:
        raise JobFailed(f"where the images of {store.path} are is not on record, or they have moved: give --images")
    return ImageRoots(roots)


def load_again(group: TeacherFeatures, args: argparse.Namespace) -> Teacher:
    """The teacher of a group's card; `JobFailed` if what loads now is another."""
    teacher = spec_of(group, args).load(str(resolve_device(args.device)))
    if teacher.card.fingerprint() != group.fingerprint:
        raise JobFailed(
            f"{teacher.card.model} is not the teacher that filled {group.folder} ({group.card['model']}): its weights, "
            f"recipe or geometry differ; name the right one with --model {group.key}=MODEL"
        )
    return teacher


def spec_of(group: TeacherFeatures, args: argparse.Namespace) -> TeacherSpec:
    """How the teacher of a group is loaded, as its card says; `--model` moves it."""
    card, models = group.card, {}
    for text in args.model:
        key, eq, model = text.partition("=")
        if not (eq and key and model):
            raise UsageError(f"--model {text}: give KEY=MODEL, as in --model {group.key}=checkpoints/{group.key}")
        models[key] = model
    moved = group.key in models
    return TeacherSpec(
        group.key,
        card["name"],
        absolute_model(card["name"], models.get(group.key, card["model"])),
        None if moved else card.get("revision"),
        card["recipe"]["name"],
        card["geometry"],
        card["compute_dtype"],
    )


def recorded_arguments(store: FeatureStore, key: str) -> dict:
    """The arguments of the newest extraction of a teacher; {} if there is no record of one."""
    for name in reversed(cache_files.names(store.path / "runs")):
        try:
            run = json.loads(cache_files.read(store.path / "runs" / name))
            if any(t["key"] == key for t in run["teachers"]):
                return run["arguments"]
        except (ValueError, KeyError, TypeError):
            continue
    return {}
