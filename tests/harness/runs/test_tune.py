"""Tuning: the same trials for every method, chosen on validation cases, and no test case before the choice."""

import json

import pytest
from safetensors.torch import load_file

from harness import UserError
from harness.config.request import Request
from harness.evaluation import evaluate as testing
from harness.evaluation import validation
from harness.runs import tune as tuning
from harness.runs.execute import run
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.runs.status import stage_and_step
from harness.system.signals import Interrupted
from leaderboards import board, records, validate
from tests.conftest import TINY, TINY_BUDGET

GRID = "finetune.lr=1e-9,3e-3 finetune.layer_decay=0.5"

SETTINGS = (*TINY["unet"], *TINY_BUDGET, "finetune.steps=3", "evaluate.overlap=0")


def request_for(data, runs, method="scratch", **changes) -> Request:
    fields = {"settings": SETTINGS, "tune": GRID} | changes
    return Request(method=method, task="msd_hippocampus", data=data, runs=runs, **fields)


@pytest.fixture(scope="module")
def tuned(sixteen_cases, tmp_path_factory):
    """A folder with three methods tuned over the same grid, and their records."""
    runs = tmp_path_factory.mktemp("runs")
    methods = ("scratch", "untrained", "simmim")
    return runs, {name: run(request_for(sixteen_cases, runs, name)).record for name in methods}


def test_every_method_has_the_same_trials_and_the_best_one_on_validation_cases_is_taken(tuned):
    trials = [[trial["settings"] for trial in record["tuning"]["trials"]] for record in tuned[1].values()]
    assert trials[0] == trials[1] == trials[2]
    assert len(trials[0]) == 2
    for record in tuned[1].values():
        scores = [trial["dice"] for trial in record["tuning"]["trials"]]
        assert record["tuning"]["chosen"] == scores.index(max(scores))
        assert record["validation"]["curve"][-1][1] == max(scores)
        assert len(set(scores)) > 1


def test_the_record_has_the_chosen_setting_in_its_configuration_and_the_asked_overrides(tuned):
    for record in tuned[1].values():
        chosen = record["tuning"]["trials"][record["tuning"]["chosen"]]["settings"]
        assert record["config"]["finetune"]["lr"] == float(chosen["finetune.lr"])
        assert record["config"]["finetune"]["layer_decay"] == float(chosen["finetune.layer_decay"])
        assert record["config"]["tune"] == GRID
        assert not {"finetune.lr", "finetune.layer_decay"} & set(record["overrides"])
        assert (record["energy"]["tune_kwh"] is None) == (record["energy"]["finetune_kwh"] is None)


def test_the_chosen_weights_are_those_of_a_plain_run_with_that_setting(tuned, sixteen_cases, tmp_path):
    """Here every fifth training case is held out; a plain run holds out one in twenty, so the split is given to it."""
    runs, found = tuned
    record = found["scratch"]
    again = request_for(sixteen_cases, tmp_path)
    number = record["tuning"]["chosen"]
    only = " ".join(f"{key}={value}" for key, value in record["tuning"]["trials"][number]["settings"].items())
    plain = run(Request(**{**vars(again), "tune": only}))
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (runs / record["run_id"], plain.folder))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert plain.record["metrics"] == record["metrics"]


def test_no_test_case_is_scored_before_the_choice(sixteen_cases, tmp_path, monkeypatch):
    scored, predict, take_over = [], validation.predict, tuning._take_over
    request = request_for(sixteen_cases, tmp_path)
    tested = {case.id for case in plan(request, *locate(request)).test}

    def note(task, network, image, *settings):
        scored.append(str(image.tobytes()[:4096]))
        return predict(task, network, image, *settings)

    monkeypatch.setattr(validation, "predict", note)
    monkeypatch.setattr(testing, "predict", note)
    before = []
    monkeypatch.setattr(tuning, "_take_over", lambda *words: (before.append(len(scored)), take_over(*words)))
    record = run(request).record
    assert record["tuning"]["trials"]
    assert len(before) == 1
    chosen_on, final = set(scored[: before[0]]), set(scored[before[0] :])
    assert len(chosen_on) == len(record["validation"]["cases"]) == 2
    assert len(final) == len(tested) == 3
    assert not chosen_on & final
    assert not tested & set(record["validation"]["cases"])


def test_the_trials_leave_nothing_behind(tuned):
    runs, found = tuned
    for record in found.values():
        assert not (runs / record["run_id"] / tuning.TRIALS).exists()
        assert (runs / record["run_id"] / "weights.safetensors").exists()


def test_tuned_runs_share_a_table_that_says_so_and_stay_out_of_the_others(tuned, sixteen_cases):
    runs, found = tuned
    plain = run(request_for(sixteen_cases, runs, tune="")).record
    loaded, problems = records.load_runs([runs])
    assert not problems
    protocols = {run_of.run_id: run_of.table[4] for run_of in loaded}
    assert {protocols[record["run_id"]] for record in found.values()} == {"finetune, tuned(2)"}
    assert protocols[plain["run_id"]] == "finetune"
    table = next(each for each in board.gather(loaded) if "tuned" in each.shared("protocol"))
    assert {group.method.partition("{")[0] for group in table.groups} == set(found)
    assert all("tuning chose lr=" in group.note for group in table.groups)
    assert "finetune.lr=1e-9|3e-3" in table.shared("preset")


def test_a_tuned_record_is_valid_and_a_changed_choice_is_not(tuned):
    runs, found = tuned
    folder = runs / found["simmim"]["run_id"]
    assert validate.check_run(folder) == []
    text = (folder / "record.json").read_text()
    for change, says in (
        (
            lambda record: record["tuning"].update(chosen=(record["tuning"]["chosen"] + 1) % 2),
            "highest validation Dice",
        ),
        (lambda record: record["tuning"].update(grid="finetune.lr=1,2,3"), "its grid gives 3"),
        (lambda record: record["config"]["finetune"].update(lr=9.0), "its configuration says 9.0"),
        (
            lambda record: record["tuning"]["trials"][1 - record["tuning"]["chosen"]].update(dice=0.0),
            "its curve ends elsewhere",
        ),
        (lambda record: record["validation"].update(curve=[[3, 0.9]]), "another validation Dice"),
    ):
        record = json.loads(text)
        change(record)
        (folder / "record.json").write_text(json.dumps(record))
        assert any(says in problem for problem in validate.check_run(folder)), says
    (folder / "record.json").write_text(text)


def test_an_interrupted_tuning_goes_on_with_the_next_trial(sixteen_cases, tmp_path, monkeypatch):
    request = request_for(sixteen_cases, tmp_path / "a")
    whole = run(request_for(sixteen_cases, tmp_path / "b")).record
    watch, calls = validation.Validation.__call__, []

    def stop(self, module, step):
        calls.append(step)
        if calls.count(1) == 2:  # the first step of the second trial
            raise Interrupted("a test")
        watch(self, module, step)

    monkeypatch.setattr(validation.Validation, "__call__", stop)
    with pytest.raises(Interrupted):
        run(request)
    monkeypatch.undo()
    tried = []

    def note(self, module, step):
        tried.append(self.file.parent.name)
        watch(self, module, step)

    monkeypatch.setattr(validation.Validation, "__call__", note)
    record = run(request).record
    assert "1" not in tried
    assert set(tried) == {"2"}
    assert record["tuning"]["chosen"] == whole["tuning"]["chosen"]
    assert [trial["curve"] for trial in record["tuning"]["trials"]] == [
        trial["curve"] for trial in whole["tuning"]["trials"]
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split": "same"}, "--split same"),
        ({"protocol": "linear"}, "--protocol linear"),
        ({"settings": (*TINY["unet"], *TINY_BUDGET, "finetune.validation=0")}, "finetune.validation=0"),
        (
            {"settings": (*TINY["unet"], *TINY_BUDGET, "finetune.lr=1e-3")},
            "finetune.lr is set by --set and in the grid",
        ),
        ({"tune": "finetune.lr=-1,1"}, "finetune.lr"),
        ({"tune": "finetune.warmup_steps=1,5000", "settings": TINY["unet"]}, "a warm-up of 5000 steps does not fit"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_anything_is_computed(changes, says, sixteen_cases, tmp_path):
    with pytest.raises(UserError) as error:
        run(request_for(sixteen_cases, tmp_path, **changes))
    assert says in str(error.value)
    assert not list(tmp_path.glob("msd_hippocampus-*"))


def test_four_training_cases_are_too_few(hippocampus_phantom, tmp_path):
    with pytest.raises(UserError, match="at most one in 5 training cases"):
        run(request_for(hippocampus_phantom, tmp_path))


def test_a_trial_whose_validation_is_gone_is_tried_again(sixteen_cases, tmp_path, monkeypatch):
    request = request_for(sixteen_cases, tmp_path)
    monkeypatch.setattr(tuning, "_take_over", lambda *_: (_ for _ in ()).throw(Interrupted("a test")))
    with pytest.raises(Interrupted):
        run(request)
    monkeypatch.undo()
    (folder,) = tmp_path.glob("msd_hippocampus-*")
    assert stage_and_step(folder) == ("finetune", 3)
    (folder / tuning.TRIALS / "1" / "validation.json").unlink()
    trials = run(request).record["tuning"]["trials"]
    assert [len(trial["curve"]) for trial in trials] == [2, 2]
