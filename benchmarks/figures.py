"""Measured figures: raw rounds to keep as JSON, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median

from .intervals import LEVEL, Interval, paired, t_interval


@dataclass
class Comparison:
    """Arms that did the same to the same payload, by turns."""

    title: str
    rows: int  # a round
    bytes: int  # of payload, a round; 0 where the rows are what counts
    floor: str  # the arm that the others are compared with
    seconds: dict[str, list[float]]  # of each arm, a round
    checksums: dict[str, str] = field(default_factory=dict)  # what an arm verifies
    must: dict[str, float] = field(default_factory=dict)  # speed over the floor that an arm is to reach
    bytes_on_disk: dict[str, float] = field(default_factory=dict)  # for one byte of payload
    gflop: float = 0.0  # a row, where arithmetic is the work
    notes: list[str] = field(default_factory=list)
    kind: str = "comparison"

    def ratios(self, arm: str) -> list[float]:
        """Speed over the floor's, round by round."""
        return [floor / own for floor, own in zip(self.seconds[self.floor], self.seconds[arm], strict=True)]

    def rate(self, arm: str) -> float:
        """Rows a second, by the median round."""
        return self.rows / median(self.seconds[arm])

    def markdown(self) -> str:
        rounds = len(self.seconds[self.floor])
        header = ["arm", "MB/s" if self.bytes else "rows/s", "ms a row", "speed over the floor"]
        header += ["GFLOP/s"] * bool(self.gflop)
        header += ["must reach"] * bool(self.must) + ["checksum verified"] * bool(self.checksums)
        header += ["bytes on disk"] * bool(self.bytes_on_disk)
        lines = []
        for arm, seconds in self.seconds.items():
            taken, rate = median(seconds), self.rate(arm)
            speed = f"{self.bytes / taken / 1e6:,.0f}" if self.bytes else number(rate)
            line = [arm, speed, number(taken / self.rows * 1e3)]
            line.append("1" if arm == self.floor else spread(self.ratios(arm)))
            line += [number(self.gflop * rate)] * bool(self.gflop)
            line += [f"{self.must[arm]}" if arm in self.must else ""] * bool(self.must)
            line += [self.checksums.get(arm, "")] * bool(self.checksums)
            if self.bytes_on_disk:
                line.append(f"{self.bytes_on_disk[arm]:.4f}" if arm in self.bytes_on_disk else "")
            lines.append(line)
        payload = f", {number(self.bytes / 1e6)} MB" if self.bytes else ""
        about = f"**{self.title}**: {self.rows:,} rows{payload} a round, {rounds} rounds"
        return "\n\n".join([about, table(header, lines), *self.notes])


@dataclass
class Measurement:
    """What fresh processes, or the steps of a run, measured of themselves; columns are named with their unit."""

    title: str
    values: dict[str, dict[str, list[float]]]  # subject -> column -> one value a process
    rows: dict[str, int] = field(default_factory=dict)  # of subjects that are compared by the row
    limits: dict[str, float] = field(default_factory=dict)  # column -> what it must stay below
    notes: list[str] = field(default_factory=list)
    of: str = "fresh processes"  # what each value was taken of
    kind: str = "measurement"

    def markdown(self) -> str:
        columns = list(next(iter(self.values.values())))
        header = ["", *columns] + [f"{c} a million rows" for c in columns if self.rows and c.startswith("all")]
        lines = []
        for subject, values in self.values.items():
            line = [subject, *(spread(values[c]) for c in columns)]
            if self.rows:
                per_million = [median(values[c]) / self.rows[subject] * 1e6 for c in columns if c.startswith("all")]
                line += [f"{value:.3g}" for value in per_million]
            lines.append(line)
        if self.limits:
            lines.append(["must stay below", *(f"{self.limits[c]:g}" if c in self.limits else "" for c in columns)])
        rounds = len(next(iter(next(iter(self.values.values())).values())))
        about = f"**{self.title}**: {self.of}, {rounds} for each line"
        return "\n\n".join([about, table(header, lines), *self.notes])


@dataclass
class Steps:
    """Optimizer steps of several arms that took turns, and how many times longer one takes than another."""

    title: str
    images: int  # a step
    seconds: dict[str, list[float]]  # of each arm, a step, by rounds; an arm may take part in the first rounds alone
    over: dict[str, str]  # arm -> the arm that it is compared with
    at_most: dict[str, float] = field(default_factory=dict)  # arm -> limit of its time over the other's
    at_least: dict[str, float] = field(default_factory=dict)
    gflop: dict[str, float] = field(default_factory=dict)  # a step
    notes: list[str] = field(default_factory=list)
    kind: str = "steps"

    def ratios(self, arm: str) -> list[float]:
        """Time over that of the arm it is compared with, round by round."""
        return [own / other for own, other in zip(self.seconds[arm], self.seconds[self.over[arm]], strict=False)]

    def arithmetic(self, arm: str) -> float:
        """As `ratios`, of the FLOPs."""
        return self.gflop[arm] / self.gflop[self.over[arm]]

    def rate(self, arm: str) -> float:
        """Images a second, by the median round."""
        return self.images / median(self.seconds[arm])

    def markdown(self) -> str:
        header = ["arm", "rounds", "ms a step", "images/s", *["GFLOP a step"] * bool(self.gflop), "compared with"]
        header += ["time over its", *["FLOPs over its"] * bool(self.gflop), "must be"]
        lines = []
        for arm, seconds in self.seconds.items():
            line = [arm, str(len(seconds)), spread([1e3 * s for s in seconds]), number(self.rate(arm))]
            line += [number(self.gflop[arm])] * bool(self.gflop)
            compared = arm in self.over
            line += [self.over.get(arm, ""), spread(self.ratios(arm)) if compared else ""]
            line += [f"{self.arithmetic(arm):.3g}" if compared else ""] * bool(self.gflop)
            line.append(f"<= {self.at_most[arm]}" if arm in self.at_most else "")
            line[-1] += f">= {self.at_least[arm]}" if arm in self.at_least else ""
            lines.append(line)
        about = f"**{self.title}**: {self.images} images a step"
        return "\n\n".join([about, table(header, lines), *self.notes])


@dataclass
class Agreement:
    """The same rows got in different ways: whether their bytes are equal, or how near they are."""

    title: str
    rows: int
    equal: dict[str, bool] = field(default_factory=dict)  # what was compared -> whether the files' bytes are equal
    cosines: dict[str, list[float]] = field(default_factory=dict)  # what was compared -> of each row
    must: dict[str, float] = field(default_factory=dict)  # what was compared -> what the worst row is to reach
    notes: list[str] = field(default_factory=list)
    kind: str = "agreement"

    def markdown(self) -> str:
        lines = [[what, "equal" if same else "DIFFERENT", "", "equal"] for what, same in self.equal.items()]
        for what, cosines in self.cosines.items():
            # Rounded down: 0.999989 is not 0.99999.
            worst = f"{int(min(cosines) * 1e9) / 1e9:.9f}"
            lines.append([what, "", worst, f"{self.must[what]}" if what in self.must else ""])
        header = ["compared", "bytes", "cosine, worst row", "must be"]
        return "\n\n".join([f"**{self.title}**: {self.rows:,} rows", table(header, lines), *self.notes])


@dataclass
class Answers:
    """What a model answered about pictures, and how often it was what the picture shown calls for."""

    title: str
    arms: dict[str, list[dict]]  # arm -> of each question: name, shown, answer, expected; learnt, if none is expected
    must: dict[str, float] = field(default_factory=dict)  # arm -> the share that it is to reach
    notes: list[str] = field(default_factory=list)
    kind: str = "answers"

    def right(self, arm: str) -> int:
        """Answers that are the expected one or, where none is, another one than was learnt for another picture."""
        return sum(
            one["answer"] != one["learnt"] if one["expected"] is None else one["answer"] == one["expected"]
            for one in self.arms[arm]
        )

    def markdown(self) -> str:
        header, lines = ["arm", "questions", "answers that the picture calls for", "share", "must reach"], []
        for arm, asked in self.arms.items():
            right = self.right(arm)
            must = f"{self.must[arm]}" if arm in self.must else ""
            lines.append([arm, str(len(asked)), str(right), f"{right / len(asked):.2f}", must])
        shown = [f"**{self.title}**", table(header, lines), *self.notes]
        for arm, asked in self.arms.items():
            examples = [f"- {one['shown']}: {' '.join(one['answer'].split())}" for one in asked[:3]]
            shown += [f"The first answers of *{arm}*:", "\n".join(examples)]
        return "\n\n".join(shown)


@dataclass
class Count:
    """What was counted, not timed: the same in every run."""

    title: str
    values: dict[str, dict[str, float]]  # subject -> column -> value
    notes: list[str] = field(default_factory=list)
    kind: str = "count"

    def markdown(self) -> str:
        columns = list(next(iter(self.values.values())))
        lines = [[subject, *(number(values[column]) for column in columns)] for subject, values in self.values.items()]
        return "\n\n".join([f"**{self.title}**", table(["", *columns], lines), *self.notes])


@dataclass
class Seeds:
    """What runs that differ in their seed gave, by arm; arms are compared seed by seed."""

    title: str
    values: dict[str, dict[str, list[float]]]  # arm -> column -> a value a seed
    over: dict[str, str] = field(default_factory=dict)  # arm -> the arm that it is compared with
    digits: int = 3
    notes: list[str] = field(default_factory=list)
    kind: str = "seeds"

    @property
    def columns(self) -> list[str]:
        return list(next(iter(self.values.values())))

    def interval(self, arm: str, column: str) -> Interval:
        """Of the mean over seeds."""
        return t_interval(self.values[arm][column])

    def difference(self, arm: str, column: str) -> Interval:
        """Of the mean difference from the arm it is compared with, over the seeds that both have."""
        pairs = zip(self.values[arm][column], self.values[self.over[arm]][column], strict=False)
        return paired(*zip(*pairs, strict=True))

    def written(self, interval: Interval) -> str:
        """The mean, and the bounds where there is more than one seed."""
        mean, *bounds = (f"{x:.{self.digits}f}" for x in (interval.mean, interval.low, interval.high))
        return f"{mean} [{', '.join(bounds)}]" if interval.values > 1 else mean

    def markdown(self) -> str:
        lines = []
        for arm in self.values:
            seeds = len(self.values[arm][self.columns[0]])
            lines.append([arm, str(seeds), *(self.written(self.interval(arm, c)) for c in self.columns)])
        for arm, other in self.over.items():
            found = [self.difference(arm, c) for c in self.columns]
            lines.append([f"{arm} minus {other}", str(found[0].values), *map(self.written, found)])
        about = f"**{self.title}**: means over seeds with {LEVEL:.0%} intervals (Student's t)"
        return "\n\n".join([about, table(["", "seeds", *self.columns], lines), *self.notes])


@dataclass
class ItemPairs:
    """Two models on the same items, seed by seed: how many items only one of them has right, and McNemar's exact p."""

    title: str
    first: str
    second: str
    seeds: list[int]
    counts: dict[str, list[list[int]]]  # figure -> a seed: items, right by the first alone, right by the second alone
    p: dict[str, list[float]]  # figure -> a seed
    notes: list[str] = field(default_factory=list)
    kind: str = "item pairs"

    def markdown(self) -> str:
        header = ["", "items", *(f"seed {i}: only {self.first}, only {self.second}, p" for i in self.seeds)]
        lines = [
            [name, str(rows[0][0]), *(f"{a}, {b}, {p:.2g}" for (_, a, b), p in zip(rows, self.p[name], strict=True))]
            for name, rows in self.counts.items()
        ]
        return "\n\n".join([f"**{self.title}**: McNemar's exact test, two-sided", table(header, lines), *self.notes])


Figures = Comparison | Measurement | Steps | Agreement | Answers | Count | Seeds | ItemPairs


def to_json(figures: Iterable[Figures]) -> list[dict]:
    return [asdict(f) for f in figures]


def from_json(figures: Iterable[dict]) -> list[Figures]:
    classes = (Comparison, Measurement, Steps, Agreement, Answers, Count, Seeds, ItemPairs)
    kinds = {cls.kind: cls for cls in classes}
    return [kinds[f["kind"]](**f) for f in figures]


def spread(values: list[float]) -> str:
    """Median (lowest..highest)."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))}..{number(max(values))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:" if not h.startswith("checksum") else "---" for h in header[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])
