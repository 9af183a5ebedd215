"""A signal stops a run at once, or after the step it is in; what was handled before is handled again."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from harness.system.signals import SIGNALS, Interrupted, catching, deferred, requested
from harness.training import loop
from tests.harness.commands import status_of
from tests.harness.interrupted import STEPS, assert_same, seen, words
from tests.harness.processes import finish, only_run, start

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]


def send(name: str) -> None:
    signal.raise_signal(getattr(signal, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_interrupts_and_no_handler_of_errors_takes_it(name):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted, match=name), catching(), suppress(Exception):
        send(name)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert requested() == ""


@pytest.mark.parametrize("name", NAMES)
def test_within_a_step_a_signal_is_noted_once(name, capsys):
    with catching():
        with deferred():
            assert requested() == ""
            send(name)
            assert requested() == name
            if name != "SIGINT":
                send(name)
        assert requested() == name
    assert requested() == ""
    assert capsys.readouterr().err == f"{name}: stopping after this step, with a checkpoint\n"


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(Interrupted, match="SIGINT"), catching(), deferred():
        _ = [send("SIGINT") for _ in range(2)]
    # What was deferred then is not deferred for ever.
    with pytest.raises(Interrupted), catching():
        send("SIGTERM")


def test_another_thread_has_no_handlers_to_set():
    seen = []

    def work():
        with catching():
            seen.append([signal.getsignal(each) for each in SIGNALS])

    before = [signal.getsignal(each) for each in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


WORKER = """
import signal, sys
from harness.system.signals import leave_to_parent
leave_to_parent()
print("ready", flush=True)
for line in sys.stdin:
    print("still here", flush=True)
"""


def test_a_worker_leaves_signals_to_its_parent_until_it_is_meant():
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(worker.pid, number)
            worker.stdin.write("\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "still here\n"
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.wait(10) == -signal.SIGTERM
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGHUP"])
def test_a_signal_leaves_a_checkpoint_and_status_75(name, sixteen_cases, whole_run, tmp_path):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup, and stays so")
    process = start(words(sixteen_cases, tmp_path), tmp_path / "log")
    while process.is_alive() and seen("pretrain", tmp_path) < 3:
        time.sleep(0.002)
    os.kill(process.pid, getattr(signal, name))
    assert finish(process) == 75
    assert f"stopped by {name}, pretrain step" in (tmp_path / "log").read_text()
    (checkpoint,) = tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt")
    assert not list(tmp_path.rglob("*.lock"))
    assert finish(start(words(sixteen_cases, tmp_path), tmp_path / "log")) == 0
    assert f"pretrain goes on after step {int(checkpoint.stem[5:])} of 12" in (tmp_path / "log").read_text()
    assert_same(only_run(tmp_path), whole_run)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_into_tee_leaves_a_checkpoint(sixteen_cases, whole_run, tmp_path):
    """`harness run ... 2>&1 | tee log` on a pseudo-terminal: Ctrl-C ends `tee` too, so that the messages have no reader."""
    given = shlex.join([sys.executable, "-m", "harness", *(str(word) for word in words(sixteen_cases, tmp_path))])
    script = f"trap true INT; {given} 2>&1 | tee {tmp_path}/log; echo ${{PIPESTATUS[*]}} > {tmp_path}/status"
    shell, terminal = pty.fork()
    if not shell:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored where the tests run in the background
        os.execve("/bin/bash", ["bash", "-c", script], os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        shown = threading.Thread(target=_read_until_closed, args=(terminal,), daemon=True)
        shown.start()
        began = time.monotonic()
        while seen("pretrain", tmp_path) < 3 and time.monotonic() - began < 200:
            time.sleep(0.002)
        os.write(terminal, b"\x03")
        assert os.waitpid(shell, 0)[1] == 0
    finally:
        os.close(terminal)
    # Bash reports 128 + SIGINT for tee.
    assert (tmp_path / "status").read_text().split() == ["75", "130"]
    assert list(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))
    assert finish(start(words(sixteen_cases, tmp_path), tmp_path / "log")) == 0
    assert_same(only_run(tmp_path), whole_run)


def _read_until_closed(terminal):
    """Empty the terminal, so that nobody who writes to it waits."""
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_is_finished(sixteen_cases, whole_run, tmp_path):
    """Its status is 0 after the work is done, and not because a pipe broke."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "harness", *(str(word) for word in words(sixteen_cases, tmp_path))]
    process = subprocess.Popen(command, stdout=writer, stderr=writer, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert process.wait(240) == 0
    assert_same(only_run(tmp_path), whole_run)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "step"), [("pretrain", 1), ("pretrain", 12), ("finetune", 8)])
def test_a_signal_in_any_step_loses_none(stage, step, sixteen_cases, whole_run, tmp_path, monkeypatch, capsys):
    """The last step of a stage too, after which there is nothing to go on with but to finish it."""
    keep = loop.TrainingLoop._checkpoint_or_stop

    def hook(self, lines):
        if (self.name, self.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self, lines)

    monkeypatch.setattr(loop.TrainingLoop, "_checkpoint_or_stop", hook)
    assert status_of(*words(sixteen_cases, tmp_path)) == 75
    assert f"stopped by SIGTERM, {stage} step {step} of {STEPS[stage]}" in capsys.readouterr().err
    monkeypatch.undo()
    assert status_of(*words(sixteen_cases, tmp_path)) == 0
    assert f"{stage} goes on after step {step} of {STEPS[stage]}" in capsys.readouterr().err
    assert_same(only_run(tmp_path), whole_run)
