"""The command that made a run, and the same run again."""

import json

import pytest
import torch

from harness.api.task import Percentiles
from harness.cli.main import main
from harness.runs import reproduce
from harness.runs.reproduce import inspect
from tests.harness.commands import BUDGET, SMALL, folder_of
from tests.leaderboards.made import write_run


def test_reproduce_prints_the_command_and_what_differs(predicted_runs, hippocampus_phantom, tmp_path, capsys):
    folder = folder_of(predicted_runs, "simmim")
    record = json.loads((folder / "record.json").read_text())
    record["environment"] |= {"torch": "1.0", "gpu": "another one"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert main(["reproduce", str(tmp_path / "record.json"), "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "harness run --method simmim --backbone unet --task msd_hippocampus" in said
    assert "--set backbone.features=4,4,8,8,8" in said
    assert f"torch: there 1.0, here {torch.__version__}" in said
    assert "gpu: there another one, here" in said


def test_reproduce_go_makes_the_run_again_elsewhere(predicted_runs, tmp_path, capsys):
    """The folder's own run does not answer: it is made again elsewhere, on the phantom that it was made on."""
    folder = folder_of(predicted_runs, "scratch")
    # The phantom of the test is no phantom of the command's own: its data is named.
    record = json.loads((folder / "record.json").read_text())
    assert record["data"]["source"] == "phantom"
    assert (
        main(["reproduce", folder.name, "--runs", str(predicted_runs), "--into", str(tmp_path / "again"), "--go"]) == 0
    )
    said = capsys.readouterr().out
    assert list((tmp_path / "again").glob("*/record.json"))
    # The command's own phantom is not the test's small one, and both are said.
    assert "data fingerprint: there" in said
    assert "average Dice there" in said


@pytest.mark.slow
def test_reproduce_go_on_real_data_is_equal_to_the_last_digit(real_hippocampus, tmp_path, capsys):
    words = ["run", "--method", "scratch", "--task", "msd_hippocampus", "--data", str(real_hippocampus), *BUDGET]
    assert main([*words, *SMALL["unet"], "--label-fraction", "0.1", "--runs", str(tmp_path)]) == 0
    folder = folder_of(tmp_path, "scratch")
    capsys.readouterr()
    words = ["reproduce", folder.name, "--runs", str(tmp_path), "--data", str(real_hippocampus), "--go"]
    assert main([*words, "--into", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "every case has the same scores, to the last digit" in said
    assert "--label-fraction 0.1" in said


def test_reproduce_names_a_record_that_is_none(tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    assert main(["reproduce", str(tmp_path / "record.json")]) == 2
    assert "not a run record of schema 1" in capsys.readouterr().err


def test_a_run_with_all_labels_under_a_preset_of_few_is_named_with_their_number(sixteen_cases, tmp_path):
    """`fewshot` labels four cases; this run labelled all 13."""
    words = [
        "run",
        "--method",
        "scratch",
        "--task",
        "msd_hippocampus",
        "--data",
        str(sixteen_cases),
        "--preset",
        "fewshot",
    ]
    assert main([*words, *BUDGET, *SMALL["unet"], "--shots", "13", "--runs", str(tmp_path)]) == 0
    record = json.loads((folder_of(tmp_path, "scratch") / "record.json").read_text())
    assert record["label_fraction"] == 1
    made = inspect(record | {"data": record["data"] | {"source": "real"}}, sixteen_cases, tmp_path, (), ())
    assert made.request.shots == 13
    assert not [name for name, *_ in made.differences if name == "run id"]


@pytest.mark.parametrize(
    ("normalisation", "spec"),
    [
        ("Window(low=-1000.0, high=400.0)", "luna16=-1000.0,400.0"),
        (repr(Percentiles()), "luna16=percentiles"),
        ("ZScore(hounsfield=True)", "luna16=zscore"),
        ("Other()", "luna16"),
    ],
)
def test_a_corpus_keeps_its_intensities_and_what_was_skipped(tmp_path, normalisation, spec):
    corpus = {"name": "luna16", "fingerprint": "f", "normalisation": normalisation, "skipped": {"a": "no image"}}
    folder = write_run(tmp_path, "m", mode="generic", data={"corpora": [corpus]})
    record = json.loads((folder / "record.json").read_text())
    made = reproduce._request(record, None, tmp_path, (), ())
    assert (made.corpora, made.skip_bad) == ((spec,), True)
    assert reproduce._request(record, None, tmp_path, (), ("here=0,1",)).corpora == ("here=0,1",)


def test_cases_that_were_changed_are_said_after_a_run(tmp_path):
    folder = write_run(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    again = write_run(tmp_path / "again", dice=0.7)
    (folder / "cases.csv").write_text((folder / "cases.csv").read_text() + "\n")
    said = reproduce.compare(record, folder / "cases.csv", record, again / "cases.csv")
    assert "average Dice there" in said
    assert "cases are not compared: " in said
