"""`harness data`: check, fetch, and words that are refused before a phantom is written."""

import pytest

from harness.api.registry import Registry
from harness.cli.main import main
from tests.harness.archives import GOOD, NAME, Server
from tests.harness.commands import harness, last_error


def test_good_data_passes_the_check(two_phantoms, capsys):
    harness("data", "check", "brats", "--data", two_phantoms / "brats")
    assert "4 cases" in capsys.readouterr().out


@pytest.mark.slow
def test_real_hippocampus_passes_the_check(real_hippocampus, capsys):
    harness("data", "check", "msd_hippocampus", "--data", real_hippocampus.parent)
    assert "220 cases, 176 for training and 44 for testing; 0 with a problem" in capsys.readouterr().out


def test_check_of_a_corpus_and_of_a_folder(data_folders, tmp_path, capsys):
    harness("data", "check", data_folders / "scans", "--runs", tmp_path)
    assert "6 cases; 0 with a problem" in capsys.readouterr().out
    harness("data", "phantom", "luna16", "--out", tmp_path / "LUNA16", "--cases", "2")
    harness("data", "check", "luna16", "--data", tmp_path, "--runs", tmp_path)
    assert "2 cases; 0 with a problem" in capsys.readouterr().out


def test_the_command_brings_from_another_address(tmp_path, capsys, monkeypatch):
    with Server(GOOD) as server:
        # The published sum stays in force: other content from another address is refused.
        words = ["data", "fetch", "msd_hippocampus", "--data", str(tmp_path), "--url", server.archive.url]
        assert main(words) == 2
        assert "expected 9d24dba78a72977dbd1d2e110310f31b" in capsys.readouterr().err
        monkeypatch.setattr("tasks.msd.DecathlonTask.archive", lambda self: server.archive)
        assert main(words) == 0
    assert (tmp_path / NAME / "dataset.json").is_file()
    assert "next: harness data check msd_hippocampus" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["brats", "btcv", "atm22", "luna16", "covid19_20", "flare21"])
def test_what_needs_a_registration_says_where_and_what_is_expected(name, tmp_path, capsys):
    assert main(["data", "fetch", name, "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    known = Registry().load("task" if name in ("brats", "btcv") else "corpus", name)
    assert known.registration in message
    assert known.layout in message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["data", "fetch", "msd_hippocampus", "--data", "/etc/passwd"], "is no folder"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://[::1"], "is no address"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://localhost:1/ü"], "is no address"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://localhost:abc/x"], "is no address"),
        (["data", "check", "~nobody-of-that-name/x"], "Write the folder out"),
        (["run", "--method", "scratch", "--task", "~nobody-of-that-name/x"], "Write the folder out"),
        (["run", "--method", "scratch", "--task", ""], "name is empty"),
        (["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", ""], "--corpus is empty"),
        (
            ["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", "~nobody-of-that-name/x"],
            "Write the",
        ),
        (
            ["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", f"flare21=-1,{'9' * 400}"],
            "is empty",
        ),
        (["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", "flare22"], "mean 'flare21'"),
        (["data", "phantom", "luna16", "--out", "p", "--cases", "0"], "needs at least 1 scan"),
        (["data", "check", "luna16"], "no data to check"),
    ],
)
def test_words(line, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert main(line) == 2
    assert says in last_error(capsys)
    assert not list(tmp_path.rglob("*.nii.gz")), "a phantom was written before the words were read"
