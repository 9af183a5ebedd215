"""Which run is meant, and how far it is."""

import json

import pytest

from harness import UserError
from harness.runs.status import find_run, stage_and_step


@pytest.fixture
def runs(tmp_path):
    for name in ("brats-mae-s0-aaa", "brats-mae-s0-abb", "brats-voco-s0-ccc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{}")
    (tmp_path / "brats-simmim-s0-ddd").mkdir()  # not finished
    return tmp_path


def test_a_run_is_named_by_its_folder_its_id_or_the_beginning_of_it(runs):
    voco = runs / "brats-voco-s0-ccc"
    assert (
        find_run("brats-voco-s0-ccc", runs) == find_run("brats-v", runs) == find_run(str(voco), runs / "else") == voco
    )


def test_a_name_that_means_none_or_several_is_refused(runs):
    with pytest.raises(UserError, match="begins 2 run ids: brats-mae-s0-aaa, brats-mae-s0-abb"):
        find_run("brats-mae", runs)
    with pytest.raises(UserError, match="did you mean 'brats-voco-s0-ccc'"):
        find_run("brats-voko-s0-ccc", runs)
    with pytest.raises(UserError, match="unknown run in"):
        find_run("brats-simmim", runs)
    with pytest.raises(UserError, match="known: none"):
        find_run("x", runs / "nowhere")


def line(stage, step):
    return json.dumps({"stage": stage, "step": step, "terms": {"a" * 50: 0.5}}) + "\n"


def test_where_a_run_is_says_its_last_whole_line(tmp_path):
    history = tmp_path / "history.jsonl"
    assert stage_and_step(tmp_path) == ("", 0)
    history.touch()
    assert stage_and_step(tmp_path) == ("", 0)
    history.write_text(line("pretrain", 1))
    assert stage_and_step(tmp_path) == ("pretrain", 1)
    # Many more bytes than are read, and a line that is being written.
    whole = "".join(line("pretrain", step) for step in range(1, 200)) + line("finetune", 1)
    history.write_text(whole + line("finetune", 2)[:20])
    assert stage_and_step(tmp_path) == ("finetune", 1)
    for damaged in ("no json\n", "[1]\n", '{"stage": "x"}\n', '{"stage": "x", "step": null}\n'):
        history.write_text(whole + damaged)
        assert stage_and_step(tmp_path) == ("", 0)


def test_a_fine_tuned_run_is_evaluated_case_by_case(tmp_path):
    (tmp_path / "history.jsonl").write_text(line("finetune", 9))
    (tmp_path / "finetune.json").write_text("{}")
    assert stage_and_step(tmp_path) == ("evaluate", 0)
    (tmp_path / "evaluation" / "p").mkdir(parents=True)
    for name in ("a.npz", "p/b.npz", ".c.npz.host-1-2.partial"):
        (tmp_path / "evaluation" / name).touch()
    assert stage_and_step(tmp_path) == ("evaluate", 2)


def test_a_whole_id_is_that_run_although_another_begins_so(runs):
    (runs / "brats-voco-s0-ccc-copy").mkdir()
    (runs / "brats-voco-s0-ccc-copy" / "record.json").write_text("{}")
    assert find_run("brats-voco-s0-ccc", runs) == runs / "brats-voco-s0-ccc"
