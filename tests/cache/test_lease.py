"""Leases: one writer a shard, a dead one's is taken over, and of many that try one succeeds."""

import json
import os
import socket
import threading
import time

import pytest

from olavlm.cache import LeaseHeld, LeaseLost, files, lease
from olavlm.cache.lease import LEASE_SECONDS, RENEW_SECONDS, acquire_lease, generations, is_live, leased

SHARD = 3


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def file(folder):
    """The lease of the first holder."""
    return folder / "000003.0"


def names(folder) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def rewrite(file, **fields) -> None:
    """As another holder would have written it, with the same age."""
    stat = file.stat()
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def age(file, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def dead_holder(folder, start, shard: int = SHARD) -> None:
    """A process took the lease and was killed."""
    assert start(lambda child: (acquire_lease(folder, shard), os._exit(9))).wait() == 9
    assert len(generations(folder, shard)) == 1  # the control: it did not clean up


def test_a_lease_is_held_by_one(folder, file):
    held = acquire_lease(folder, SHARD)
    assert held.file == file
    assert held.held()
    assert is_live(file)
    with pytest.raises(LeaseHeld, match=f"held by process {os.getpid()} on {socket.gethostname()}"):
        acquire_lease(folder, SHARD)
    held.check()
    acquire_lease(folder, 4).release()  # another shard is free
    held.release()
    assert not file.exists()
    assert not is_live(file)
    acquire_lease(folder, SHARD).release()
    assert names(folder) == []  # nothing is left of it all


def test_a_released_lease_is_lost_and_releasing_again_harms_nobody(folder):
    held = acquire_lease(folder, SHARD)
    held.release()
    assert not held.held()
    with pytest.raises(LeaseLost):
        held.check()
    other = acquire_lease(folder, SHARD)
    assert other.file == held.file
    held.release()
    other.check()


def test_the_lease_that_counts_of_every_shard(folder):
    folder.mkdir()
    for name in ("000003.0", "000003.2", "000003.10", "000004.1", "1234567.0"):
        (folder / name).write_text("")
    for name in (".000003.11.private", "000003.12.json", "000003", "3.5", ".clock.ab", "000003.x"):
        (folder / name).write_text("")
    assert generations(folder, 3) == [0, 2, 10]
    assert generations(folder, 5) == []
    assert leased(folder) == {3: folder / "000003.10", 4: folder / "000004.1", 1234567: folder / "1234567.0"}
    assert leased(folder / "absent") == {}


def test_two_live_processes(folder, file, start):
    def hold(child):
        acquire_lease(folder, SHARD)
        child.tell("held")
        child.hear()
        os._exit(0)  # without a release

    child = start(hold)
    assert child.hear() == "held"
    assert is_live(file)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    assert names(folder) == ["000003.0"]
    assert child.wait() == 0
    assert file.exists()  # the control: it did not clean up
    assert not is_live(file)
    taken = acquire_lease(folder, SHARD)
    taken.check()
    assert names(folder) == ["000003.1"]
    taken.release()
    assert names(folder) == []


def test_a_process_that_died_and_was_not_reaped_is_dead(folder, start):
    """In a container without an init nobody reaps the orphans of a killed driver."""
    child = start(lambda child: (acquire_lease(folder, SHARD), os._exit(9)))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.isdir(f"/proc/{child.pid}")  # noqa: PTH112 - the control: a zombie
    acquire_lease(folder, SHARD).check()
    assert child.wait() == 9


def test_a_number_that_another_process_has_got_is_not_the_holder(folder, file):
    acquire_lease(folder, SHARD)
    rewrite(file, started="1")  # our pid, another start
    acquire_lease(folder, SHARD).check()


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"boot": "another"}, {"started": None}])
def test_a_holder_that_cannot_be_looked_up_is_dead_after_its_time(folder, file, elsewhere, monkeypatch):
    """Another machine, another boot or container, a system without /proc."""
    held = acquire_lease(folder, SHARD)
    rewrite(file, **elsewhere)
    age(file, LEASE_SECONDS - 60)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    age(file, LEASE_SECONDS + 60)
    held.renew()  # too soon after the last one, and the control of the next lines
    assert not is_live(file)
    held._renewed -= RENEW_SECONDS
    held.renew()  # a sign of life
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    assert is_live(file)
    age(file, LEASE_SECONDS + 60)
    assert not is_live(file)
    taken = acquire_lease(folder, SHARD)
    taken.check()
    for touch in (held.check, held.renew):
        held._renewed -= RENEW_SECONDS
        with pytest.raises(LeaseLost, match="taken over by another writer"):
            touch()
    held.release()
    taken.check()
    assert names(folder) == ["000003.1"]


def test_signs_of_life_are_given_every_renew_seconds_and_not_more_often(folder, file, monkeypatch):
    """Between two rows of a shard `renew` must cost nothing."""
    held, refreshed, now = acquire_lease(folder, SHARD), [], [time.monotonic()]
    monkeypatch.setattr(files, "refresh", refreshed.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(1000):
        now[0] += RENEW_SECONDS / 100
        held.renew()
    assert 9 <= len(refreshed) <= 10
    assert set(refreshed) == {file}
    assert RENEW_SECONDS < LEASE_SECONDS / 10  # several may fail before anybody takes it for dead


def test_time_is_the_store_s_not_this_host_s(folder, file, monkeypatch):
    """A host whose clock is an hour ahead of the file server's must not take living writers for dead."""
    acquire_lease(folder, SHARD)
    rewrite(file, host="another")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    assert names(folder) == ["000003.0"]  # what the store's clock was read from is gone
    monkeypatch.setattr(files, "clock", lambda folder: real() + 3600)
    acquire_lease(folder, SHARD).check()  # the control: by a clock an hour ahead it is dead


def test_a_holder_that_is_hidden_from_this_user_is_not_dead(folder, file, monkeypatch):
    """Another user's, where `/proc` is mounted with `hidepid`: only its age can tell."""
    acquire_lease(folder, SHARD)

    def denied(*_):
        raise PermissionError

    monkeypatch.setattr(lease, "_process_start", lambda pid: None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", denied)
        assert is_live(file)
        with pytest.raises(LeaseHeld):
            acquire_lease(folder, SHARD)
        age(file, LEASE_SECONDS + 1)
        assert not is_live(file)
    age(file, 0)
    monkeypatch.setattr(lease, "_process_start", lambda pid: "1" if pid == os.getpid() else None)
    rewrite(file, pid=2**22 + 1)  # the control: more than a pid can be
    assert not is_live(file)
    acquire_lease(folder, SHARD).check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b"{}", b'{"host": 1}'])
def test_a_damaged_lease_is_nobody_s(folder, file, content):
    folder.mkdir()
    file.write_bytes(content)
    age(file, LEASE_SECONDS + 1)
    assert not is_live(file)
    acquire_lease(folder, SHARD).check()
    assert names(folder) == ["000003.1"]


def test_of_many_that_find_a_dead_holder_one_gets_a_lease(folder, start):
    """The others get none at all, whatever the order of their steps."""
    for _ in range(8):
        dead_holder(folder, start)

        def contend(child):
            child.hear()
            try:
                acquire_lease(folder, SHARD).check()
            except LeaseHeld:
                child.tell("not")
            else:
                child.tell("has")
            child.hear()  # all have tried

        children = [start(contend) for _ in range(6)]
        for child in children:
            child.tell("go")
        assert sorted(child.hear() for child in children) == ["has"] + ["not"] * 5
        assert len(names(folder)) == 1  # and the dead one's is gone
        assert {child.wait() for child in children} == {0}
        acquire_lease(folder, SHARD).release()
        assert names(folder) == []


def test_of_many_that_take_release_and_take_again_two_never_hold_at_once(folder, start):
    """Some are killed while they hold. In the protected part a holder makes a file that must not be there."""
    protected = folder.parent / "protected"
    dead_holder(folder, start)

    def work(child, number):
        child.hear()
        done = 0
        while done < 15:
            try:
                held = acquire_lease(folder, SHARD)
            except LeaseHeld:
                continue
            left_by = int(protected.read_text()) if protected.exists() else None
            if left_by is not None:  # only a killed one leaves it
                assert lease._process_start(left_by) is None, "two hold the lease at once"
                protected.unlink()
            with protected.open("x") as f:
                f.write(str(os.getpid()))
            held.check()
            if number % 2 and done == 7:
                os._exit(9)
            protected.unlink()
            held.release()
            done += 1

    children = [start(lambda child, n=n: work(child, n)) for n in range(5)]
    for child in children:
        child.tell("go")
    assert sorted(child.wait() for child in children) == [0, 0, 0, 9, 9]
    acquire_lease(folder, SHARD).release()
    assert names(folder) == []


def test_a_taker_that_died_before_it_removed_the_older_lease(folder, start, monkeypatch):
    dead_holder(folder, start)

    def take(child):
        monkeypatch.setattr(lease, "_remove_older", lambda *args: os._exit(9))
        acquire_lease(folder, SHARD)

    assert start(take).wait() == 9
    assert names(folder) == ["000003.0", "000003.1"]  # the control
    assert leased(folder) == {SHARD: folder / "000003.1"}
    taken = acquire_lease(folder, SHARD)
    taken.check()
    assert names(folder) == ["000003.2"]
    taken.release()
    assert names(folder) == []


def test_older_leases_that_came_late_are_released_along(folder):
    held = acquire_lease(folder, SHARD)
    rewrite(held.file, started="1")
    taken = acquire_lease(folder, SHARD)
    (folder / "000003.0").write_text("as a listing that lagged behind would leave it")
    taken.check()
    taken.release()
    assert names(folder) == []


def test_a_holder_bears_with_a_slow_taker_that_withdraws(folder, monkeypatch):
    """The slow one judged a holder before this one, and took the next generation; it withdraws when it looks again."""
    held = acquire_lease(folder, SHARD)
    slow = folder / "000003.1"
    slow.write_text("{}")
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(LeaseLost):  # the control
        held.check()
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 60.0)
    threading.Timer(0.2, slow.unlink).start()
    held.check()
    slow.write_text("{}")
    threading.Timer(0.2, held.file.unlink).start()  # one that does not withdraw removes the older ones
    with pytest.raises(LeaseLost):
        held.check()


def test_a_woken_holder_whose_number_was_used_again(folder, start):
    """It was taken for dead, the taker is done, and the next holder counts from zero again."""
    stuck = acquire_lease(folder, SHARD)
    rewrite(stuck.file, host="another")
    age(stuck.file, LEASE_SECONDS + 60)
    acquire_lease(folder, SHARD).release()
    other = acquire_lease(folder, SHARD)
    assert other.file == stuck.file
    assert not stuck.held()
    stuck._renewed -= RENEW_SECONDS
    for touch in (stuck.check, stuck.renew):
        with pytest.raises(LeaseLost):
            touch()
    stuck.release()
    other.check()


def test_a_taker_that_is_slow_gives_way_to_who_was_faster(folder, monkeypatch):
    """Two judge a holder dead; the faster one has its lease when the slower one wants to create the same."""
    acquire_lease(folder, SHARD)
    rewrite(folder / "000003.0", started="1")
    is_dead, won = lease._is_dead, []

    def judge(*args):
        dead = is_dead(*args)
        if not won:
            won.append(None)
            won[0] = acquire_lease(folder, SHARD)  # the faster one
        return dead

    monkeypatch.setattr(lease, "_is_dead", judge)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)  # the slower one
    won[0].check()
    assert names(folder) == ["000003.1"]


def test_nor_does_a_slow_taker_keep_what_it_created_below_the_holder(folder, monkeypatch):
    """It listed nothing; until it creates .0, others have come to .1, and .0 is gone."""
    publish, others = files.publish, []

    def late(path, content):
        monkeypatch.setattr(files, "publish", publish)
        first = acquire_lease(folder, SHARD)
        rewrite(first.file, started="1")
        others.append(acquire_lease(folder, SHARD))
        publish(path, content)

    monkeypatch.setattr(files, "publish", late)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    others[0].check()
    assert names(folder) == ["000003.1"]


def test_a_very_slow_taker_leaves_the_next_holder_alone(folder, monkeypatch):
    """It judged .0 dead; until it creates .1, another has taken over and released, and a third holds a new .0."""
    acquire_lease(folder, SHARD)
    rewrite(folder / "000003.0", started="1")
    publish, others = files.publish, []

    def late(path, content):
        monkeypatch.setattr(files, "publish", publish)
        acquire_lease(folder, SHARD).release()
        others.append(acquire_lease(folder, SHARD))
        publish(path, content)

    monkeypatch.setattr(files, "publish", late)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    others[0].check()
    assert names(folder) == ["000003.0"]


def test_who_releases_while_a_slow_taker_is_there_leaves_nothing(folder, monkeypatch):
    """The third of the test above releases in the instant in which .1 is there; its process lives on."""
    acquire_lease(folder, SHARD)
    rewrite(folder / "000003.0", started="1")
    publish = files.publish

    def late(path, content):
        monkeypatch.setattr(files, "publish", publish)
        acquire_lease(folder, SHARD).release()
        third = acquire_lease(folder, SHARD)
        publish(path, content)
        assert not third.held()  # the fault
        third.release()

    monkeypatch.setattr(files, "publish", late)
    taken = acquire_lease(folder, SHARD)
    taken.check()
    taken.release()
    assert names(folder) == []


def test_a_lease_released_while_it_is_judged_is_not_mistaken_for_a_damaged_one(folder, monkeypatch):
    """Between the listing and the look it is released and taken by another: that one's stays untouched."""
    first, read, others = acquire_lease(folder, SHARD), lease._read, []

    def gone_then_taken(path):
        monkeypatch.setattr(lease, "_read", read)
        first.release()
        answer = read(path)
        others.append(acquire_lease(folder, SHARD))
        return answer

    monkeypatch.setattr(lease, "_read", gone_then_taken)
    with pytest.raises(LeaseHeld):
        acquire_lease(folder, SHARD)
    others[0].check()
    assert names(folder) == ["000003.0"]


def test_a_lease_released_between_the_look_and_its_age_is_free(folder, monkeypatch):
    """A holder of another host, of which only the age tells."""
    first = acquire_lease(folder, SHARD)
    rewrite(first.file, host="another")
    changed_at = files.changed_at

    def released(path):
        if path == first.file:
            monkeypatch.setattr(files, "changed_at", changed_at)
            first.release()
        return changed_at(path)

    monkeypatch.setattr(files, "changed_at", released)
    acquire_lease(folder, SHARD).check()
    assert names(folder) == ["000003.0"]


def test_one_that_changes_hands_all_the_time_is_held(folder, monkeypatch):
    monkeypatch.setattr(files, "publish", lambda path, content: (_ for _ in ()).throw(FileExistsError(path)))
    with pytest.raises(LeaseHeld, match="changes hands too fast; try again"):
        acquire_lease(folder, SHARD)


def test_a_reader_that_asks_whether_a_lease_is_live_writes_nothing(public_path, unprivileged):
    acquire_lease(public_path, SHARD)
    rewrite(public_path / "000003.0", host="another")

    def work():
        assert is_live(public_path / "000003.0")
        with pytest.raises(PermissionError):  # the control
            files.clock(public_path)

    unprivileged(work)
    assert names(public_path) == ["000003.0"]


def test_committing_never_waits(small, monkeypatch):
    """Neither for a lease nor for its release, which `commit` and the end of the `with` both do."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    small().fill()
