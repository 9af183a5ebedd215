"""`harness doctor`: what is found as words or as JSON, what fails as a status, and what is removed only when asked."""

import json
import os
import socket

import pytest

from harness.runs import doctor
from harness.runs.doctor import Finding
from tests.harness.commands import status_of


@pytest.fixture
def quick(monkeypatch):
    """Without the imports of packages, which other tests look at."""
    monkeypatch.setattr(doctor, "packages", lambda: iter([Finding("ok", "python", "3")]))


def test_a_place_where_nothing_is_wrong(quick, tmp_path, capsys):
    assert status_of("doctor", "--runs", tmp_path / "runs", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not err
    assert {each["status"] for each in found} <= {"ok", "note"}
    assert {"runs folder", "methods", "backbones", "tasks", "corpora"} <= {each["what"] for each in found}
    assert status_of("doctor", "--runs", tmp_path / "runs") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [each["status"] for each in found]


def test_what_a_crash_left_is_removed_only_when_that_is_asked_for(quick, tmp_path, capsys):
    dead = next(pid for pid in range(2**22, 2, -1) if not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110
    left = tmp_path / f".record.json.{socket.gethostname()}-{dead}-1.partial"
    mine = tmp_path / f".record.json.{socket.gethostname()}-{os.getpid()}-1.partial"
    left.write_text("half")
    mine.write_text("half")
    assert status_of("doctor", "--runs", tmp_path) == 0
    assert f"left by a crash: 1 files, 0.0 MiB, {left} among them; --fix removes them" in capsys.readouterr().out
    assert left.exists()
    assert status_of("doctor", "--runs", tmp_path, "--fix", "--json") == 0
    (found,) = [each for each in json.loads(capsys.readouterr().out) if each["what"] == "left by a crash"]
    assert found["mended"]
    assert not left.exists()
    assert mine.exists()  # of a process that is there


def test_what_fails_and_is_not_mended_is_the_status(quick, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert status_of("doctor", "--runs", tmp_path / "file", "--fix") == 2
    out, err = capsys.readouterr()
    assert "FAIL  runs folder: the runs folder" in out
    assert err == "harness: error: 1 findings above are to be mended\n"
    assert (tmp_path / "file").read_text() == "mine"
    stage = tmp_path / "runs" / "cache" / "pretrain" / "a" / "stage.json"
    stage.parent.mkdir(parents=True)
    stage.write_text("{")
    assert status_of("doctor", "--runs", tmp_path / "runs") == 2
    assert stage.exists()
    assert status_of("doctor", "--runs", tmp_path / "runs", "--fix") == 0
    assert not stage.exists()
    assert status_of("doctor", "--runs", tmp_path / "runs") == 0
