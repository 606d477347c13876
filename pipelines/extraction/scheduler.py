"""Who extracts which block next, and what becomes of a shard when something fails.

The crew tells what happens (`Ready`, `Looked`, `Returned`, `Gone`), the scheduler decides. It knows nothing of Ray:
`cluster.py` is the crew of actors, and tests play one.

    a shard fails          it goes to the back of the queue, alone; the third time it is given up, with the reason
    its worker dies,       so do all that the worker had; a shard whose worker died twice goes last, to a worker that
    hangs, loses its node  has nothing else, which could be the one to blame; the fifth time it is given up
    another run is at it   it is tried again later, with growing pauses; at the very end not for ever
    a worker fails all     it is replaced, and its node left alone after a few times: a lost disk, a wrong model there

A worker holds two blocks, so that one computes while the other is committed. Every way to fail is bounded, so that a
run ends; what is left then is missing in the store, and the summary says so.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from olavlm.cache import ShardTask
from olavlm.cache.lease import LEASE_SECONDS
from olavlm.cache.wording import counted
from olavlm.pipelines.cli import Progress, Stopped

from .blocks import Block, plan_blocks
from .crew import Crew, Event, Gone, Looked, Ready, Returned, Worker
from .extractor import ShardResult, Stages
from .summary import Tally

FAILURES = 3  # of one shard, before it is given up
DEATHS = 5  # of workers that had the shard; more than FAILURES, as most die of something else
DEATHS_IN_A_ROW = 20  # of workers, without a shard done in between, before the run is given up
FAILURES_IN_A_ROW = 5  # of one worker, before it is replaced
SUSPECT_DEATHS = 2  # from which on a shard is given to a worker that has nothing else
BLOCKS_HELD = 2  # by a worker: one computes, one is committed
STALL_SECONDS = 1200.0  # without a sign of progress, before a worker counts as stuck
HELD_SECONDS = (2.0, 60.0)  # before a shard that another run holds is tried again: at first, at most
HELD_LIMIT = 2 * LEASE_SECONDS  # with nothing else left to do; a dead run's lease has expired by then
START_SECONDS = 1800.0  # that workers may take to start before the run is given up: models are large
JOIN_SECONDS = 60.0  # with no worker and no room for one, before the run is given up: a node may join a cluster
LOOK_SECONDS = 1.0
STOP_SECONDS = 20.0  # that workers may take to drop what is in flight


@dataclass
class _Desk:
    """What a worker that is ready has before it."""

    since: float
    blocks: int = 0
    tasks: set[ShardTask] = field(default_factory=set)
    has_suspect: bool = False
    failures_in_a_row: int = 0
    last_failure: str = ""
    progress: int = 0
    still: float = 0.0
    """Seconds without progress, of those in which somebody looked."""
    stages: Stages = field(default_factory=Stages)


class Scheduler:
    """Lets a crew extract `tasks`, and keeps the tally.

    `workers`: how many at most (as many as there is room for by default). `stop`: holds the name of a signal when one
    has arrived.
    """

    def __init__(
        self,
        crew: Crew,
        tasks: Sequence[ShardTask],
        tally: Tally,
        *,
        workers: int | None = None,
        stall: float = STALL_SECONDS,
        stop: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew, self._tally, self._stall, self._stop, self._clock = crew, tally, stall, stop, clock
        room = max(1, crew.room())
        self._most = min(workers or len(tasks), len(tasks))
        self._queue = deque(plan_blocks(tasks, min(self._most, room)))
        self._suspects: deque[Block] = deque()
        self._left = set(tasks)
        self._held: dict[ShardTask, float] = {}  # when it is to be tried again
        self._first_held: dict[ShardTask, float] = {}
        self._tries: Counter[ShardTask] = Counter()
        self._failures: Counter[ShardTask] = Counter()
        self._deaths: Counter[ShardTask] = Counter()
        self._deaths_in_a_row = 0
        self._desks: dict[Worker, _Desk] = {}
        self._nobody_since: float | None = None
        self._progress = Progress(sum(t.num_rows for t in tasks), "rows", "extracting")
        self._rows = 0  # done since the bar was moved

    def run(self) -> None:
        """Until every task is done or given up. Raises `Stopped` on a signal, with what was in flight dropped."""
        last = self._clock()
        try:
            while self._left:
                if self._stop:  # noted, not raised: an exception in the middle of Ray's own code would be Ray's
                    self._drop_all()
                    raise Stopped(self._stop[0])
                self._try_held_again()
                self._hire()
                self._hand_out()
                for event in self._crew.look(LOOK_SECONDS):
                    self._note(event)
                now = self._clock()
                self._dismiss_the_stuck(now - last)
                self._dismiss_the_useless()
                last = now
                self._show()
            for event in self._crew.last_look():
                self._note(event)
        finally:
            for desk in self._desks.values():
                self._count_time(desk)
            self._desks.clear()
            self._progress.close()

    def _try_held_again(self) -> None:
        now = self._clock()
        for task in [task for task, due in self._held.items() if due <= now]:
            del self._held[task]
            self._queue_alone(task)

    def _hire(self) -> None:
        busy = sum(desk.blocks > 0 for desk in self._desks.values())
        waiting = len(self._queue) + len(self._suspects)
        at_hand = self._crew.hire(max(1, min(self._most, busy + waiting)))
        now = self._clock()
        if self._desks:
            self._nobody_since = None
            return
        if self._nobody_since is None:
            self._nobody_since = now
        patience = START_SECONDS if at_hand else JOIN_SECONDS if self._crew.elastic else 0.0
        if now - self._nobody_since >= patience:
            self._end(f"no worker could be started: {self._crew.obstacle}")

    def _hand_out(self) -> None:
        """Everyone a first block before anyone a second; those still starting are to find one too."""
        starting = self._crew.hire(0) - len(self._desks)
        for held in range(BLOCKS_HELD):
            for worker, desk in self._desks.items():
                if desk.blocks != held or desk.has_suspect:
                    continue
                if len(self._queue) > (starting if held else 0):
                    self._give(worker, desk, self._queue.popleft())
                elif self._suspects and not held:
                    desk.has_suspect = True
                    self._give(worker, desk, self._suspects.popleft())

    def _give(self, worker: Worker, desk: _Desk, block: Block) -> None:
        if not desk.blocks:
            desk.still = 0.0
        desk.blocks += 1
        desk.tasks.update(block)
        self._crew.give(worker, block)

    def _note(self, event: Event) -> None:
        desk = self._desks.get(event.worker)
        match event:
            case Ready():
                if not self._tally.workers:
                    self._progress.begin()
                self._desks[event.worker] = _Desk(self._clock())
                self._tally.workers += 1
            case Gone():
                self._lost(event.worker, event.reason)
            case Looked() if desk is not None:
                if event.status.progress > desk.progress:
                    desk.progress, desk.still = event.status.progress, 0.0
                desk.stages = event.status.stages
                for result in event.status.results:
                    self._settle(desk, result)
            case Returned() if desk is not None:
                desk.blocks -= 1
                desk.still, desk.has_suspect = 0.0, False
                for result in event.results:
                    self._settle(desk, result)
                for task in desk.tasks.intersection(event.block):
                    self._settle(desk, ShardResult(task, "failed", "its worker returned without it"))

    def _settle(self, desk: _Desk, result: ShardResult) -> None:
        task = result.task
        if task not in desk.tasks:
            return  # a look has told it before
        desk.tasks.remove(task)
        match result.outcome:
            case "committed" | "done":
                if result.outcome == "committed":
                    self._tally.add(result)
                else:
                    self._tally.done_by_others += 1
                self._deaths_in_a_row = desk.failures_in_a_row = 0
                self._finish(task)
            case "held" | "lost":
                self._hold(task, result.detail)
            case "failed":
                desk.failures_in_a_row += 1
                desk.last_failure = result.detail
                self._failures[task] += 1
                if self._failures[task] < FAILURES:
                    self._progress.say(f"{task.key} shard {task.shard} failed, and is tried again: {result.detail}")
                self._again(task, self._failures[task], FAILURES, result.detail)
            case "dropped":
                self._queue_alone(task)
            case other:
                raise AssertionError(other)

    def _hold(self, task: ShardTask, detail: str) -> None:
        now = self._clock()
        since = self._first_held.setdefault(task, now)
        if now - since > HELD_LIMIT and self._left <= self._first_held.keys():
            self._give_up(task, f"held by another run for {now - since:.0f} s {detail}".strip())
            return
        first, most = HELD_SECONDS
        self._held[task] = now + min(most, first * 2 ** min(self._tries[task], 16))
        self._tries[task] += 1

    def _again(self, task: ShardTask, times: int, most: int, reason: str) -> None:
        """Once more, or no more."""
        if times >= most:
            self._give_up(task, f"{times} times: {reason}")
        else:
            self._tally.retries += 1
            self._queue_alone(task)

    def _queue_alone(self, task: ShardTask) -> None:
        """So that it takes no other shard along when it fails again."""
        suspect = self._deaths[task] >= SUSPECT_DEATHS
        (self._suspects if suspect else self._queue).append((task,))

    def _give_up(self, task: ShardTask, reason: str) -> None:
        self._tally.given_up.append(f"{task.key} shard {task.shard}, {reason}")
        self._progress.say(f"given up: {self._tally.given_up[-1]}")
        self._finish(task)

    def _finish(self, task: ShardTask) -> None:
        self._left.discard(task)
        self._rows += task.num_rows

    def _lost(self, worker: Worker, reason: str) -> None:
        desk = self._desks.pop(worker, None)
        if desk is None:
            self._progress.say(f"{worker.name} could not start: {reason}")
            return
        self._count_time(desk)
        self._tally.deaths += 1
        self._progress.say(f"{worker.name} is gone, with {counted(len(desk.tasks), 'shard')} to do: {reason}")
        for task in sorted(desk.tasks, key=lambda task: (task.key, task.shard)):
            self._deaths[task] += 1
            self._again(task, self._deaths[task], DEATHS, reason)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= max(DEATHS_IN_A_ROW, 3 * self._crew.room()):
            self._end(f"{self._deaths_in_a_row} workers died in a row, the last: {reason}")

    def _dismiss_the_stuck(self, seconds: float) -> None:
        """Time in which nobody looked, as when the driver was suspended, says nothing of the workers."""
        for worker, desk in list(self._desks.items()):
            desk.still = desk.still + min(seconds, 5 * LOOK_SECONDS) if desk.blocks else 0.0
            if desk.still > self._stall:
                self._crew.dismiss(worker)
                self._lost(worker, f"no progress for {desk.still:.0f} s")

    def _dismiss_the_useless(self) -> None:
        """Who fails everything is the first to ask for more: it would fail all there is before others could do it."""
        for worker, desk in list(self._desks.items()):
            if desk.failures_in_a_row >= FAILURES_IN_A_ROW:
                blame = f"it failed {desk.failures_in_a_row} shards in a row, the last: {desk.last_failure}"
                self._crew.dismiss(worker, blame)
                self._progress.say(f"{worker.name} is replaced: {blame}")
                self._count_time(self._desks.pop(worker))
                for task in sorted(desk.tasks, key=lambda task: (task.key, task.shard)):
                    self._queue_alone(task)

    def _drop_all(self) -> None:
        """Workers drop what is in flight themselves, as they know it best; a second signal waits for nobody."""
        self._crew.stop()
        deadline = self._clock() + STOP_SECONDS
        while any(d.blocks for d in self._desks.values()) and self._clock() < deadline and len(self._stop) < 2:
            for event in self._crew.look(0.2):
                self._note(event)
        for event in self._crew.last_look() if len(self._stop) < 2 else ():
            self._note(event)

    def _end(self, reason: str) -> None:
        self._tally.broken_off = f"{reason}; {counted(len(self._left), 'shard')} left"
        self._left.clear()

    def _count_time(self, desk: _Desk) -> None:
        self._tally.worker_seconds += self._clock() - desk.since
        self._tally.stages += desk.stages

    def _show(self) -> None:
        now, tally = self._clock(), self._tally
        busy = tally.stages.device + sum(d.stages.device for d in self._desks.values())
        seconds = tally.worker_seconds + sum(now - d.since for d in self._desks.values())
        words = [f"{tally.total('bytes') / 1e6:.1f} MB", f"{tally.total('quarantined')} quarantined"]
        if tally.given_up:
            words.append(f"{counted(len(tally.given_up), 'shard')} given up")
        words += [
            counted(len(self._desks), "worker"),
            f"device busy {100 * busy / seconds:.0f} %" if seconds else "starting",
        ]
        self._progress.update(self._rows, ", ".join(words))
        self._rows = 0
