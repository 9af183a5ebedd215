"""A request is answered from before only while the engine, the plugins and the data are what they were."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import harness
from harness import UserError
from harness.config.request import Execution, Request
from harness.runs import finished
from harness.runs.finished import digest_request, finished_before
from harness.runs.locate import locate
from harness.system.files import ENGINE, write_atomic
from tests.harness.commands import last_error, short_run, status_of


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A small tree in the place of the engine's folder."""
    tree = tmp_path / "engine"
    for name in ("__init__.py", "data/crops.py", "config/presets/demo.toml", "a/b/c/deep.py"):
        write_atomic(tree / name, "x = 1\n")
    monkeypatch.setattr(finished, "ENGINE", tree)
    return tree


@pytest.fixture
def request_(tmp_path, hippocampus_phantom):
    shutil.copytree(hippocampus_phantom, tmp_path / "data")
    (tmp_path / "words.txt").write_text("7")
    settings = (f"method.words={tmp_path}/words.txt", "finetune.steps=2")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        (Path(harness.__file__).parents[1] / "backbones" / "unet.py").read_text().replace('"unet"', '"mine"')
    )
    return Request(
        method="mae",
        task="msd_hippocampus",
        data=tmp_path / "data",
        runs=tmp_path / "runs",
        settings=settings,
        plugins=(str(plugin),),
    )


def finish(request: Request, name: str = "the-run") -> None:
    """As a run does at its end."""
    registry, _, root, corpora = locate(request)
    key = digest_request(request, registry, [root, *(folder for _, folder in corpora)])
    write_atomic(request.runs / name / "record.json", json.dumps({"run_id": name}))
    write_atomic(request.runs / "cache" / "requests" / key, name)


def test_the_same_request_is_answered_with_the_finished_run(engine, request_):
    assert finished_before(request_) is None
    finish(request_)
    answer = finished_before(request_)
    assert (answer.folder, answer.record, answer.again) == (request_.runs / "the-run", {"run_id": "the-run"}, True)
    # How it is carried out changes no result.
    other = replace(request_, execution=Execution(micro_batches=2, on_nonfinite="skip", trackers=("wandb",)))
    assert finished_before(other).folder == answer.folder


CHANGES = {
    "a line of the engine, nested": lambda tmp: (tmp / "engine/a/b/c/deep.py").write_text("x = 1\ny = 2\n"),
    "a line of the engine, no longer than before": lambda tmp: write_atomic(tmp / "engine/data/crops.py", "x = 2\n"),
    "a preset": lambda tmp: (tmp / "engine/config/presets/demo.toml").write_text("steps = 7\n"),
    "a new file of the engine": lambda tmp: (tmp / "engine/data/new.py").touch(),
    "a file of the engine less": lambda tmp: (tmp / "engine/data/crops.py").unlink(),
    "an image": lambda tmp: os.utime(next((tmp / "data").rglob("*.nii.gz")), (1, 1)),
    "a new case": lambda tmp: (tmp / "data" / "imagesTr" / "new.nii.gz").touch(),
    "a file that a setting names": lambda tmp: (tmp / "words.txt").write_text("8"),
    "a plugin's file": lambda tmp: (tmp / "plugin.py").open("a").write("# more\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_result_depends_on_is_asked_anew_when_it_changes(change, engine, request_, tmp_path):
    finish(request_)
    assert finished_before(request_) is not None
    CHANGES[change](tmp_path)
    assert finished_before(request_) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"label_fraction": 0.5},
        {"protocol": "linear"},
        {"split": "1/2"},
        {"backbone": "mine"},
        {"preset": "small"},
        {"method": "simmim"},
        {"settings": ("finetune.steps=3",)},
    ],
)
def test_another_request_is_another_run(changed, engine, request_):
    finish(request_)
    assert finished_before(replace(request_, **changed)) is None


def test_what_bytecode_and_other_runs_leave_changes_nothing(engine, request_):
    finish(request_)
    write_atomic(engine / "data" / "__pycache__" / "crops.pyc", "x")
    write_atomic(request_.runs / "other" / "record.json", "{}")
    assert finished_before(request_) is not None


def test_predictions_must_be_there_where_they_are_asked_for(engine, request_):
    finish(request_)
    kept = replace(request_, save_predictions=True)
    assert finished_before(kept) is None
    (request_.runs / "the-run" / "predictions").mkdir()
    assert finished_before(kept).folder == request_.runs / "the-run"


def test_a_run_that_was_removed_or_damaged_is_no_answer(engine, request_):
    finish(request_)
    record = request_.runs / "the-run" / "record.json"
    record.write_text("[1")
    with pytest.raises(UserError, match=r"record.json is damaged: remove the folder"):
        finished_before(request_)
    record.unlink()
    assert finished_before(request_) is None
    (note,) = (request_.runs / "cache" / "requests").iterdir()
    for text in ("../elsewhere", "", ".hidden"):
        note.write_text(text)
        assert finished_before(request_) is None


def test_the_engine_that_is_watched_is_the_whole_package():
    rooms = {
        "api",
        "cli",
        "compute",
        "config",
        "conformance",
        "costs",
        "data",
        "evaluation",
        "runs",
        "sweeps",
        "system",
    }
    assert Path(harness.__file__) == ENGINE / "__init__.py"
    assert finished.ENGINE == ENGINE
    assert {*rooms, "training"} <= {path.parent.name for path in ENGINE.glob("*/__init__.py")}
    # Each module that is imported from the package lies below it.
    import sys

    own = [module for name, module in sys.modules.items() if name == "harness" or name.startswith("harness.")]
    assert all(Path(module.__file__).is_relative_to(ENGINE) for module in own if getattr(module, "__file__", None))
    assert len(own) > 20


def test_a_finished_run_answers_before_torch_is_needed(finished_runs, two_phantoms, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("the run was resolved again, which imports torch and MONAI")

    monkeypatch.setattr("harness.runs.execute.plan", never)
    assert status_of(*short_run("hybridmim", two_phantoms / "msd_hippocampus"), "--runs", finished_runs) == 0
    assert "finished before" in capsys.readouterr().out


def test_the_slow_way_finds_the_finished_run_too(finished_runs, two_phantoms, capsys):
    """Files that were touched but not changed: recognised by content."""
    next((two_phantoms / "msd_hippocampus").rglob("*.nii.gz")).touch()
    assert status_of(*short_run("hybridmim", two_phantoms / "msd_hippocampus"), "--runs", finished_runs) == 0
    assert "finished before" in capsys.readouterr().out


def test_scratch_in_generic_mode_is_the_run_that_is_there(corpus_runs, data_folders, capsys):
    generic = ["--mode", "generic", "--corpus", data_folders / "scans"]
    assert status_of(*short_run("scratch", data_folders / "msd_hippocampus"), *generic, "--runs", corpus_runs) == 0
    assert "finished before" in capsys.readouterr().out
    assert len(list(corpus_runs.glob("*-scratch-*/record.json"))) == 1


def test_a_task_by_its_folder_is_the_named_task(corpus_runs, data_folders, capsys):
    words = short_run("scratch", data_folders / "msd_hippocampus")
    words[words.index("--task") + 1] = data_folders / "msd_hippocampus"
    assert status_of(*words, "--runs", corpus_runs) == 0
    assert "finished before" in capsys.readouterr().out
    place = words.index("--data")
    assert status_of(*words[:place], *words[place + 2 :], "--runs", corpus_runs) == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_record_is_named(content, hippocampus_phantom, finished_simmim, tmp_path, capsys):
    shutil.copytree(finished_simmim, tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/record.json")
    record.write_text(content)
    assert status_of(*short_run("simmim", hippocampus_phantom), "--runs", tmp_path / "runs") == 2
    assert "record.json is damaged: remove the folder" in last_error(capsys)


def test_a_long_value_of_a_setting_is_no_file(registry):
    request = Request(method="mae", task="brats", settings=("method.x=" + "1," * 150,))
    assert digest_request(request, registry, []) != digest_request(replace(request, seed=1), registry, [])
