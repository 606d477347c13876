"""docs/faults.md from results.json, and what is wrong with the results."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = ROOT / "docs" / "faults.md"

_LOSSES = {
    "wrong_values": ("wrong value", "wrong values"),
    "untrue_status": ("row of untrue status", "rows of untrue status"),
    "zeros_by_zarr": ("wrong row by plain Zarr", "wrong rows by plain Zarr"),
    "undone_commits": ("commit undone", "commits undone"),
    "lost_shards": ("shard lost for good", "shards lost for good"),
}

INTRODUCTION = """\
# Faults

What happens to a feature store when its writer is killed, stopped, doubled, or let down by the disk. Every fault below
is made for real, on small stores of float16, int8 and zstd-compressed int4 features: from nothing, with a shard done,
with more images than before, and with `--retry-failed`, which replaces finished shards. After each one a fresh
`FeatureStore` reads every row, `coverage()` is compared with what could be read, and the same command runs again; the
plan, the metadata and the shard files must then be those of an uninterrupted run, byte for byte, and the records must
say the same but for host, timings and revision.

This page is written by one command, which anyone can run again (on Linux, {minutes} minutes; `--quick`: under one; what
only root can do is skipped for others, with the reason):

    {command}

{date}, commit {commit}; {cores} cores of {cpu}, Linux {kernel}, stores on {file_system}; Python {python},
numpy {numpy}, pyarrow {pyarrow}, zarr {zarr}. Numbers:
[`benchmarks/faults/results.json`](../benchmarks/faults/results.json).

## The protocol

| step | what is done | what it is for |
|---|---|---|
| `make` | store, plan and metadata, each file written under a private name, then linked | no half file is ever seen |
| `lease` | `leases/000012.0` by exclusive create | one writer a shard |
| `recover` | removes staged files and files without a record; damage stays until `withdraw` | what the dead leave |
| `stage` | the shard is written under a private name | what stands, stands until all is ready |
| `compare` | every byte is read back and compared with what was meant | disks that lie |
| `fsync` | the staged files are flushed | power cuts |
| `withdraw` | only to replace: the old record goes first, then its files | no record of other files |
| `place` | links to the public names, never over another file; flushes the folders | writers taken for dead |
| `record` | `commits/000012.0.json` by exclusive create, with its own checksum | now the shard exists |
| `release` | the staged names and the lease go | |
| `index` | the columns of all records, beside the store; can be made anew | |

A killed process dies by a SIGKILL to itself just before one of its changes of the file system (a link, a rename, a
removal, a new folder, a file opened for writing), before a row, or before a step; which one is drawn, and "points" are
the different ones drawn. Where the page cache is left alone `os.fsync` does nothing, which saves time and changes
nothing; it is real for "killed at any instant".

## Faults

"Wrong" are values read that nobody wrote, and rows of which the status says other than reading shows; after kills also
rows that plain zarr-python reads as anything but NaN or what was written. "Undone" counts shards that were committed
before the fault and were not being replaced, and yet had to be done again; "lost for good" those that running the same
command again does not put right. The control arm makes the same fault, or the one named, with exactly one protection
left out, until it has lost something: that is what the protection is for.

"""

_POWER = """
The power cut is a model, since nothing here can cut it. Of a file only the bytes of its last `fsync` are sure, and of a
folder only the names it had at its own last `fsync`. At the cut every name that changed since is as it was then or as
it was last, by the toss of a coin, and every file that was never flushed has no bytes, zeros, a part of its bytes or
all of them; every second time the worst of all this happens together. What was there before the job is sure. Real file
systems keep more than the model does.
"""

_DAMAGES = """
## Random damages

{total} damages to finished stores, one at a time, each undone before the next (seed {seed}). "Found by reading": a
fresh reader, asked for every row, refuses at least one. "Found by `verify`": `olavlm-cache verify` has a finding. The
control is plain zarr-python on the same files, which knows each row's own checksum and no records.

| damage | times | found by reading | found by `verify` | wrong values read | control: wrong through zarr-python |
|---|---|---|---|---|---|
"""


def render(results: dict) -> str:
    """docs/faults.md."""
    minutes = -(-results["seconds"] // 60)
    facts = {**results["machine"], **results["machine"]["versions"], "command": results["command"], "minutes": minutes}
    lines = [INTRODUCTION.format(**facts)]
    lines.append(
        "| fault | how it is made | times tried | points | seed | wrong | undone | lost for good "
        "| bytes equal to an uninterrupted run | control arm: left out, and what was lost |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines += [_fault_line(fault) for fault in results["faults"]]
    notes = [f"{f['name']}: {f['undone_allowed']}" for f in results["faults"] if f["undone_allowed"]]
    lines += [f"\n¹ {note}\n" for note in notes]
    lines.append(_POWER)
    damages = results["damages"]
    lines.append(_DAMAGES.format(total=sum(d["tried"] for d in damages.values()), seed=results["seed"]))
    lines += [
        f"| {kind} | {d['tried']} | {d['found_by_reading']} | {d['found_by_verify']} | {d['wrong_values']} "
        f"| {d['wrong_by_zarr']} |\n"
        for kind, d in damages.items()
    ]
    return "".join(lines)


def _fault_line(fault: dict) -> str:
    name = fault["name"] + (" ¹" if fault["undone_allowed"] else "")
    if "skipped" in fault:
        return f"| {name} | {fault['how']} | skipped: {fault['skipped']} | | | | | | | |\n"
    wrong = fault["wrong_values"] + fault["untrue_status"] + fault["zeros_by_zarr"]
    cells = [
        name, fault["how"], fault["times"], fault["points"] or "", fault["seed"], wrong, fault["undone_commits"],
        fault["lost_shards"], f"{fault['bytes_equal']} of {fault['times']}", _control_cell(fault["control"]),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _control_cell(control: dict) -> str:
    what = control["what"].rstrip(".") + (f"; {control['how']}" if control["how"] else "")
    if "skipped" in control:
        return f"{what}: skipped"
    return f"{what}: {_losses(control)}, {control['losing_times']} of {control['times']} times"


def _losses(found: dict) -> str:
    return ", ".join(
        f"{found[key]} {one if found[key] == 1 else many}" for key, (one, many) in _LOSSES.items() if found[key]
    ) or "nothing"  # fmt: skip


def complaints(results: dict) -> list[str]:
    """What of the results must not be: a protected arm that lost something, a control arm that lost nothing."""
    wrong = []
    for fault in results["faults"]:
        if "skipped" in fault:
            continue
        allowed = ("undone_commits",) if fault["undone_allowed"] else ()
        costs = {key: 0 if key in allowed else fault[key] for key in _LOSSES}
        if any(costs.values()) or fault["bytes_equal"] != fault["times"] or not fault["times"]:
            wrong.append(f"{fault['name']}: {_losses(fault)} in {fault['times']} times, e.g. {fault['examples']}")
        if not fault["control"].get("losing_times") and "skipped" not in fault["control"]:
            wrong.append(f"{fault['name']}: its control arm, without {fault['control']['without']}, lost nothing")
    for kind, count in (results["damages"] or {}).items():
        found = {count["tried"], count["found_by_reading"], count["found_by_verify"]}
        if len(found) > 1 or count["wrong_values"]:
            wrong.append(f"damage, {kind}: {count}")
    return wrong
