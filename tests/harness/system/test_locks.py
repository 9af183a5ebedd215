"""Locks: one holder at a time, whatever starts together; the dead are found and followed."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.system import locks
from harness.system.locks import LostLockError, acquire, dead_locks, held, holders, owner_of
from tests.harness.other_host import elsewhere
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
    assert not list(tmp_path.glob("*.lock"))


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
        assert not list(tmp_path.glob("*.lock"))
    assert path.read_text() == "150"


def test_another_host_counts_as_gone_after_a_lease_without_signs_of_life(tmp_path, monkeypatch):
    elsewhere(tmp_path / "stage.lock")
    lock, owner = acquire(tmp_path / "stage")
    assert lock is None
    assert (owner.host, owner.pid) == ("another-host", 1)
    assert not dead_locks(tmp_path)
    assert [owner.host for _, owner in holders(tmp_path)] == ["another-host"]
    monkeypatch.setattr(locks, "LEASE", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "POLL", 0.02)
    elsewhere(tmp_path / "stage.lock")
    began = time.monotonic()
    with held(tmp_path / "stage", "the stage"):
        assert time.monotonic() - began > 0.5
        assert owner_of(tmp_path / "stage.lock").pid == os.getpid()
    assert not list(tmp_path.glob("*.lock"))


def test_a_host_that_gives_signs_of_life_is_never_robbed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    file = tmp_path / "stage.lock"
    elsewhere(file)
    lease = locks._lease(file)
    for _ in range(20):
        os.utime(file)
        assert acquire(tmp_path / "stage", lease)[0] is None
        time.sleep(0.06)


def test_a_lock_file_cut_short_is_not_taken_at_once(tmp_path):
    (tmp_path / "stage.lock").write_text("filelock/2\npid=1\nho")
    assert acquire(tmp_path / "stage") == (None, None)
    assert not dead_locks(tmp_path)


@pytest.mark.parametrize("content", ["", "filelock/2\npid=1\nho"])
def test_the_lock_of_a_process_that_was_killed_while_it_made_the_file_is_taken(content, tmp_path, monkeypatch):
    """Between making and writing: the next process waited without end."""
    monkeypatch.setattr(locks, "UNWRITTEN", 0.4)
    monkeypatch.setattr(locks, "POLL", 0.02)
    (tmp_path / "stage.lock").write_text(content)
    began = time.monotonic()
    with held(tmp_path / "stage", "the stage"):
        assert time.monotonic() - began > 0.4
        assert owner_of(tmp_path / "stage.lock").pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_is_written_late_is_its_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "UNWRITTEN", 0.1)
    file = tmp_path / "stage.lock"
    file.write_text("")
    assert acquire(tmp_path / "stage") == (None, None)
    time.sleep(0.15)
    elsewhere(file)
    lock, owner = acquire(tmp_path / "stage")
    assert lock is None
    assert owner.host == "another-host"
    assert file.exists()


def hold(path, ready, seconds):
    locks.HEARTBEAT, locks.LEASE = 0.1, 0.5
    lock, _ = acquire(path)
    ready.set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            lock.check()
        except LostLockError:
            os._exit(3)
        time.sleep(0.005)
    os._exit(0)


def test_who_was_suspended_and_given_up_stops_before_it_writes_on(tmp_path, monkeypatch):
    """The holder is stopped (SIGSTOP) for longer than its lease; the file is another's once it goes on."""
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "LEASE", 0.5)
    ready = CONTEXT.Event()
    holder = CONTEXT.Process(target=hold, args=(tmp_path / "stage", ready, 30))
    holder.start()
    assert ready.wait(60)
    os.kill(holder.pid, signal.SIGSTOP)
    elsewhere(tmp_path / "stage.lock")  # taken over meanwhile
    time.sleep(0.3)
    os.kill(holder.pid, signal.SIGCONT)
    assert finish(holder) == 3
    assert owner_of(tmp_path / "stage.lock").host == "another-host"


def test_who_was_given_up_notices_and_leaves_the_others_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    lock, _ = acquire(tmp_path / "stage")
    lock.check()
    (tmp_path / "stage.lock").unlink()
    elsewhere(tmp_path / "stage.lock")
    deadline = time.monotonic() + 10
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LostLockError, match="has taken over stage"):
        lock.check()
    lock.release()
    assert (tmp_path / "stage.lock").exists()


def test_who_waits_is_told_for_whom(tmp_path, capsys, monkeypatch):
    elsewhere(tmp_path / "stage.lock")

    def release(seconds):
        (tmp_path / "stage.lock").unlink(missing_ok=True)

    monkeypatch.setattr(locks.time, "sleep", release)
    with held(tmp_path / "stage", "the stage"):
        pass
    assert "process 1 on another-host is at work on the stage: waiting" in capsys.readouterr().err


def test_a_live_lock_is_not_removed_as_dead(tmp_path):
    lock, _ = acquire(tmp_path / "stage")
    locks.remove_dead(tmp_path / "stage.lock")
    assert not dead_locks(tmp_path)
    assert (tmp_path / "stage.lock").exists()
    lock.release()
    assert not (tmp_path / "stage.lock").exists()


def test_the_lock_of_a_copied_folder_is_given_up_after_a_lease(tmp_path, monkeypatch):
    """The copy names a process that lives, but which gives its signs of life elsewhere."""
    monkeypatch.setattr(locks, "LEASE", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "POLL", 0.02)
    (tmp_path / "runs").mkdir()
    lock, _ = acquire(tmp_path / "runs" / "stage")
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    with held(tmp_path / "copy" / "stage", "the stage"):
        lock.check()
        assert acquire(tmp_path / "runs" / "stage")[0] is None
    lock.release()


def leave(lock):
    lock.release()


def test_a_forked_child_does_not_release_the_lock_of_its_parent(tmp_path):
    lock, _ = acquire(tmp_path / "stage")
    for target in (leave, str):
        child = multiprocessing.get_context("fork").Process(target=target, args=(lock,))
        child.start()
        child.join(60)
        assert owner_of(tmp_path / "stage.lock").pid == os.getpid()
        lock.check()
    lock.release()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_step_of_the_clock_makes_nobody_look_dead(hours, tmp_path, monkeypatch):
    lock, _ = acquire(tmp_path / "stage")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (now() + 3600 * hours)))
    assert acquire(tmp_path / "stage")[0] is None
    assert not dead_locks(tmp_path)
    lock.release()


LOOK = """
import os, sys
from pathlib import Path
from harness.system.locks import acquire, dead_locks
folder, pid = Path(sys.argv[1]), sys.argv[2]
assert pid not in os.listdir("/proc"), "the process can be seen"
lock, owner = acquire(folder / "stage")
print(lock, owner.pid, dead_locks(folder))
"""


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"), reason="mounts /proc as root"
)
def test_where_the_processes_of_others_cannot_be_seen_they_are_not_dead(tmp_path):
    """/proc mounted with hidepid=2, as on many clusters, and a lock of another user's process."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders cannot be entered by others
        folder = Path(name)
        folder.chmod(0o777)
        lock, _ = acquire(folder / "stage")
        as_nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups"
        look = ["sh", "-c", f'mount -t proc -o hidepid=2 proc /proc && exec {as_nobody} "$0" "$@"', sys.executable]
        done = subprocess.run(
            ["unshare", "-m", *look, "-c", LOOK, folder, str(os.getpid())],
            env=os.environ | {"HOME": name, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=False,
        )
        lock.release()
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"/proc cannot be mounted here: {done.stderr.strip()}")
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"another user cannot read this environment: {done.stderr.strip().splitlines()[-1]}")
    assert done.stdout == f"None {os.getpid()} []\n", done.stderr
