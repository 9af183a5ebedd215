"""Results of other software: label maps are scored as ours are, a summary gives Dice, what is about something else is refused."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.config.schema import Evaluate
from harness.data.cases import load_label
from harness.data.datasets import open_task
from harness.runs.imported import Origin, import_results
from harness.runs.reproduce import inspect
from harness.runs.restore import read_run
from harness.system.files import digest_file
from leaderboards import records
from leaderboards.validate import check_run
from tests.harness.commands import folder_of, harness

ORIGIN = Origin("nnU-Net 2.8.1", "resenc", 0)


@pytest.fixture
def opened(hippocampus_phantom, tmp_path):
    return open_task(Registry().task("msd_hippocampus"), hippocampus_phantom, tmp_path / "cache", "fixed")


@pytest.fixture
def predictions(predicted_runs, tmp_path):
    """A copy of the predictions of a run of ours."""
    return shutil.copytree(folder_of(predicted_runs, "simmim") / "predictions", tmp_path / "predictions")


def imported(source, opened, runs, settings=None, origin=ORIGIN):
    return import_results(source, opened, "fixed", settings or Evaluate(), origin, runs)


def summary(opened, predictions, changed=None):
    """A summary as nnU-Net writes it, computed here with numpy alone."""
    entries = []
    for case in opened.split.test:
        predicted = np.asarray(nib.load(predictions / f"{case.id}.nii.gz").dataobj)
        reference = np.asarray(nib.load(case.label).dataobj)
        counts = {}
        for label in (1, 2):
            ours, theirs = predicted == label, reference == label
            hits, extra, lost = ((ours & theirs).sum(), (ours & ~theirs).sum(), (~ours & theirs).sum())
            size = 2 * hits + extra + lost
            counts[str(label)] = {
                "Dice": float(2 * hits / size) if size else float("nan"),
                "TP": int(hits),
                "FP": int(extra),
                "FN": int(lost),
                "n_ref": int(theirs.sum()),
                "n_pred": int(ours.sum()),
            }
        entries.append(
            {"prediction_file": f"/elsewhere/validation/{case.id}.nii.gz", "reference_file": "", "metrics": counts}
        )
    content = {"metric_per_case": entries, "mean": {}, "foreground_mean": {"Dice": 0.5}}
    if changed:
        changed(content)
    return json.dumps(content)


def test_label_maps_of_a_run_of_ours_get_the_scores_of_that_run(predicted_runs, predictions, opened, tmp_path):
    folder = imported(predictions, opened, tmp_path / "runs")
    own = folder_of(predicted_runs, "simmim")
    assert (folder / "cases.csv").read_bytes() == (own / "cases.csv").read_bytes()
    record, ours = (json.loads((each / "record.json").read_text()) for each in (folder, own))
    assert record["metrics"] == ours["metrics"]
    assert record["data"]["fingerprint"] == ours["data"]["fingerprint"]
    assert check_run(folder) == []
    run = records.load_run(folder)
    assert run.method == "nnU-Net 2.8.1 (imported)"
    assert run.num_test_seen is None


def test_a_summary_gives_the_same_dice_and_no_distances(predictions, opened, tmp_path):
    (tmp_path / "summary.json").write_text(summary(opened, predictions))
    maps, counts = (
        records.load_run(imported(source, opened, tmp_path / "runs"))
        for source in (predictions, tmp_path / "summary.json")
    )
    np.testing.assert_allclose(counts.dice, maps.dice, atol=1e-12)
    assert np.isnan(counts.hd95).all()
    assert np.isnan(counts.surface_dice).all()
    assert np.array_equal(counts.status, maps.status)
    assert check_run(counts.folder) == []
    assert counts.imported == {"kind": "summary.json", "note": "", "files": 1}


def test_a_summary_beside_label_maps_must_have_their_dice(predictions, opened, tmp_path, capsys):
    (predictions / "summary.json").write_text(summary(opened, predictions))
    imported(predictions, opened, tmp_path / "runs")
    assert "has the same Dice" in capsys.readouterr().err
    case = opened.split.test[0]
    image = nib.load(predictions / f"{case.id}.nii.gz")
    label, _, _ = load_label(opened.task, case)
    nib.save(nib.Nifti1Image(label, image.affine), predictions / f"{case.id}.nii.gz")  # perfect all at once
    with pytest.raises(UserError, match=f"label map of {case.id} gives another Dice"):
        imported(predictions, opened, tmp_path / "runs")


def test_structures_that_one_side_lacks_follow_the_policy(predictions, opened, tmp_path):
    """Missed, made up, and absent on both sides."""

    def change(content):
        first = content["metric_per_case"][0]["metrics"]
        first["1"] |= {"TP": 0, "FP": 0, "FN": first["1"]["n_ref"], "n_pred": 0}

    (tmp_path / "summary.json").write_text(summary(opened, predictions, change))
    run = records.load_run(imported(tmp_path / "summary.json", opened, tmp_path / "runs"))
    assert (run.dice[0, 0], records.STATUS[run.status[0, 0]]) == (0, "missed")
    assert check_run(run.folder) == []


def label_1(content):
    return content["metric_per_case"][0]["metrics"]["1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["metric_per_case"].pop(), r"lacks 1 of \d+ test cases"),
        (lambda c: c["metric_per_case"][0]["metrics"]["1"].update(n_ref=3), r"has 3 reference voxels .*, here it has"),
        (
            lambda c: c["metric_per_case"][0]["metrics"].pop("2"),
            "has no label 2, which is 'posterior' here; it has '1'",
        ),
        (
            lambda c: label_1(c).update(TP=None),
            r"metric_per_case.0.metrics.1.TP = None: Input should be a valid integer",
        ),
        (lambda c: label_1(c).update(TP=float("nan")), r"TP = nan: Input should be a valid integer"),
        (lambda c: label_1(c).update(FP=3.7), r"FP = 3.7: Input should be a valid integer"),
        (lambda c: label_1(c).update(FP=True), r"FP = True: Input should be a valid integer"),
        (lambda c: label_1(c).update(FP=-1), r"FP = -1: Input should be greater than or equal to 0"),
        (lambda c: label_1(c).update(FP=10**400), r"is no summary of nnU-Net|which is right"),
        (
            lambda c: label_1(c).update(FP=10**7, n_pred=10**7),
            r"FP 10000000 .* on a grid of \d+ voxels: which is right",
        ),
        (lambda c: label_1(c).update(n_pred=1), r"n_pred 1, on a grid"),
        (lambda c: label_1(c).pop("FN"), r"FN = .*Field required"),
        (lambda c: c["metric_per_case"].append(c["metric_per_case"][0]), "has two entries of hippocampus"),
        (lambda c: c["metric_per_case"][0]["metrics"].update({"(1)": label_1(c)}), r"two entries of label \(1\)"),
        (lambda c: c["metric_per_case"][0].update(metrics=[[1, {}], [2, {}]]), "is no summary of nnU-Net"),
        (lambda c: c.pop("metric_per_case"), "is no summary of nnU-Net: metric_per_case = .* Field required"),
        (lambda c: c.update(metric_per_case=[3]), "is no summary of nnU-Net"),
    ],
)
def test_a_summary_of_something_else_is_refused(change, said, predictions, opened, tmp_path):
    (tmp_path / "summary.json").write_text(summary(opened, predictions, change))
    with pytest.raises(UserError, match=said):
        imported(tmp_path / "summary.json", opened, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_label_maps_of_something_else_are_refused(predictions, opened, tmp_path):
    case = opened.split.test[0]
    path = predictions / f"{case.id}.nii.gz"
    image = nib.load(path)
    for array, affine, said in (
        (np.zeros((3, 4, 5), np.uint8), image.affine, r"has the shape \(3, 4, 5\), .* has "),
        (
            np.asarray(image.dataobj),
            image.affine @ np.diag([2, 1, 1, 1]),
            r"affines that place voxels up to \d+ voxels apart",
        ),
        (np.full(image.shape, 7, np.uint8), image.affine, "label values 7 are unknown"),
    ):
        nib.save(nib.Nifti1Image(array, affine), path)
        with pytest.raises(UserError, match=said):
            imported(predictions, opened, tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither label maps of the test cases .* nor summary.json"):
        imported(tmp_path / "empty", opened, tmp_path / "runs")


def test_all_test_cases_are_due(predictions, hippocampus_phantom, opened, tmp_path, capsys):
    several = open_task(opened.task, hippocampus_phantom, tmp_path / "cache", "same")
    with pytest.raises(UserError, match=r"label maps of 1 of \d+ test cases; .* is missing"):
        imported(predictions, several, tmp_path / "runs")
    (image,) = predictions.iterdir()
    shutil.copy(image, predictions / "another.nii.gz")
    imported(predictions, opened, tmp_path / "runs")
    assert "not used: 1 images that are no test case" in capsys.readouterr().err


def test_a_regions_name_is_read(predictions, opened, tmp_path):
    whole = replace(opened, task=replace(opened.task, targets={"whole": (1, 2)}, overlapping=True))

    def change(content):
        for entry in content["metric_per_case"]:
            one, two = entry["metrics"].pop("1"), entry["metrics"].pop("2")
            reference = one["n_ref"] + two["n_ref"]
            entry["metrics"] = {"(1, 2)": {"TP": reference, "FP": 0, "FN": 0, "n_ref": reference}}

    (tmp_path / "summary.json").write_text(summary(opened, predictions, change))
    run = records.load_run(imported(tmp_path / "summary.json", whole, tmp_path / "runs"))
    assert run.targets == ("whole",)
    assert (run.dice == 1).all()


def test_two_files_of_one_case_and_a_folder_for_a_summary_are_refused(predictions, opened, tmp_path):
    (image,) = predictions.iterdir()
    nib.save(nib.load(image), predictions / image.name.removesuffix(".gz"))
    with pytest.raises(UserError, match="are of one case"):
        imported(predictions, opened, tmp_path / "runs")
    (predictions / image.name.removesuffix(".gz")).unlink()
    (predictions / "summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary.json is no regular file"):
        imported(predictions, opened, tmp_path / "runs")


def test_a_record_that_no_table_can_use_is_not_written(predictions, opened, tmp_path):
    with pytest.raises(UserError, match=r"seed = 9223372036854775808 cannot be used: .* 9223372036854775807"):
        imported(predictions, opened, tmp_path / "runs", origin=Origin("a", "b", 2**63))
    assert not (tmp_path / "runs").exists()


def test_imported_results_have_no_network_to_use_again(predictions, opened, tmp_path):
    folder = imported(predictions, opened, tmp_path / "runs")
    with pytest.raises(UserError, match="imported from other software: there is no network"):
        read_run(folder)
    record = json.loads((folder / "record.json").read_text())
    with pytest.raises(UserError, match="nothing to run again"):
        inspect(record, None, tmp_path / "runs", (), ())


def test_names_and_notes_make_runs_of_their_own(predictions, opened, tmp_path):
    folders = {
        imported(predictions, opened, tmp_path / "runs", origin=Origin(*about)).name
        for about in (("a", "x", 0), ("a", "y", 0), ("a", "x", 1), ("a", "x", 0, "note"), ("../../b", "x", 0))
    }
    assert len(folders) == 5
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == folders


def test_a_fold_of_a_file_is_recorded_as_runs_record_it(predictions, hippocampus_phantom, opened, tmp_path):
    """By the digest of the file, so that imported folds are pooled where the folds of runs are."""
    train, test = ([case.id for case in cases] for cases in (opened.split.train, opened.split.test))
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": train, "val": test}, {"train": test, "val": train}]))
    words = ["leaderboard", "import", predictions, "--method", "nnU-Net", "--task", "msd_hippocampus"]
    harness(*words, "--data", hippocampus_phantom, "--split", f"1/2@{path}", "--runs", tmp_path / "runs")
    (run,), _ = records.load_runs([tmp_path / "runs"])
    assert run.record["data"]["split"] == f"1/2@{digest_file(path)[:8]}"
