"""`harness reproduce`: the command of a run, by its id or by a record alone."""

import json
import shlex
import shutil

import pytest

from harness.cli import run
from harness.cli.options import Parser, request_of
from tests.harness.commands import fails, folder_of, harness, short_run


def test_the_command_that_is_printed_asks_for_the_run(finished_simmim, hippocampus_phantom, tmp_path, capsys):
    folder = folder_of(finished_simmim, "simmim")
    shutil.copy(folder / "record.json", tmp_path / "sent.json")
    said = []
    for named in ([folder.name[:-2], "--runs", finished_simmim], [tmp_path / "sent.json"]):
        capsys.readouterr()
        harness("reproduce", *named, "--data", hippocampus_phantom, "--into", tmp_path / "again")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    lines = said[0].splitlines()
    assert lines[0] == f"the command of {folder.name}:"
    parser = Parser(prog="harness", allow_abbrev=False)
    run.add_parser(parser.add_subparsers(parser_class=Parser))
    request = request_of(parser.parse_args(shlex.split(lines[1])[1:]))
    record = json.loads((folder / "record.json").read_text())
    assert (request.method, request.task, request.seed) == ("simmim", "msd_hippocampus", 0)
    assert lines[1].endswith(" --data phantom")  # whatever HARNESS_DATA names
    assert {tuple(pair.split("=", 1)) for pair in request.settings} == set(record["overrides"].items())
    assert request.runs == tmp_path / "again"
    assert not (tmp_path / "again").exists()  # looked at, not run


def test_what_differs_is_named(finished_simmim, tmp_path, capsys):
    record = json.loads((folder_of(finished_simmim, "simmim") / "record.json").read_text())
    record["environment"]["torch"] = "0.4.1"
    record["data"]["source"] = "real"
    (tmp_path / "sent.json").write_text(json.dumps(record))
    capsys.readouterr()
    harness("reproduce", tmp_path / "sent.json", "--into", tmp_path / "again")
    said = capsys.readouterr().out
    assert "what differs here:" in said
    assert "  torch: there 0.4.1, here " in said
    assert f"  data: there real, fingerprint {record['data']['fingerprint']}, here not given: --data DIR" in said
    assert "the run used real data" in fails(
        capsys, "reproduce", tmp_path / "sent.json", "--into", tmp_path / "again", "--go"
    )
    assert not (tmp_path / "again").exists()


def test_what_is_no_record_is_refused(tmp_path, capsys):
    (tmp_path / "sent.json").write_text("[")
    fails(capsys, "reproduce", tmp_path / "sent.json")
    assert "unknown run in" in fails(capsys, "reproduce", "nowhere", "--runs", tmp_path)


@pytest.mark.slow
def test_a_run_of_a_file_of_folds_asks_for_that_file(tmp_path, capsys):
    """Without data: a phantom that is reproduced is written again, with all of its cases."""
    names = [f"hippocampus_{number:03d}" for number in range(1, 16)]
    path, other = tmp_path / "splits_final.json", tmp_path / "other.json"
    path.write_text(json.dumps([{"train": names[1:], "val": names[:1]}, {"train": names[:1], "val": names[1:]}]))
    other.write_text(path.read_text() + " ")
    runs = tmp_path / "runs"
    words = [word for word in short_run("scratch", "DATA") if word not in ("--data", "DATA")]
    harness(*words, "--runs", runs, "--split", f"1/2@{path}")
    (run,) = runs.glob("msd_hippocampus-*")
    again = ("reproduce", run, "--runs", runs, "--into", tmp_path / "again")
    assert "give it with --split-file FILE" in fails(capsys, *again)
    assert "is not the file of the run" in fails(capsys, *again, "--split-file", other)
    harness(*again, "--split-file", path, "--go")
    assert "every case has the same scores, to the last digit" in capsys.readouterr().out
    assert (tmp_path / "again" / run.name / "record.json").exists()
    record = json.loads((run / "record.json").read_text())
    record["data"]["split"] = "1/2"
    (run / "record.json").write_text(json.dumps(record))
    assert "was split by '1/2', without a file" in fails(capsys, *again, "--split-file", path)


def test_a_plugin_that_is_not_given_is_named(finished_simmim, tmp_path, capsys):
    record = json.loads((folder_of(finished_simmim, "simmim") / "record.json").read_text())
    record |= {"backbone": "ours", "data": record["data"] | {"source": "real"}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    harness("reproduce", tmp_path / "record.json")
    said = capsys.readouterr().out
    assert "backbone 'ours': there of a plugin, here unknown: give --plugin FILE" in said
    assert "method 'simmim'" not in said
    assert "one that a file defines needs --plugin FILE" in fails(
        capsys, "reproduce", tmp_path / "record.json", "--data", tmp_path
    )
