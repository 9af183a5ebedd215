"""What a run will do is known before it starts, and named after all that its result depends on, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness import UserError
from harness.config.request import Execution, Request
from harness.runs.locate import locate
from harness.runs.plan import plan, plan_without_data
from tests.harness.nnunet import nnunet

SETTINGS = ("finetune.crop=32", "pretrain.crop=32", "backbone.features=4,4,8,8,8", "finetune.batch_size=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def request_(sixteen_cases, runs):
    return Request(method="mae", task="msd_hippocampus", data=sixteen_cases, runs=runs, settings=SETTINGS)


def planned(request, *settings, **changes):
    request = replace(request, settings=(*request.settings, *settings), **changes)
    return plan(request, *locate(request))


def test_label_fractions_are_nested_and_rounded_up(request_):
    whole = planned(request_)
    assert len(whole.train) == 13
    assert len(whole.test) == 3
    sizes = []
    for fraction in (0.01, 0.1, 0.5, 1.0):
        part = planned(request_, label_fraction=fraction)
        chosen = {case.id for case in part.label_cases}
        assert part.label_cases == [case for case in whole.train if case.id in chosen]
        assert part.num_pretrain == 13  # pre-training needs no labels
        sizes.append(len(part.label_cases))
    assert sizes == [1, 2, 7, 13]


def labelled(request, **changes):
    return {case.id for case in planned(request, **changes).label_cases}


def test_each_seed_draws_its_own_cases_unless_the_draw_has_a_seed(request_):
    draws = [labelled(request_, shots=2, seed=seed) for seed in range(6)]
    assert all(len(draw) == 2 for draw in draws)
    assert len(set(map(frozenset, draws))) > 3
    assert [labelled(request_, shots=2, seed=seed) for seed in range(6)] == draws
    fixed = [labelled(request_, shots=2, seed=seed, label_seed=4) for seed in range(6)]
    assert all(draw == draws[4] for draw in fixed)


def test_more_shots_hold_fewer_shots(request_):
    draws = [labelled(request_, shots=shots, seed=1) for shots in (1, 2, 4, 13)]
    assert list(map(len, draws)) == [1, 2, 4, 13]
    assert draws[0] < draws[1] < draws[2] < draws[3]
    assert labelled(request_, seed=1) == draws[3]


def test_shots_are_a_share_of_the_training_cases(request_):
    few = planned(request_, shots=3)
    assert few.config.label_fraction == 3 / 13
    assert few.run_id == planned(request_, label_fraction=3 / 13).run_id
    assert "-demo-n3-s0-" in few.run_id
    with pytest.raises(UserError, match="there are 13 training cases"):
        planned(request_, shots=14)


def test_the_preset_fewshot_labels_four_cases_unless_told_otherwise(request_):
    few = replace(request_, preset="fewshot")
    assert len(planned(few).label_cases) == 4
    assert planned(few).config.label_fraction == 4 / 13
    assert len(planned(few, shots=2).label_cases) == 2
    assert len(planned(few, label_fraction=0.5).label_cases) == 7


def test_a_preset_says_that_there_are_fewer_cases_than_it_labels(hippocampus_phantom, tmp_path):
    request = Request(
        method="scratch", task="msd_hippocampus", preset="fewshot", data=hippocampus_phantom, runs=tmp_path
    )
    with pytest.raises(UserError, match="preset 'fewshot' labels 4: there are 3 training cases"):
        plan(request, *locate(request))


def test_with_all_labels_there_is_no_draw_that_a_seed_could_fix(request_):
    assert planned(request_, label_seed=3).run_id == planned(request_).run_id
    assert planned(request_, label_seed=3, shots=2).run_id != planned(request_, shots=2).run_id


def test_a_control_serves_every_budget_of_pre_training(request_):
    control = replace(request_, method="scratch", settings=("finetune.steps=9", "finetune.warmup_steps=0"))
    plain = planned(control)
    assert planned(control, "pretrain.steps=900").run_id == plain.run_id
    assert planned(control, "pretrain.steps=900").config == plain.config
    assert planned(control, "finetune.steps=8").run_id != plain.run_id
    with pytest.raises(UserError, match=r"pretrain\.steps"):
        planned(control, "pretrain.steps=-1")


SAME_WEIGHTS = [
    {"label_fraction": 0.5},
    {"protocol": "linear"},
    {"settings": (*SETTINGS, "finetune.lr=0.5")},
    {"settings": (*SETTINGS, "evaluate.overlap=0.25")},
]
OTHER_WEIGHTS = [
    {"seed": 1},
    {"split": "1/2"},
    {"method": "simmim"},
    {"settings": (*SETTINGS, "pretrain.lr=0.5")},
    {"settings": (*SETTINGS, "method.mask_ratio=0.5")},
    {"settings": (*SETTINGS, "backbone.dropout=0.5")},
    {"settings": (*SETTINGS, "task.spacing=2,2,2")},
]


@pytest.mark.parametrize("changes", [*SAME_WEIGHTS, *OTHER_WEIGHTS])
def test_runs_share_a_pre_training_that_is_the_same_and_no_run_has_the_name_of_another(changes, request_):
    first, second = planned(request_), planned(replace(request_, **changes))
    assert first.run_id != second.run_id
    assert (first.pretrain_key == second.pretrain_key) == (changes in SAME_WEIGHTS)
    assert (first.pretrain_folder(Path("r")) == second.pretrain_folder(Path("r"))) == (changes in SAME_WEIGHTS)


def test_how_and_where_it_is_carried_out_changes_no_name(request_, tmp_path):
    first = planned(request_)
    assert first.run_id.startswith("msd_hippocampus-mae-unet-demo-s0-")
    execution = Execution(checkpoint_minutes=1, on_nonfinite="skip", micro_batches=2, until="pretrain")
    other = planned(request_, execution=execution, runs=tmp_path, save_predictions=True)
    assert (other.run_id, other.pretrain_key) == (first.run_id, first.pretrain_key)


def test_test_cases_that_were_trained_on_are_counted(request_):
    assert planned(request_).num_test_seen == 0
    assert planned(request_, split="same").num_test_seen == 16
    assert planned(request_).phantom


def test_a_method_that_pre_trains_nothing_reads_no_corpus(request_, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.nii.gz").write_bytes(b"no image")
    changes = {"mode": "generic", "corpora": (f"{tmp_path}/empty",)}
    assert planned(request_, method="scratch", **changes).run_id == planned(request_, method="scratch").run_id
    with pytest.raises(UserError, match=r"x.nii.gz"):
        planned(request_, **changes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("finetune.steps=3", "finetune.warmup_steps=3"), "a warm-up of 3 steps does not fit 3 training steps"),
        (
            ("finetune.epochs=1", "finetune.warmup_epochs=1", "finetune.warmup_steps=0"),
            "a warm-up of 7 steps does not fit 7 training steps",
        ),
        (
            ("pretrain.steps=4", "pretrain.warmup_steps=20", "finetune.steps=3", "finetune.warmup_steps=3"),
            "pretrain: a warm-up of 20 steps .* set fewer pretrain.warmup_steps .*; finetune: a warm-up of 3 steps",
        ),
        (("finetune.crop=33,32,32",), "33"),
    ],
)
def test_what_does_not_fit_is_known_before_pre_training(settings, says, request_):
    with pytest.raises(UserError, match=says):
        planned(request_, *settings)


def test_processes_that_cannot_share_a_batch_are_refused(request_, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="a batch of 2 crops cannot be dealt out evenly over 4 processes"):
        planned(request_, "pretrain.batch_size=4", "finetune.batch_size=2")


def test_a_dry_run_writes_no_phantom(request_, tmp_path):
    config, found = plan_without_data(replace(request_, data=None, runs=tmp_path / "runs"))
    assert found is None
    assert config.finetune.crop == (32, 32, 32)
    assert not (tmp_path / "runs").exists()
    config, found = plan_without_data(request_)
    assert found.run_id == planned(request_).run_id
    with pytest.raises(UserError, match=r"33"):
        plan_without_data(replace(request_, data=None, settings=("finetune.crop=33,32,32",)))


def test_z_scores_are_part_of_what_a_run_is(request_):
    plain, scored = planned(request_), planned(request_, "task.normalisation=zscore")
    assert plain.run_id != scored.run_id
    assert plain.pretrain_key != scored.pretrain_key
    assert scored.config.prepared["normalisation"] == "ZScore"
    assert scored.config.overrides["task.normalisation"] == "zscore"


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("models_genesis", ["task.normalisation=zscore"], "choose --method from hybridmim, mae, simmim, supervised"),
        ("scratch", ["task.normalisation=zscore", "task.window=0,1"], "not both"),
        ("scratch", ["task.normalisation=minmax"], "task.normalisation=minmax"),
    ],
)
def test_z_scores_where_they_do_not_fit_are_refused(method, settings, says, request_):
    with pytest.raises(UserError, match=says):
        planned(request_, *settings, method=method)


def test_corpus_and_task_have_z_scores_or_neither(request_, data_folders):
    scans = data_folders / "scans"
    generic = {"mode": "generic", "corpora": (f"{scans}=percentiles",)}
    with pytest.raises(UserError, match="must both have z-scores, or neither"):
        planned(request_, "task.normalisation=zscore", **generic)
    with pytest.raises(UserError, match="must both have z-scores, or neither"):
        planned(request_, mode="generic", corpora=(f"{scans}=zscore",))
    assert planned(request_, "task.normalisation=zscore", mode="generic", corpora=(f"{scans}=zscore",)).corpora
    assert planned(request_, "task.normalisation=zscore", mode="generic", corpora=(str(scans),)).corpora


@pytest.mark.parametrize("method", ["scratch", "supervised", "mae"])
def test_the_same_files_with_other_labels_are_another_run(method, sixteen_cases, tmp_path, runs):
    """Dataset101_Hip and Dataset102_Hip have one name, `hip`; the second has a region, the third exchanges two labels."""
    plans = []
    for number, labels in enumerate(
        ({"background": 0, "a": 1, "b": 2}, {"background": 0, "whole": [1, 2]}, {"background": 0, "a": 2, "b": 1})
    ):
        names = [f"c{index}" for index in range(16)]
        folder = nnunet(sixteen_cases, tmp_path / str(number) / f"Dataset10{number}_Hip", names, labels)
        described = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(described | {"name": "hip"}))
        plans.append(planned(Request(method=method, task=str(folder), runs=runs, settings=SETTINGS)))
    assert {each.task.name for each in plans} == {"hip"}
    assert len({each.data.fingerprint for each in plans}) == 1
    assert len({each.run_id for each in plans}) == 3
    assert len({each.task.version for each in plans}) == 3  # so no table holds two of them
    assert len({each.pretrain_key for each in plans}) == 3


def test_a_task_of_one_version_with_other_targets_is_another_run(request_, monkeypatch):
    """A plugin whose author forgot to raise the version."""
    first = planned(request_)
    changed = replace(first, data=replace(first.data, task=replace(first.task, targets={"a": (2,), "b": (1,)})))
    assert changed.run_id != first.run_id
    assert changed.pretrain_key == first.pretrain_key  # mae has seen no label


def test_the_number_of_loader_processes_is_no_part_of_a_run(request_):
    first, second = planned(request_), planned(request_, "pretrain.workers=3", "finetune.workers=1")
    assert second.config.finetune.workers == 1
    assert first.run_id == second.run_id
    assert first.pretrain_key == second.pretrain_key
    assert first.config.overrides == second.config.overrides


def test_a_plugin_whose_helper_was_changed_is_another_run(request_, tmp_path):
    helper, plugin = tmp_path / "helper_of_mine.py", tmp_path / "mine.py"
    helper.write_text("SCALE = 1.0\n")
    plugin.write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
        "from helper_of_mine import SCALE\nfrom methods.mae import MAE\n\n\n"
        "class Mine(MAE):\n    name = 'mine'\n    scale = SCALE\n"
    )
    mine = replace(request_, method="mine", plugins=(str(plugin),))
    first = planned(mine)
    assert planned(mine).run_id == first.run_id
    helper.write_text("SCALE = 2.0\n")
    changed = planned(mine)
    assert changed.run_id != first.run_id
    assert changed.pretrain_key != first.pretrain_key
