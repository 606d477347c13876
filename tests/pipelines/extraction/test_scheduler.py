"""Who extracts what next, and what becomes of faults: the scheduler with a crew that is played, in played time."""

import itertools
import random
import re
from collections import Counter

import pytest

from olavlm.cache import ShardTask
from olavlm.pipelines.cli import Stopped
from olavlm.pipelines.extraction import scheduler
from olavlm.pipelines.extraction.crew import Gone, Looked, Ready, Returned
from olavlm.pipelines.extraction.extractor import ShardResult, Stages, WorkerStatus
from olavlm.pipelines.extraction.scheduler import Scheduler
from olavlm.pipelines.extraction.summary import Tally


class Played:
    """A worker. One block a second, the oldest first; `act` says what happens to a shard."""

    def __init__(self, number: int) -> None:
        self.name, self.ready, self.blocks, self.progress = f"worker {number}", False, [], 0


class PlayedCrew:
    """`act(task, times)` -> an outcome, or "die" or "hang"; `times` the task was begun, this one included."""

    def __init__(self, act=lambda task, times: "committed", *, room=2, elastic=False, starts=lambda number: ""):
        self.act, self.elastic, self.starts, self.obstacle = act, elastic, starts, "no room"
        self.most, self.now = room, 0.0
        self.workers: list[Played] = []
        self.given: list[list[str]] = []
        self.begun: Counter = Counter()
        self.begun_at: dict[ShardTask, list[float]] = {}
        self.hired = self.stopped = self.dismissed = 0
        self.blames: list[str] = []
        self.at_work = ""
        self.tells = "returned"  # or "both": every result when the worker is looked at, and again with its block

    def room(self):
        return self.most

    def hire(self, wanted):
        while len(self.workers) < min(wanted, self.most):
            self.hired += 1
            self.workers.append(Played(self.hired))
        return len(self.workers)

    def give(self, worker, block):
        assert worker in self.workers
        worker.blocks.append(block)
        assert len(worker.blocks) <= 2
        self.given.append([f"{t.key}{t.shard}" for t in block])

    def look(self, seconds):
        self.now += seconds
        return [event for worker in list(self.workers) for event in self._live(worker)]

    def _live(self, worker):
        if not worker.ready:
            reason = self.starts(worker.name)
            if reason == "never":
                return []
            if reason:
                self.workers.remove(worker)
                self.obstacle = reason
                return [Gone(worker, reason)]
            worker.ready = True
            return [Ready(worker)]
        if not worker.blocks:
            return []
        if self.stopped:
            return [Returned(worker, [ShardResult(t, "dropped") for t in b], b) for b in worker.blocks[:1]] + (
                worker.blocks.clear() or []
            )
        return self._work(worker)

    def _work(self, worker):
        block, results, self.at_work = worker.blocks[0], [], worker.name
        for task in block:
            self.begun[task] += 1
            self.begun_at.setdefault(task, []).append(self.now)
            outcome = self.act(task, self.begun[task])
            if outcome == "hang":
                self.begun[task] -= 1
                return [Looked(worker, WorkerStatus(worker.progress, [], Stages(0, 0, 0)))]
            if outcome == "die":
                self.workers.remove(worker)
                return [Gone(worker, "killed")]
            results.append(ShardResult(task, outcome, "of this test", 0, 10))
        worker.blocks.remove(block)
        worker.progress += 1
        looked = [Looked(worker, WorkerStatus(worker.progress, results, Stages(0.5, 0.3, 0.1)))]
        return (looked if self.tells == "both" else []) + [Returned(worker, results, block)]

    def last_look(self):
        return [Looked(w, WorkerStatus(w.progress, [], Stages(2.0, 1.0, 0.0))) for w in self.workers if w.ready]

    def dismiss(self, worker, blame=""):
        self.dismissed += 1
        if blame:
            self.blames.append(blame)
            self.most -= len(self.blames) % 3 == 0  # as a node is left alone
        self.workers.remove(worker)

    def stop(self):
        self.stopped += 1


def tasks(number: int, key: str = "depth", rows: int = 4) -> list[ShardTask]:
    return [ShardTask(key, i, i * rows, (i + 1) * rows, "plan") for i in range(number)]


def run(crew: PlayedCrew, work: list[ShardTask], **options) -> Tally:
    tally = Tally()
    Scheduler(crew, work, tally, clock=lambda: crew.now, **options).run()
    return tally


def shard_of(line: str) -> str:
    return re.match(r"(\w+ shard \d+), ", line)[1]


def test_every_shard_once_and_the_tally_says_so():
    crew = PlayedCrew(room=3)
    crew.tells = "both"
    tally = run(crew, tasks(30) + tasks(30, "seg"))
    assert set(crew.begun.values()) == {1}
    assert {key: (d.shards, d.rows, d.bytes) for key, d in tally.teachers.items()} == {
        "depth": (30, 120, 300),
        "seg": (30, 120, 300),
    }
    assert (tally.workers, tally.deaths, tally.retries, tally.given_up, tally.broken_off) == (3, 0, 0, [], "")
    assert tally.stages == Stages(6.0, 3.0, 0.0)
    assert tally.worker_seconds == pytest.approx(3 * (crew.now - 1))
    assert tally.shares()["device"] == pytest.approx(6 / tally.worker_seconds)


def test_fewer_workers_are_hired_than_there_is_room_for():
    assert run(PlayedCrew(room=8), tasks(20), workers=2).workers == 2
    crew = PlayedCrew(room=8)
    assert run(crew, tasks(3)).workers == crew.hired == 3


def test_everyone_has_a_block_before_anyone_has_two():
    slow = {"worker 2"}
    crew = PlayedCrew(room=2, starts=lambda name: "never" if name in slow and crew.now < 3 else "")
    crew.look_at = []
    original = crew.give
    crew.give = lambda worker, block: (crew.look_at.append((crew.now, worker.name)), original(worker, block))
    run(crew, tasks(3))
    assert crew.look_at[:2] == [(1.0, "worker 1"), (1.0, "worker 1")], "one block is left for who is starting"
    assert run(PlayedCrew(room=2), tasks(2)).workers == 2


def test_a_shard_that_fails_is_tried_again_and_given_up_the_third_time(monkeypatch, capsys):
    def act(task, times):
        return "failed" if task.shard == 5 or (task.shard == 7 and times < 3) else "committed"

    crew = PlayedCrew(act)
    tally = run(crew, tasks(20))
    assert tally.given_up == ["depth shard 5, 3 times: of this test"]
    assert (tally.total("shards"), tally.retries) == (19, 4)
    assert "depth shard 5 failed, and is tried again: of this test" in capsys.readouterr().err
    assert crew.begun == {t: 3 if t.shard in (5, 7) else 1 for t in tasks(20)}

    monkeypatch.setattr(scheduler, "FAILURES", 1)  # the control: without retries
    assert [shard_of(line) for line in run(PlayedCrew(act), tasks(20)).given_up] == ["depth shard 5", "depth shard 7"]


def test_a_shard_whose_worker_dies_goes_alone_and_is_given_up_the_fifth_time():
    """Poison in one shard of a block of several."""
    work = tasks(6, "gen", rows=16) + tasks(24, "depth")
    crew = PlayedCrew(lambda task, times: "die" if (task.key, task.shard) == ("depth", 9) else "committed", room=1)
    tally = run(crew, work)
    assert [len(block) for block in crew.given[:6]] == [5] * 6
    assert {len(block) for block in crew.given[6:]} == {1}
    assert tally.given_up == ["depth shard 9, 5 times: killed"]
    assert tally.deaths == crew.hired == 5
    assert tally.total("shards") == 29
    assert max(n for t, n in crew.begun.items() if t.shard != 9) <= 2, "only it is tried over and over"


def test_a_worker_that_hangs_is_killed_and_its_shards_go_to_others():
    crew = PlayedCrew(lambda task, times: "hang" if crew.workers[0].name == "worker 1" and task.shard == 3 else
                      "committed", room=1)  # fmt: skip
    tally = run(crew, tasks(12), stall=100)
    assert (crew.dismissed, tally.deaths, tally.total("shards"), tally.given_up) == (1, 1, 12, [])
    assert 100 < crew.now < 130


def test_a_worker_that_fails_everything_is_replaced_and_its_node_left_alone(monkeypatch, capsys):
    """Every worker but the first is on a node that lost its disk, and fails at once what others could do."""

    def act(task, times):
        return "committed" if crew.at_work == "worker 1" else "failed"

    crew = PlayedCrew(act, room=2)
    tally = run(crew, tasks(40, "gen", rows=16) + tasks(160))
    assert (tally.total("shards"), tally.given_up, tally.broken_off) == (200, [], "")
    assert (crew.hired, crew.most, tally.deaths) == (4, 1, 0)
    assert crew.blames == ["it failed 5 shards in a row, the last: of this test"] * 3
    assert "worker 2 is replaced: it failed 5 shards in a row" in capsys.readouterr().err

    monkeypatch.setattr(scheduler, "FAILURES_IN_A_ROW", 10**9)  # the control: it is given work for ever
    crew = PlayedCrew(act, room=2)
    assert len(run(crew, tasks(40, "gen", rows=16) + tasks(160)).given_up) > 10


def test_where_everything_fails_the_run_ends_and_says_why():
    crew = PlayedCrew(lambda task, times: "failed", room=1)
    tally = run(crew, tasks(1000))
    assert tally.broken_off.startswith("no worker could be started")
    assert sum(crew.begun.values()) < 50


def test_a_driver_that_was_suspended_does_not_take_its_workers_for_stuck():
    crew = PlayedCrew(lambda task, times: "hang" if 50 < crew.now < 10_053 else "committed", room=1)
    look = crew.look

    def look_or_sleep(seconds):
        if crew.now == 52:
            crew.now += 10_000
        return look(seconds)

    crew.look = look_or_sleep
    tally = run(crew, tasks(100), stall=100)
    assert (crew.dismissed, tally.total("shards")) == (0, 100)
    assert crew.now > 10_000


def test_a_shard_that_another_run_holds_is_tried_later_with_growing_pauses():
    crew = PlayedCrew(lambda task, times: "held" if task.shard == 2 and crew.now < 200 else "committed")
    tally = run(crew, tasks(10))
    assert (tally.total("shards"), tally.given_up, tally.retries) == (10, [], 0)
    at = crew.begun_at[tasks(10)[2]]
    pauses = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert pauses == sorted(pauses)
    assert 2 <= pauses[0] <= 5 < 30 < pauses[-1] <= 65


def test_it_is_not_waited_for_for_ever():
    crew = PlayedCrew(lambda task, times: "held" if task.shard == 2 else "committed")
    tally = run(crew, tasks(10))
    assert [shard_of(line) for line in tally.given_up] == ["depth shard 2"]
    assert "held by another run" in tally.given_up[0]
    assert scheduler.HELD_LIMIT < crew.now < scheduler.HELD_LIMIT + 100
    assert run(PlayedCrew(lambda task, times: "lost" if times == 1 else "done"), tasks(3)).done_by_others == 3


class TestNoWorkers:
    def test_none_can_start(self):
        crew = PlayedCrew(starts=lambda name: "never")
        tally = run(crew, tasks(3))
        assert tally.broken_off == "no worker could be started: no room; 3 shards left"
        assert scheduler.START_SECONDS <= crew.now < scheduler.START_SECONDS + 5

    @pytest.mark.parametrize(("elastic", "seconds"), [(False, 0.0), (True, scheduler.JOIN_SECONDS)])
    def test_no_room(self, elastic, seconds):
        crew = PlayedCrew(room=0, elastic=elastic)
        assert "no worker could be started" in run(crew, tasks(3)).broken_off
        assert seconds <= crew.now <= seconds + 2

    def test_a_node_that_joins_in_time_is_used(self):
        crew = PlayedCrew(room=0, elastic=True)
        look = crew.look
        crew.look = lambda seconds: (setattr(crew, "most", 1 if crew.now > 30 else 0), look(seconds))[1]
        assert run(crew, tasks(3)).total("shards") == 3

    def test_those_that_cannot_load_are_named(self, capsys):
        crew = PlayedCrew(starts=lambda name: "TeacherError: no model" if name == "worker 1" else "")
        assert run(crew, tasks(9)).total("shards") == 9
        assert "worker 1 could not start: TeacherError: no model" in capsys.readouterr().err

    def test_all_die_of_everything(self):
        crew = PlayedCrew(lambda task, times: "die", room=2)
        tally = run(crew, tasks(1000))
        assert f"{scheduler.DEATHS_IN_A_ROW} workers died in a row, the last: killed" in tally.broken_off
        assert crew.hired <= scheduler.DEATHS_IN_A_ROW + 2


def test_a_signal_drops_what_is_in_flight():
    stop = []
    crew = PlayedCrew(lambda task, times: (stop.append("SIGTERM") if task.shard == 4 else None) or "committed", room=1)
    tally = Tally()
    with pytest.raises(Stopped, match="SIGTERM"):
        Scheduler(crew, tasks(50), tally, stop=stop, clock=lambda: crew.now).run()
    assert crew.stopped == 1
    assert 5 <= tally.total("shards") < 10
    assert tally.worker_seconds > 0


def test_a_second_signal_waits_for_nobody():
    stop = ["SIGINT"]
    crew = PlayedCrew(lambda task, times: "hang", room=1)
    crew.stop = lambda: None
    for signals, seconds in ((["SIGINT"], scheduler.STOP_SECONDS), (["SIGINT", "SIGINT"], 0)):
        crew.now, stop = 0.0, []
        look = PlayedCrew.look.__get__(crew)
        crew.look = lambda s, stop=stop, signals=signals, look=look: (
            look(s), stop.extend(signals) if crew.now == 3 else None)[0]  # fmt: skip
        with pytest.raises(Stopped):
            Scheduler(crew, tasks(5), Tally(), stop=stop, clock=lambda: crew.now).run()
        assert crew.now == pytest.approx(3 + seconds, abs=0.5)


def test_faults_at_random_end_with_every_shard_done_or_given_up():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for trial in range(100):
        draw = random.Random(f"{seed} {trial}")
        weights = [draw.random() * w for w in (20, 1, 1, 1, 1, 1)]
        crew = PlayedCrew(
            lambda task, times, draw=draw, weights=weights: draw.choices(
                ["committed", "failed", "die", "hang", "held", "done"], weights)[0],
            room=draw.randint(1, 5), elastic=True,
        )  # fmt: skip
        crew.tells = draw.choice(["both", "returned"])
        work = tasks(draw.randint(1, 9), "gen", 16) + tasks(draw.randint(1, 30))
        tally = run(crew, work, stall=draw.choice([5, 50]))
        given_up = Counter(map(shard_of, tally.given_up))
        assert set(given_up.values()) <= {1}
        if not tally.broken_off:
            assert tally.total("shards") + tally.done_by_others + len(given_up) == len(work), trial
