"""Arms of a comparison, measured by turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Arm = Callable[[int], float]
"""Does its work once, for round `k`, and returns the seconds that count. Preparing and tidying are not counted."""


def alternate(arms: Mapping[str, Arm], rounds: int, fewer: Mapping[str, int] | None = None) -> dict[str, list[float]]:
    """The seconds of every arm in every round, after one round that is not kept.

    Every round starts with another arm. Those in `fewer` take part in so many rounds alone, the first.
    """
    limits = {name: (fewer or {}).get(name, rounds) for name in arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(rounds + 1):
        names = [name for name in arms if k <= limits[name]]
        for name in names[k % len(names) :] + names[: k % len(names)]:
            taken = arms[name](k)
            if k:
                seconds[name].append(round(taken, 6))
    return seconds
