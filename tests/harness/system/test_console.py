"""Messages go to stderr, once, and of several processes from the first one only."""

import pytest

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
