"""Locks: one holder at a time, whatever starts together; the dead are found and followed."""

import json
import os
import time

import pytest

from harness.system import locks
from harness.system.locks import LostLockError, Owner, acquire, dead_locks, held, holders
from tests.harness.processes import CONTEXT, finish


def count(path, times):
    """Adds 1 to a number in a file, in a way that loses some unless nobody else does so."""
    locks.POLL = 0.001
    for _ in range(times):
        with held(path.with_suffix(".guard"), "the number"):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def count_together(path, times, processes):
    started = [CONTEXT.Process(target=count, args=(path, times)) for _ in range(processes)]
    for process in started:
        process.start()
    assert [finish(process) for process in started] == [0] * processes


def test_nothing_is_lost_between_processes(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    count_together(path, 20, processes=8)
    assert path.read_text() == "160"
    assert not list(tmp_path.glob("*.lock.*"))


def count_and_die(path):
    locks.POLL = 0.001
    lock, _ = acquire(path.with_suffix(".guard"))
    if lock is not None:
        os._exit(1)


def test_dead_owners_are_followed_by_one_at_a_time(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    for _ in range(5):
        dying = CONTEXT.Process(target=count_and_die, args=(path,))
        dying.start()
        dying.join(60)
        assert dead_locks(tmp_path)
        count_together(path, 5, processes=6)
        assert not list(tmp_path.glob("*.lock.*"))
    assert path.read_text() == "150"


def elsewhere(path, age):
    """A lock of another host that was touched `age` seconds ago."""
    owner = Owner("another-host", "its place", 1, "its process", time.time(), "token")
    path.write_text(json.dumps(owner.__dict__))
    os.utime(path, (time.time() - age, time.time() - age))


def test_another_host_counts_as_dead_without_signs_of_life(tmp_path):
    elsewhere(tmp_path / "stage.lock.1", age=locks.STALE - 20)
    lock, owner = acquire(tmp_path / "stage")
    assert lock is None
    assert owner.host == "another-host"
    assert not dead_locks(tmp_path)
    assert [owner.host for _, owner in holders(tmp_path)] == ["another-host"]
    elsewhere(tmp_path / "stage.lock.1", age=locks.STALE + 20)
    assert dead_locks(tmp_path) == [tmp_path / "stage.lock.1"]
    lock, _ = acquire(tmp_path / "stage")
    assert (tmp_path / "stage.lock.2").exists()
    lock.release()
    assert not list(tmp_path.glob("*.lock.*"))


def test_a_lock_cut_short_is_not_taken_at_once(tmp_path):
    (tmp_path / "stage.lock.1").write_text('{"host": "h')
    assert acquire(tmp_path / "stage") == (None, None)
    os.utime(tmp_path / "stage.lock.1", (0, 0))
    lock, _ = acquire(tmp_path / "stage")
    lock.release()


def test_who_was_given_up_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    lock, _ = acquire(tmp_path / "stage")
    lock.check()
    elsewhere(tmp_path / "stage.lock.2", age=0)
    deadline = time.monotonic() + 10
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LostLockError, match="has taken over stage"):
        lock.check()
    lock.release()
    assert (tmp_path / "stage.lock.2").exists()


def test_who_waits_is_told_for_whom(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.01)
    elsewhere(tmp_path / "stage.lock.1", age=0)

    def release(seconds):
        (tmp_path / "stage.lock.1").unlink(missing_ok=True)

    monkeypatch.setattr(locks.time, "sleep", release)
    with held(tmp_path / "stage", "the stage"):
        pass
    assert "the stage is being computed by process 1 on another-host, since" in capsys.readouterr().err
