"""Runs of other seeds, on other machines or other days, put together: figures keep a value a seed.

python -m benchmarks.miniature run --form full --seeds 2 --name NAME                    seeds 0 and 1
python -m benchmarks.miniature run --form full --seeds 3 --first-seed 2 --name NAME     2 to 4, beside those
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Run = Mapping[str, Any]
"""As results/*.json keeps it."""


def joined(before: Run, now: Run) -> dict[str, Any]:
    """`now`, behind the seeds of `before`; `now` alone where it has all of those, of every arm, itself.

    Raises:
        ValueError: what is kept is no run of this kind, is of another form, other small models or arms, shares some of
            its seeds with this one, or an arm lacks a seed.
    """
    if not {"seeds", "form"} <= before.keys():
        raise ValueError("what is there is no run of the experiments; give another --name")
    if before["form"] != now["form"] or before["figures"].get("models") != now["figures"].get("models"):
        raise ValueError("what is there is of another form or of other small models; remove it, or give another --name")
    there, here = before["seeds"], now["seeds"]
    counts, had = _series(now), _series(before)
    if set(here) >= set(there) and all(counts.get(key, 0) >= count for key, count in had.items()):
        return dict(now)
    if common := sorted(set(here) & set(there)):
        raise ValueError(
            f"seeds {_listed(common)} are there already; run all again, of all the arms, or none: --first-seed"
        )
    if (kept := before["figures"].keys()) != now["figures"].keys():
        raise ValueError(f"what is there has {', '.join(kept)}, and this run {', '.join(now['figures'])}")
    figures = {
        name: [_both(one, two, len(there), len(here)) for one, two in zip(before["figures"][name], found, strict=True)]
        for name, found in now["figures"].items()
    }
    parts = [*before.get("parts", [_part(before)]), _part(now)]
    told = "; ".join(
        f"seeds {_listed(part['seeds'])} in {part['seconds'] / 60:.0f} minutes on {part['cores']} cores of "
        f"{part['cpu']}, commit {part['commit']}, {part['date']}"
        for part in parts
    )
    for figure in [figure for found in figures.values() for figure in found if figure["kind"] == "seeds"][:1]:
        figure["notes"] = [*figure["notes"], f"Of several runs: {told}."]
    seconds = round(before["seconds"] + now["seconds"], 1)
    return {**now, "seeds": [*there, *here], "seconds": seconds, "figures": figures, "parts": parts}


def _series(run: Run) -> dict[tuple[str, str, str], int]:
    """By figure, title and arm, of how many seeds there are values."""
    return {
        (name, figure["title"], arm): len(next(iter(columns.values())))
        for name, found in run["figures"].items()
        for figure in found
        if figure["kind"] == "seeds"
        for arm, columns in figure["values"].items()
    }


def _part(run: Run) -> dict[str, Any]:
    machine = run["machine"]
    about = {name: machine[name] for name in ("commit", "date", "cpu", "cores")}
    return {"seeds": run["seeds"], "seconds": run["seconds"], **about}


def _both(one: Run, two: Run, seeds: int, more: int) -> dict[str, Any]:
    """A figure's values a seed, one run's behind the other's; what has none is the later run's."""
    if one["title"] != two["title"]:
        raise ValueError(f"{one['title']} was measured there, {two['title']} here")
    lists = {"seeds": ("values",), "item pairs": ("seeds", "counts", "p")}.get(two["kind"], ())
    return {**two, **{name: _lists(two["title"], one[name], two[name], seeds, more) for name in lists}}


def _lists(title: str, one: Any, two: Any, seeds: int, more: int) -> Any:
    if isinstance(one, dict):
        if one.keys() != two.keys():
            raise ValueError(f"{title}: {', '.join(one)} there, {', '.join(two)} here; run the same arms")
        return {name: _lists(f"{title}, {name}", one[name], two[name], seeds, more) for name in one}
    if (len(one), len(two)) != (seeds, more):
        raise ValueError(f"{title}: of {seeds} and {more} seeds {len(one)} and {len(two)} are there; finish them first")
    return [*one, *two]


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))
