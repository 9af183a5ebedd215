"""A job is the command of its cell, what several cells share comes first, and the environment says nothing twice."""

from pathlib import Path

import pytest

from harness.cli import run
from harness.cli.options import Parser, request_of
from harness.config.request import Execution, Request
from harness.sweeps.cells import PlannedCell, SweepCell
from harness.sweeps.job import Job, job_environment, make_jobs


def planned(tmp_path, method, shared="", **changes) -> PlannedCell:
    request = Request(method=method, task="brats", runs=tmp_path, **changes)
    return PlannedCell(SweepCell(request), tmp_path / method, tmp_path / shared if shared else None, (1, 1, 1))


def parsed(words) -> Request:
    parser = Parser(prog="harness", allow_abbrev=False)
    run.add_parser(parser.add_subparsers(parser_class=Parser))
    return request_of(parser.parse_args(words))


def test_a_job_asks_for_its_cell(tmp_path, monkeypatch):
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    each = planned(tmp_path, "mae", seed=3, settings=("a.b=c d",), execution=Execution(on_nonfinite="skip"))
    python, *rest = Job(each).words(1)
    assert Path(python).name.startswith("python")
    assert rest[:2] == ["-m", "harness"]
    assert parsed(rest[2:]) == each.cell.request
    first = Job(each, until="pretrain")
    words = first.words(1)[3:]
    assert parsed(words).execution == Execution(on_nonfinite="skip", until="pretrain")
    assert first.name == f"{Job(each).name}-pretrain"


def test_several_processes_of_a_job_are_started_by_torchrun(tmp_path):
    words = Job(planned(tmp_path, "mae")).words(3)
    place = words.index("torch.distributed.run")
    assert words[place - 1] == "-m"
    assert words[words.index("--nproc_per_node") + 1] == "3"
    assert words[words.index("harness") - 1] == "-m"
    assert words[words.index("harness") :] == Job(planned(tmp_path, "mae")).words(1)[2:]


def test_names_of_cells_that_differ_differ(tmp_path):
    cells = [
        planned(tmp_path, "mae", **changes)
        for changes in (
            {},
            {"seed": 1},
            {"label_fraction": 0.5},
            {"settings": ("a.b=1",)},
            {"corpora": ("x",)},
            {"split": "1/2"},
        )
    ]
    assert len({Job(each).name for each in cells}) == len(cells)
    assert all("/" not in Job(each).name for each in cells)


def test_a_pre_training_that_cells_share_is_a_job_before_them(tmp_path):
    a, b = (planned(tmp_path, method, "shared") for method in ("mae", "simmim"))
    alone, none = planned(tmp_path, "voco", "alone"), planned(tmp_path, "scratch")
    first, *jobs = make_jobs([a, alone, b, none])
    assert (first.planned, first.until, first.needs) == (a, "pretrain", None)
    assert [(job.planned, job.until, job.needs) for job in jobs] == [
        (a, "", first),
        (alone, "", None),
        (b, "", first),
        (none, "", None),
    ]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "stage.json").write_text("{}")  # it is finished
    assert [(job.planned, job.needs) for job in make_jobs([a, b])] == [(a, None), (b, None)]
    assert make_jobs([]) == []


def test_a_pre_training_waits_for_the_cells_before_it(tmp_path):
    """Otherwise no result would come before the last pre-training."""
    first, other = planned(tmp_path, "mae", "first"), planned(tmp_path, "voco", "other")
    later = [planned(tmp_path, method, pretrain) for method, pretrain in (("simmim", "first"), ("dino", "other"))]
    jobs = make_jobs([first, later[0], other, later[1]])
    assert [(job.planned, job.until) for job in jobs] == [
        (first, "pretrain"),
        (first, ""),
        (later[0], ""),
        (other, "pretrain"),
        (other, ""),
        (later[1], ""),
    ]


@pytest.mark.parametrize("kept", ["PATH", "CUDA_VISIBLE_DEVICES", "HARNESS_KEEP_MEMORY"])
def test_the_environment_of_a_job_is_that_of_the_sweep_without_what_its_words_say(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = {
        "HARNESS_DATA": "d",
        "HARNESS_RUNS": "r",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "9",
    }
    found = job_environment({**said, kept: "x"}, Path("notes/a.status.json"))
    # Absolute: a job may begin in another folder.
    assert found == {kept: "x", "HARNESS_STATUS_FILE": str(tmp_path / "notes" / "a.status.json")}


@pytest.mark.parametrize(
    ("first", "second"),
    [({"label_fraction": 0.001}, {"label_fraction": 0.002}), ({"data": Path("/a")}, {"data": Path("/b")})],
)
def test_cells_that_differ_in_the_data_or_a_little_in_the_fraction_are_two_jobs(first, second, tmp_path):
    jobs = make_jobs([planned(tmp_path, "mae", **first), planned(tmp_path, "mae", **second)])
    assert jobs[0].name != jobs[1].name
