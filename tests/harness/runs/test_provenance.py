"""Weights that have seen test cases are recognised, through any number of trainings, names and formats."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.api.registry import Registry
from harness.config.request import Request
from harness.runs.finished import digest_request
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.system.errors import UserError
from harness.training.lineage import cache_lineage, sidecar
from harness.training.stage_files import write_weights
from tests.harness.commands import BUDGET, harness, record_of, short_run

SMALL = ("backbone.features=4,4,8,8,8", *(pair for pair in BUDGET if pair != "--set"))


@pytest.fixture
def folders(hippocampus_phantom, tmp_path):
    """Data of four cases, and a runs folder."""
    return hippocampus_phantom, tmp_path / "runs"


def planned(folders, method="scratch", split="1/2", *settings, **changes):
    """The plan of a run."""
    data, runs = folders
    fields = {"task": "msd_hippocampus", "data": data, "runs": runs, "settings": (*SMALL, *settings)} | changes
    request = Request(method=method, split=split, **fields)
    return plan(request, *locate(request))


def made(folders, split, path, method="scratch", *settings, **changes):
    """Weights with the lineage of a run, as if it had been trained: written to `path`, and known in the cache."""
    run_plan = planned(folders, method, split, *settings, **changes)
    write_weights(initial(run_plan), path, run_plan.finetuned_lineage)
    cache_lineage(path, folders[1] / "cache")
    return run_plan


def initial(run_plan):
    """Initial weights of the backbone."""
    return run_plan.plugins.new_backbone(run_plan.config, 1).state_dict()


def seen(folders, path, split="2/2", *settings, **changes):
    """The number of test cases that weights have seen, as the plan of an official run has it."""
    changes = {"allow_overlap": True} | changes
    return planned(folders, "official", split, f"method.weights={path}", *settings, **changes).num_test_seen


def renamed(path, folder):
    return shutil.copyfile(path, folder / "published.safetensors")


def resaved(path, folder):
    torch.save({"state_dict": {f"module.{key}": value for key, value in load_file(path).items()}}, folder / "a.pt")
    return folder / "a.pt"


def merged(path, folder):
    content = load_file(path)
    save_file(content | {"more.weight": next(iter(content.values())).clone()}, folder / "merged.safetensors")
    return folder / "merged.safetensors"


@pytest.mark.parametrize("change", [lambda path, _: path, renamed, resaved, merged])
def test_weights_of_another_fold_have_seen_the_test_cases(change, folders, tmp_path):
    made(folders, "1/2", tmp_path / "w.safetensors")
    path = change(tmp_path / "w.safetensors", tmp_path)
    assert seen(folders, path, "2/2") == 2
    assert seen(folders, path, "1/2") == 0
    with pytest.raises(UserError, match=r"2 of 2 test cases of .* with their labels: .*--allow-overlap"):
        seen(folders, path, "2/2", allow_overlap=False)


def test_two_generations_are_followed(folders, tmp_path):
    """A second training on other cases does not wash off what the first one has seen."""
    made(folders, "1/2", tmp_path / "a.safetensors")
    start = f"method.weights={tmp_path / 'a.safetensors'}"
    run_plan = made(folders, "2/2", tmp_path / "b.safetensors", "official", start, allow_overlap=True)
    assert [each.stage for each in run_plan.finetuned_lineage.generations] == ["finetune", "finetune"]
    shutil.rmtree(folders[1] / "cache")
    assert seen(folders, tmp_path / "b.safetensors", "2/2") == 2
    assert seen(folders, tmp_path / "b.safetensors", "1/2") == 2


def test_scans_are_recognised_under_other_names_and_headers(folders, tmp_path):
    """A corpus holds turned and rescaled copies of cases that are tested only in another fold."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, case in enumerate(planned(folders, "scratch", "2/2").test):
        image = nib.load(folders[0] / "imagesTr" / f"{case.id}.nii.gz")
        voxels = np.asarray(image.dataobj)[::-1].transpose(1, 0, 2) * 0.5 + 3
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([2, 1, 1, 1])), corpus / f"scan{number}.nii.gz")
    generic = {"mode": "generic", "corpora": (str(corpus),)}
    made(folders, "1/2", tmp_path / "w.safetensors", "simmim", **generic)
    assert seen(folders, tmp_path / "w.safetensors", "2/2") == 2


def test_pre_training_without_labels_counts_too(folders, tmp_path):
    run_plan = planned(folders, "simmim", "1/2")
    write_weights(initial(run_plan), tmp_path / "w.safetensors", run_plan.pretrained_lineage)
    assert not run_plan.pretrained_lineage.labelled
    assert seen(folders, tmp_path / "w.safetensors", "2/2") == 2
    with pytest.raises(UserError, match=r"2 of 2 test cases of 'msd_hippocampus' \([^)]*\): give"):
        seen(folders, tmp_path / "w.safetensors", "2/2", allow_overlap=False)


def test_a_control_with_labels_marks_its_scans(folders):
    assert planned(folders, "supervised").pretrained_lineage.labelled
    assert planned(folders, "untrained").pretrained_lineage.generations == ()


def test_the_lineage_of_a_pre_training_is_the_same_for_all_runs_that_share_it(folders):
    first, second = (planned(folders, "simmim", "1/2", f"finetune.lr={lr}") for lr in ("1e-3", "3e-3"))
    assert first.pretrain_key == second.pretrain_key
    assert first.pretrained_lineage.generations == second.pretrained_lineage.generations
    assert first.finetuned_lineage.generations != second.finetuned_lineage.generations


def test_validation_cases_that_settings_were_chosen_on_count(sixteen_cases, tmp_path):
    folders = sixteen_cases, tmp_path / "runs"
    tuned = planned(folders, "scratch", "fixed", tune="finetune.lr=0.001,0.003")
    plain = planned(folders, "scratch", "fixed", "finetune.validation=0")
    assert tuned.validation
    assert len(tuned.finetuned_lineage.scans) == len(tuned.train) + len(tuned.validation)
    assert len(plain.finetuned_lineage.scans) == len(plain.train)


def test_of_foreign_weights_nobody_knows(folders, tmp_path, capsys):
    foreign = tmp_path / "foreign.pt"
    torch.save(initial(planned(folders)), foreign)
    assert seen(folders, foreign) is None
    assert "what it was trained on is not known" in capsys.readouterr().err
    # A folder of scans is compared with the test cases, and a name without scans is a statement only.
    assert seen(folders, foreign, "2/2", f"method.corpus={folders[0] / 'imagesTr'}") == 2
    assert seen(folders, foreign, "2/2", "method.corpus=luna16") is None
    assert "stated: luna16" in capsys.readouterr().err
    with pytest.raises(UserError, match="corpus"):
        seen(folders, foreign, "2/2", "method.corpus=nowhere")


def test_scans_at_hand_that_are_no_test_cases_make_a_row_honest(folders, tmp_path):
    foreign, corpus, run_plan = tmp_path / "foreign.pt", tmp_path / "corpus", planned(folders)
    torch.save(initial(run_plan), foreign)
    corpus.mkdir()
    shutil.copyfile(folders[0] / "imagesTr" / f"{run_plan.train[0].id}.nii.gz", corpus / "scan.nii.gz")
    assert seen(folders, foreign, "1/2", f"method.corpus={corpus}") == 0


def test_what_is_known_is_part_of_the_identity(folders, tmp_path):
    """Without this, a run of which nobody knew would answer when the scans are at hand."""
    foreign, run_plan = tmp_path / "foreign.pt", planned(folders)
    torch.save(initial(run_plan), foreign)
    start = f"method.weights={foreign}"
    unknown = planned(folders, "official", "1/2", start)
    write_weights(torch.load(foreign, weights_only=True), tmp_path / "same.safetensors", run_plan.finetuned_lineage)
    cache_lineage(tmp_path / "same.safetensors", folders[1] / "cache")
    known = planned(folders, "official", "1/2", start)
    assert (unknown.num_test_seen, known.num_test_seen) == (None, 0)
    assert unknown.run_id != known.run_id


def corpus_weights(folders, tmp_path):
    """Weights that were pre-trained on copies of the test cases of fold 2, and the folder of the copies."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for case in planned(folders, "scratch", "2/2").test:
        shutil.copyfile(folders[0] / "imagesTr" / f"{case.id}.nii.gz", corpus / f"x{case.id}.nii.gz")
    run_plan = planned(folders, "simmim", "1/2", mode="generic", corpora=(str(corpus),))
    write_weights(initial(run_plan), tmp_path / "made.safetensors", run_plan.pretrained_lineage)
    return corpus


def test_a_statement_covers_what_it_has_and_nothing_else(folders, tmp_path):
    """Without the sidecar, the scans of the lineage are known by digest; the folder that holds them gives them back."""
    corpus = corpus_weights(folders, tmp_path)
    assert seen(folders, tmp_path / "made.safetensors") == 2
    alone = shutil.copyfile(tmp_path / "made.safetensors", tmp_path / "alone.safetensors")
    assert seen(folders, alone) == 2, "the runs folder knows the sidecar by now"
    folders = folders[0], tmp_path / "elsewhere"
    assert seen(folders, alone) is None
    assert seen(folders, alone, "2/2", f"method.corpus={corpus}") == 2
    other = tmp_path / "other"
    other.mkdir()
    case = planned(folders, "scratch", "2/2").train[0]
    shutil.copyfile(folders[0] / "imagesTr" / f"{case.id}.nii.gz", other / "scan.nii.gz")
    assert seen(folders, alone, "2/2", f"method.corpus={other}") is None


def test_scans_of_a_statement_that_cannot_be_read_leave_it_open(folders, tmp_path):
    foreign, corpus = tmp_path / "foreign.pt", tmp_path / "corpus"
    run_plan = planned(folders)
    torch.save(initial(run_plan), foreign)
    corpus.mkdir()
    shutil.copyfile(folders[0] / "imagesTr" / f"{run_plan.train[0].id}.nii.gz", corpus / "scan.nii.gz")
    (corpus / "broken.nii.gz").write_bytes(b"nothing")
    assert seen(folders, foreign, "1/2", f"method.corpus={corpus}", skip_bad=True) is None


def test_weights_that_were_used_are_recognised_too(folders, tmp_path):
    """A file with its sidecar is used once; the same tensors come back as a bare checkpoint."""
    made(folders, "1/2", tmp_path / "w.safetensors")
    shutil.rmtree(folders[1] / "cache" / "lineage")
    assert seen(folders, tmp_path / "w.safetensors", "1/2") == 0
    assert seen(folders, resaved(tmp_path / "w.safetensors", tmp_path), "2/2") == 2


def test_the_answer_to_an_earlier_request_depends_on_the_stated_scans(folders, tmp_path):
    """With a window behind the folder, too, and for a corpus that lies beside the data."""
    data, runs = folders
    foreign, corpus = tmp_path / "foreign.pt", tmp_path / "corpus"
    torch.save(initial(planned(folders)), foreign)
    corpus.mkdir()
    image = next((data / "imagesTr").iterdir())
    shutil.copyfile(image, corpus / "a.nii.gz")

    def key(spec):
        settings = (*SMALL, f"method.weights={foreign}", f"method.corpus={spec}")
        request = Request(method="official", task="msd_hippocampus", data=data, runs=runs, settings=settings)
        return digest_request(request, Registry(), [data])

    specs = [str(corpus), f"{corpus}=-1000,400", "luna16"]
    before = [key(spec) for spec in specs]
    assert [key(spec) for spec in specs] == before
    shutil.copyfile(image, corpus / "b.nii.gz")
    beside = data.parent / "LUNA16" / "subset0"
    beside.mkdir(parents=True)
    try:
        (beside / "a.mhd").write_text("ObjectType = Image")
        assert not set(before) & {key(spec) for spec in specs}
    finally:
        shutil.rmtree(beside.parent)


def test_files_of_a_tuple_count_and_files_of_another_kind_are_unknown(folders, tmp_path):
    made(folders, "1/2", tmp_path / "w.safetensors")
    plugin, table = tmp_path / "several.py", tmp_path / "table.csv"
    plugin.write_text(SEVERAL)
    table.write_text("a,b")
    found = {
        f"method.more={tmp_path / 'w.safetensors'},{tmp_path / 'w.safetensors'}": 2,
        f"method.more={table},{tmp_path / 'w.safetensors'}": 2,
        f"method.more={table},{table}": None,
    }
    for setting, number in found.items():
        run_plan = planned(folders, "several", "2/2", setting, plugins=(str(plugin),), allow_overlap=True)
        assert run_plan.num_test_seen == number
        assert set(run_plan.files) == {"more.0", "more.1"}


SEVERAL = """
from pathlib import Path
from harness import Method, Settings

class Several(Method):
    name = "several"
    trains = ()
    class Config(Settings):
        more: tuple[Path, ...]
"""


def test_the_attack_from_end_to_end(two_phantoms, tmp_path, capsys):
    """Fine-tuned on one fold with labels, and tested on it: refused, or counted in record, table, site and card."""
    data, runs, theirs = two_phantoms / "msd_hippocampus", tmp_path / "runs", tmp_path / "theirs"
    harness(*short_run("scratch", data), "--runs", runs, "--split", "1/2")
    (weights,) = runs.glob("*-scratch-*/weights.safetensors")
    assert sidecar(weights).exists()
    words = [*short_run("official", data), "--split", "2/2", "--set"]
    harness(*words, f"method.weights={weights}", "--runs", runs, status=2)
    assert "with their labels" in capsys.readouterr().err
    harness(*words, f"method.weights={weights}", "--runs", runs, "--allow-overlap")
    record = record_of(runs, "official")
    assert record["data"]["n_test_seen"] == len(record["data"]["test"]) == 2
    assert [each["stage"] for each in record["lineage"]["generations"]] == ["finetune"]
    # The weights come to another lab, without their metadata.
    torch.save(load_file(weights), tmp_path / "foreign.pt")
    harness(*words, f"method.weights={tmp_path / 'foreign.pt'}", "--runs", theirs)
    assert record_of(theirs, "official")["data"]["n_test_seen"] is None
    site, table = tmp_path / "site", tmp_path / "table.csv"
    both = ["--from", runs, "--from", theirs]
    harness("leaderboard", "build", *both, "--out", table)
    harness("leaderboard", "publish", "--from", theirs, "--out", site, "--without-scans")
    assert set(column(table, "n_test_seen")) == {"0", "2", "unknown"}
    assert "unknown" in (site / "index.html").read_text()
    harness("leaderboard", "build", *both, "--out", tmp_path / "verified.csv", "--only-verified")
    assert set(column(tmp_path / "verified.csv", "n_test_seen")) == {"0"}
    assert "leaves out 1 runs that were trained on test cases, and 1 of which nobody knows" in capsys.readouterr().err
    (folder,) = theirs.glob("*-official-*")
    harness("leaderboard", "validate", folder)
    harness("export", "--run", folder, "--format", "safetensors", "--out", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "unknown, as nobody knows" in card
    assert "foreign.pt" in card
    assert seen((data, tmp_path / "clean"), tmp_path / "exported" / "weights.safetensors", "1/2") == 2
    image = data / "imagesTr" / f"{record['data']['train'][0]}.nii.gz"
    harness("predict", "--run", folder, image, tmp_path / "out.nii.gz")
    assert "looks like a scan that these weights were trained on (correlation 1.000)" in capsys.readouterr().err
    claimed = json.loads((folder / "record.json").read_text())
    claimed["data"]["n_test_seen"] = 0
    (folder / "record.json").write_text(json.dumps(claimed))
    harness("leaderboard", "validate", folder, status=2)
    said = capsys.readouterr()
    assert "its lineage says that nobody knows" in said.out + said.err


def column(path, name):
    """The cells of a column of a CSV."""
    with path.open() as file:
        return [row[name] for row in csv.DictReader(file)]
