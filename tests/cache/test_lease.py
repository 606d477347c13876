"""Leases: one writer a shard, a dead one's is taken over, and of many that try one succeeds."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from olavlm.cache import LeaseHeld, LeaseLost, commit
from olavlm.cache.commit import LEASE_SECONDS, acquire_lease, lease_is_live


@pytest.fixture
def file(tmp_path):
    return tmp_path / "leases" / "000003"


def rewrite(file, **fields) -> None:
    """As another holder would have written it, with the same age."""
    stat = file.stat()
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def age(file, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_a_lease_is_held_by_one(file):
    lease = acquire_lease(file)
    assert lease_is_live(file)
    with pytest.raises(LeaseHeld, match=f"held by process {os.getpid()} on {socket.gethostname()}"):
        acquire_lease(file)
    lease.check()
    lease.release()
    assert not file.exists()
    assert not lease_is_live(file)
    acquire_lease(file).release()
    assert list(file.parent.iterdir()) == []  # nothing is left of it all


def test_a_released_lease_is_lost_and_releasing_again_harms_nobody(file):
    lease = acquire_lease(file)
    lease.release()
    with pytest.raises(LeaseLost):
        lease.check()
    other = acquire_lease(file)
    lease.release()
    other.check()


def test_two_live_processes(file, start):
    def hold(child):
        acquire_lease(file)
        child.tell("held")
        child.hear()
        os._exit(0)  # without a release

    child = start(hold)
    assert child.hear() == "held"
    with pytest.raises(LeaseHeld):
        acquire_lease(file)
    assert child.wait() == 0
    assert file.exists()  # the control: it did not clean up
    acquire_lease(file).check()


def test_a_process_that_died_and_was_not_reaped_is_dead(file, start):
    """In a container without an init nobody reaps the orphans of a killed driver."""
    child = start(lambda child: (acquire_lease(file), os._exit(9)))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.isdir(f"/proc/{child.pid}")  # noqa: PTH112 - the control: a zombie
    acquire_lease(file).check()
    assert child.wait() == 9


def test_a_number_that_another_process_has_got_is_not_the_holder(file):
    acquire_lease(file)
    rewrite(file, started="1")  # our pid, another start
    acquire_lease(file).check()


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"boot": "another"}, {"started": None}])
def test_a_holder_that_cannot_be_looked_up_is_dead_after_its_time(file, elsewhere):
    """Another machine, another boot or container, a system without /proc."""
    lease = acquire_lease(file)
    rewrite(file, **elsewhere)
    age(file, LEASE_SECONDS - 60)
    with pytest.raises(LeaseHeld):
        acquire_lease(file)
    age(file, LEASE_SECONDS + 60)
    lease.renew()  # a sign of life
    with pytest.raises(LeaseHeld):
        acquire_lease(file)
    assert lease_is_live(file)
    age(file, LEASE_SECONDS + 60)
    assert not lease_is_live(file)
    taken = acquire_lease(file)
    taken.check()
    for touch in (lease.check, lease.renew):
        with pytest.raises(LeaseLost, match="taken over by another writer"):
            touch()
    lease.release()
    taken.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b"{}", b'{"host": 1}'])
def test_a_damaged_lease_is_nobody_s(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    age(file, LEASE_SECONDS + 1)
    assert not lease_is_live(file)
    acquire_lease(file).check()


def test_of_many_that_find_a_dead_holder_one_keeps_the_lease(file, start):
    """Two may take it over in one instant; `check`, which comes ahead of every placing, leaves one of them."""
    for _ in range(5):
        start(lambda child: (acquire_lease(file), os._exit(9))).wait()

        def contend(child):
            child.hear()
            try:
                lease = acquire_lease(file)
            except LeaseHeld:
                lease = None
            child.tell("tried")
            child.hear()  # all have tried
            child.tell("keeps" if lease is not None and lease.held() else "not")
            child.hear()

        children = [start(contend) for _ in range(6)]
        for _ in range(2):
            for child in children:
                child.tell("go")
            answers = sorted(child.hear() for child in children)
        assert answers == ["keeps"] + ["not"] * 5
        assert {child.wait() for child in children} == {0}
        assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_live_lease_taken_by_mistake_is_given_back(file, monkeypatch):
    """Two judge a holder dead; the slower one renames the lease that the faster one has got meanwhile.

    While it is away its holder looks for it, and must not give up.
    """
    acquire_lease(file)
    rewrite(file, started="1")
    is_dead, link, read, missed = commit._is_dead, os.link, commit._read_lease, threading.Event()
    won = []

    def judge(*args):
        dead = is_dead(*args)
        if not won:
            won.append(None)
            won[0] = acquire_lease(file)  # the faster one
        return dead

    def look(path):
        holder = read(path)
        if path == file and holder is None:
            missed.set()
        return holder

    def give_back(source, target):
        if ".dead." in str(source):
            assert not file.exists()  # the fault
            watcher.start()
            assert missed.wait(10)
        link(source, target)

    checks = []
    watcher = threading.Thread(target=lambda: checks.append(won[0].held()))
    monkeypatch.setattr(commit, "_is_dead", judge)
    monkeypatch.setattr(commit, "_read_lease", look)
    monkeypatch.setattr(commit, "RETURN_TRIES", 1000)  # a slow machine may take its time
    monkeypatch.setattr(os, "link", give_back)
    with pytest.raises(LeaseHeld):
        acquire_lease(file)  # the slower one
    watcher.join()
    assert missed.is_set()
    assert checks == [True]
    won[0].check()
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_lease_released_while_it_is_judged_is_not_mistaken_for_a_damaged_one(file, monkeypatch):
    """Between the failed create and the look it is released and taken by another: that one's stays untouched."""
    first, read = acquire_lease(file), commit._read_lease
    others = []
    monkeypatch.setattr(Path, "rename", lambda *names: pytest.fail("it is taken away from its holder"))

    def gone_then_taken(path):
        if not others:
            monkeypatch.setattr(commit, "_read_lease", read)
            first.release()
            answer = read(path)
            others.append(acquire_lease(file))
            return answer
        return read(path)

    monkeypatch.setattr(commit, "_read_lease", gone_then_taken)
    with pytest.raises(LeaseHeld):
        acquire_lease(file)
    others[0].check()


def test_committing_never_waits_for_a_lease_that_is_not_coming_back(small, monkeypatch):
    """The wait is for a lease taken by mistake; `commit` and the end of the `with` release one each."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    small().fill()
