"""Messages go to stderr, once, and of several processes from the first one only."""

import errno
import io
import os
import subprocess
import sys

import pytest

from harness.system import console
from harness.system.console import progress, say, say_once


def test_messages_are_no_results(capsys):
    say("going on")
    assert capsys.readouterr() == ("", "going on\n")


@pytest.mark.parametrize(("rank", "says"), [(None, "x\n"), ("", "x\n"), ("0", "x\n"), ("1", ""), ("3", "")])
def test_the_first_process_speaks_for_all(rank, says, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("x")
    assert capsys.readouterr().err == says


def test_the_same_text_is_said_once(capsys):
    for text in ("once: a", "once: b", "once: a"):
        say_once(text)
    assert capsys.readouterr().err == "once: a\nonce: b\n"


def test_a_bar_hands_on_every_item_and_a_quick_one_is_not_seen(capsys):
    assert list(progress((number**2 for number in range(4)), "squares", total=4)) == [0, 1, 4, 9]
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_takes_longer_is_seen_on_stderr_by_the_first_process_only(monkeypatch, capsys):
    now = [0.0]

    def later():
        now[0] += 20
        return now[0]

    monkeypatch.setattr("tqdm.std.tqdm._time", staticmethod(later), raising=False)
    monkeypatch.setattr("tqdm.std.time", later)
    list(progress(range(4), "squares"))
    out, err = capsys.readouterr()
    assert not out
    assert "squares" in err
    assert "4/4" in err
    monkeypatch.setenv("RANK", "1")
    list(progress(range(4), "squares"))
    list(progress(range(4), "squares", visible=False))
    assert capsys.readouterr() == ("", "")


class Broken(io.StringIO):
    """A stream that fails as a pipe without a reader does, or a closed terminal."""

    def __init__(self, error, descriptor):
        super().__init__()
        self.error, self.descriptor = error, descriptor

    def write(self, text):
        raise OSError(self.error, "gone")

    def fileno(self):
        return self.descriptor


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO])
def test_what_nobody_reads_is_dropped(error, tmp_path):
    with (tmp_path / "out").open("w") as file:
        stream = console.Stream(Broken(error, file.fileno()))
        print("lost", file=stream, flush=True)
        os.write(file.fileno(), b"lost too")  # what the process writes later goes nowhere, also at its end
    assert (tmp_path / "out").read_text() == ""


def test_a_full_disk_is_no_reader_that_went_away(tmp_path):
    with (tmp_path / "out").open("w") as file, pytest.raises(OSError, match="gone"):
        print("result", file=console.Stream(Broken(errno.ENOSPC, file.fileno())))


def test_a_signal_handler_may_speak_while_the_stream_is_written_to(tmp_path):
    with (tmp_path / "out").open("wb") as raw:

        class Reentrant(io.StringIO):
            encoding = "utf-8"

            def write(self, text):
                raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

            def fileno(self):
                return raw.fileno()

        print("stopping", file=console.Stream(Reentrant()))
    assert (tmp_path / "out").read_text() == "stopping\n"


def test_nothing_that_is_printed_fails_for_its_characters(tmp_path):
    """A path with bytes that are no UTF-8, and one that the terminal's encoding lacks."""
    code = (
        "import sys\nfrom harness.system.console import unbreakable\n"
        "with unbreakable():\n    print('a\\udcff \\u65e5'); print('b\\udcff', file=sys.stderr)"
    )
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode() == f"a\\udcff {chr(0x65E5) if encoding == 'utf-8' else chr(92) + 'u65e5'}\n"


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(ValueError, match="x"), console.unbreakable():
        raise ValueError("x")
    assert (sys.stdout, sys.stderr) == before
