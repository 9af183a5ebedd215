"""The record names the revision that git names, and the versions that are installed."""

import json
import subprocess
from importlib.metadata import version

import pytest
import torch

from harness.compute import environment
from harness.system.files import ENGINE

NOWHERE = {"revision": None, "dirty": None}


def git(folder, *words):
    told = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *told, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a package in it, whose engine is asked where it comes from."""
    (tmp_path / "tree" / "harness").mkdir(parents=True)
    (tmp_path / "tree" / "pyproject.toml").touch()
    (tmp_path / "tree" / "harness" / "__init__.py").touch()
    git(tmp_path / "tree", "init", "-q")
    git(tmp_path / "tree", "add", ".")
    git(tmp_path / "tree", "commit", "-qm", "first")
    monkeypatch.setattr(environment, "ENGINE", tmp_path / "tree" / "harness")
    return tmp_path / "tree"


def test_this_checkout_is_what_git_says_it_is():
    root = ENGINE.parent
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        pytest.skip("the tests run outside of a checkout")
    states = []
    for _ in range(3):  # until nobody edits between the questions
        before = bool(git(root, "status", "--porcelain"))
        found = environment.git_state()
        states.append((before, found["dirty"]))
        if before == found["dirty"]:
            break
    assert found["revision"] == git(root, "rev-parse", "HEAD")
    assert states[-1][0] == states[-1][1]


def test_a_change_makes_a_checkout_dirty_and_a_commit_clean_again(checkout):
    first = git(checkout, "rev-parse", "HEAD")
    assert environment.git_state() == {"revision": first, "dirty": False}
    (checkout / "harness" / "new.py").touch()
    assert environment.git_state() == {"revision": first, "dirty": True}
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "second")
    second = git(checkout, "rev-parse", "HEAD")
    assert second != first
    assert environment.git_state() == {"revision": second, "dirty": False}
    (checkout / "harness" / "__init__.py").write_text("x = 1\n")
    assert environment.git_state() == {"revision": second, "dirty": True}


def test_what_is_installed_below_another_repository_is_none_of_it(checkout):
    (checkout / "pyproject.toml").unlink()
    assert environment.git_state() == NOWHERE


def test_outside_of_a_checkout_nothing_is_known(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(environment, "ENGINE", tmp_path / "harness")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_state() == NOWHERE
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert environment.git_state() == NOWHERE


def test_a_record_holds_the_versions_that_are_installed():
    found = environment.describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["packages"] == {name: version(name) for name in found["packages"]}
    assert {"monai", "numpy", "accelerate"} <= set(found["packages"])
    assert found["harness"] == version("ssl-seg-harness")
    assert (found["cuda"], found["gpu"]) == (None, None)
    assert found["git"] == environment.git_state()


@pytest.mark.parametrize(
    ("load", "threads", "given", "says"),
    [
        (2.1, 4, {}, "OMP_NUM_THREADS=1 before the command"),
        (7.5, 4, {}, "OMP_NUM_THREADS=1 before the command"),
        (1.9, 4, {}, ""),
        (7.5, 1, {}, ""),
        (7.5, 4, {"OMP_NUM_THREADS": "4"}, ""),
    ],
)
def test_a_busy_machine_is_told_once(load, threads, given, says, monkeypatch, capsys):
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(environment.psutil, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment.advise_on_other_work.cache_clear()
    for _ in range(2):
        environment.advise_on_other_work()
    said = capsys.readouterr().err
    assert said.count("OMP_NUM_THREADS") == bool(says)
    assert says in said
