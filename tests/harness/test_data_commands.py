"""`harness data`, `--mode generic`, `--split` and `harness predict`, through the command line."""

import json
import re
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk  # noqa: N813

from harness.api.registry import Registry
from harness.cli.main import main
from harness.data.phantom import write_phantom
from harness.evaluation import metrics
from tests.conftest import SHARED, small

BUDGET = [
    *("--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.crop=32,32,64"),
    *("--set", "finetune.steps=2", "--set", "finetune.warmup_steps=0", "--set", "finetune.crop=32,32,64"),
    *("--set", "backbone.features=4,4,8,8,8"),
]


def harness(*words, status=0) -> None:
    assert main([str(word) for word in words]) == status


def error(capsys) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small phantoms of three tasks and a folder of unlabelled scans in three formats."""
    root = tmp_path_factory.mktemp("data")
    for name in ("msd_hippocampus", "brats", "btcv"):
        write_phantom(small(Registry().task(name)), root / name, 5, seed=0)
    write_phantom(small(Registry().task("msd_hippocampus")), root / "more", 6, seed=7)
    scans = root / "scans"
    (scans / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted((root / "more" / "imagesTr").iterdir())):
        name = ["a.nrrd", "deep/b.mhd", "c.nii.gz"][number % 3]
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(scans / name.replace(".", f"{number}.", 1)))
    return root


def run_words(data, task="msd_hippocampus", method="simmim"):
    return ["run", "--method", method, "--task", task, "--data", data / task, *BUDGET]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A runs folder with scratch and generic simmim."""
    runs = tmp_path_factory.mktemp("runs")
    harness(*run_words(data, method="scratch"), "--runs", runs, "--save-predictions")
    harness(*run_words(data), "--mode", "generic", "--corpus", data / "scans", "--runs", runs)
    return runs


def record_of(runs, method):
    (path,) = runs.glob(f"*-{method}-*/record.json")
    return json.loads(path.read_text())


def test_generic_mode_pre_trains_on_the_corpus(runs):
    record = record_of(runs, "simmim")
    assert record["mode"] == "generic"
    assert len(record["data"]["pretrain"]) == 6
    assert record["data"]["pretrain"][0].startswith("scans/")
    assert record["data"]["corpora"][0]["n"] == 6
    assert record["data"]["n_test_seen"] == 0
    assert record["data"]["overlap"] == []


def test_one_control_serves_both_modes(runs, capsys):
    harness("leaderboard", "build", "--runs", runs)
    frame = pd.read_csv(runs / "leaderboard.csv")
    average = frame[frame["target"] == "average"].set_index(["mode", "method"])
    assert {mode for mode, method in average.index if method == "scratch"} == {"generic", "task-specific"}
    (generic,) = [method for mode, method in average.index if mode == "generic" and method != "scratch"]
    assert re.fullmatch(r"simmim\{corpus=scans@[0-9a-f]{8}\}", generic)
    assert not pd.isna(average.loc[("generic", generic), "delta_dice_vs_scratch"])
    assert (frame["n_test_seen"] == 0).all()


def test_scratch_in_generic_mode_is_the_run_that_is_there(runs, data, capsys):
    harness(*run_words(data, method="scratch"), "--mode", "generic", "--corpus", data / "scans", "--runs", runs)
    assert "finished before" in capsys.readouterr().out
    assert len(list(runs.glob("*-scratch-*/record.json"))) == 1


def smuggle(data, folder, name="innocent.nii.gz"):
    """A test case of the task among the scans: another name, type, orientation and header."""
    from harness.data.splits import split_cases

    shutil.copytree(data / "scans", folder)
    task = Registry().task("msd_hippocampus")
    cases = task.cases(data / "msd_hippocampus")
    (case, *_) = split_cases(task, cases).test
    voxels = np.asarray(nib.load(case.images[0]).dataobj)
    packed = np.round(voxels / voxels.max() * 3000).astype(np.int16)[::-1].transpose(1, 2, 0)
    nib.save(nib.Nifti1Image(packed, np.diag([2.0, 2, 2, 1])), folder / name)
    return case.id


def test_a_test_case_in_the_corpus_is_refused_unless_allowed(data, tmp_path, capsys):
    case = smuggle(data, tmp_path / "corpus")
    words = [*run_words(data), "--mode", "generic", "--corpus", tmp_path / "corpus", "--runs", tmp_path / "runs"]
    harness(*words, status=2)
    message = error(capsys)
    assert f"corpus/innocent.nii.gz is test case {case}" in message
    assert "--allow-overlap" in message
    assert not list((tmp_path / "runs").glob("*/record.json"))
    harness(*words, "--allow-overlap")
    out, err = capsys.readouterr()
    assert "OVERLAP: 1 scans" in err
    assert "TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen)" in out
    record = record_of(tmp_path / "runs", "simmim")
    assert record["data"]["overlap"] == [["corpus/innocent.nii.gz", case]]
    assert pd.read_csv(tmp_path / "runs" / "leaderboard.csv")["n_test_seen"].eq(1).all()
    # Asked again without leave, the finished run does not answer.
    harness(*words, status=2)


def test_bad_scans_are_skipped_only_when_asked_and_counted(data, tmp_path, capsys):
    shutil.copytree(data / "scans", tmp_path / "corpus")
    (tmp_path / "corpus" / "bad.nii.gz").write_bytes(b"no image")
    words = [*run_words(data), "--mode", "generic", "--corpus", tmp_path / "corpus", "--runs", tmp_path / "runs"]
    harness(*words, status=2)
    message = error(capsys)
    assert "bad.nii.gz cannot be read" in message
    assert "--skip-bad" in message
    harness(*words, "--skip-bad")
    assert "skipped: " in capsys.readouterr().err
    (corpus,) = record_of(tmp_path / "runs", "simmim")["data"]["corpora"]
    assert corpus["n"] == 6
    assert list(corpus["skipped"]) == ["corpus/bad.nii.gz"]
    (tmp_path / "corpus" / "bad.nii.gz").unlink()
    harness(*words)
    # The same pre-training, but a record of its own: nothing was skipped.
    assert "pre-training found" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*-simmim-*/record.json"))) == 2


def test_one_channel_serves_four_and_says_so(data, tmp_path, capsys):
    """As the paper does: pre-trained on CT, fine-tuned on BraTS' four modalities."""
    words = [*run_words(data, "brats"), "--mode", "generic", "--corpus", data / "scans", "--runs", tmp_path]
    harness(*words)
    assert re.search(r"\(\d+ \(.*\) repeated from one channel\)", capsys.readouterr().err)
    transfer = record_of(tmp_path, "simmim")["transfer"]
    assert transfer["inflated"]
    assert transfer["skipped"] == []
    assert transfer["encoder_fraction"] == 1


def test_named_corpora_without_data_are_phantoms(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.data.datasets.CORPUS_CASES", 2)
    monkeypatch.setattr("harness.data.phantom.CORPUS_SIZE", (30, 30, 30))
    words = ["run", "--method", "simmim", "--task", "msd_spleen", "--mode", "generic", "--corpus", "luna16=-900,300"]
    harness(*words, "--corpus", "flare21", "--runs", tmp_path, *BUDGET, "--set", "task.spacing=4,4,4")
    record = record_of(tmp_path, "simmim")
    assert record["data"]["source"] == "phantom"
    assert [each["name"] for each in record["data"]["corpora"]] == ["luna16", "flare21"]
    assert record["data"]["corpora"][0]["normalisation"] == "Window(low=-900.0, high=300.0)"
    assert "PHANTOM DATA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mode", "generic"], "--mode generic needs what to pre-train on"),
        (["--corpus", "flare21"], "--corpus is for --mode generic"),
        (["--mode", "generic", "--corpus", "flare22"], "did you mean 'flare21'"),
        (["--mode", "generic", "--corpus", "./nowhere"], "does not exist"),
        (["--mode", "generic", "--corpus", "luna16"], "corpus 'luna16': not found"),
        (["--mode", "generic", "--corpus", "luna16=400,-900"], "give its lower end first"),
        (["--mode", "generic", "--corpus", f"luna16=0,0.{'0' * 44}1"], "is empty or too wide"),
        (["--mode", "generic", "--corpus", "a" * 5000], "unknown corpus"),
        (["--mode", "special"], "invalid choice"),
        (["--split", "6/5"], "give fixed (80/20), K/N"),
        (["--split", "1/9"], "at most as many folds"),
        (["--set", "task.window=3,1"], "lower end of the window first"),
        (["--set", "task.window=0,1e-40"], "tell them apart"),
        (["--set", "task.window=-1e308,1e308"], "tell them apart"),
        (["--set", "task.window=1e10,10000000001"], "tell them apart"),
        (["--set", "task.spacing=0,1,1"], "more than 0 mm"),
        (["--set", "task.spacing=1e-200,1,1"], "within 0.0001 to 10000 mm"),
        (["--set", "task.spacing=1,1,1e300"], "within 0.0001 to 10000 mm"),
        (["--set", "task.crop=3"], "unknown setting in section 'task'"),
    ],
)
def test_wrong_words(words, says, data, tmp_path, capsys):
    harness(*run_words(data), "--runs", tmp_path, *words, status=2)
    assert says in error(capsys)


def test_a_folder_of_one_kind_twice_is_refused(data, tmp_path, capsys):
    twice = ["--corpus", data / "scans", "--corpus", data / "scans"]
    harness(*run_words(data), "--mode", "generic", *twice, "--runs", tmp_path, status=2)
    assert "two corpora are named 'scans'" in error(capsys)


def test_a_task_by_its_folder_is_the_named_task(runs, data, capsys):
    words = run_words(data, method="scratch")
    words[words.index("--task") + 1] = data / "msd_hippocampus"
    harness(*words, "--runs", runs)
    assert "finished before" in capsys.readouterr().out
    place = words.index("--data")
    harness(*words[:place], *words[place + 2 :], "--runs", runs)
    assert "finished before" in capsys.readouterr().out


def test_folds_and_plumbing_keep_tables_of_their_own(data, tmp_path, capsys):
    for how in ("1/5", "2/5", "same"):
        harness(*run_words(data, method="scratch"), "--runs", tmp_path, "--split", how)
    out, err = capsys.readouterr()
    assert "PLUMBING CHECK" in err
    assert "TEST CASES WERE TRAINED" in out
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    labels = frame["preset"].unique()
    assert [re.search(r"split=[^,}]+", label)[0] for label in sorted(labels)] == [
        "split=1/5",
        "split=2/5",
        "split=same",
    ]
    same = frame[frame["preset"].str.contains("split=same") & (frame["target"] == "average")].iloc[0]
    assert same["n_test_seen"] == same["n_cases"] == 5
    tested = [json.loads(path.read_text())["data"]["test"] for path in tmp_path.glob("*/record.json")]
    assert sorted(map(len, tested)) == [1, 1, 5]


def test_absent_organs_are_counted_not_averaged(data, tmp_path, capsys, monkeypatch):
    """A network that predicts nothing, or everything right where it is: an absent organ has no Dice and is counted."""
    root = tmp_path / "data"
    shutil.copytree(data / "btcv", root)
    task = Registry().task("btcv")
    for case in task.cases(root):
        image = nib.load(case.label)
        label = np.asarray(image.dataobj).copy()
        label[label == 5] = 0
        nib.save(nib.Nifti1Image(label, image.affine), case.label)
    harness("data", "check", "btcv", "--data", root, "--runs", tmp_path / "runs")
    assert "no esophagus" in capsys.readouterr().out

    def nothing(task, backbone, image, trained, settings):
        found = np.zeros((task.num_outputs, *image.shape[1:]), np.float32)
        found[0] = 1
        return found

    monkeypatch.setattr("harness.evaluation.evaluate.predict", nothing)
    harness("run", "--method", "scratch", "--task", "btcv", "--data", root, *BUDGET, "--runs", tmp_path / "runs")
    metrics = record_of(tmp_path / "runs", "scratch")["metrics"]
    assert metrics["esophagus"] == {
        "dice": None,
        "hd95": None,
        "surface_dice": None,
        "n_cases": 0,
        "n_missed": 0,
        "n_spurious": 0,
        "n_empty": 1,
    }
    assert metrics["liver"]["n_missed"] == 1
    assert metrics["average"]["dice"] == 0


def test_the_real_btcv_like_case_goes_all_the_way(tmp_path, capsys):
    root = SHARED / "btcv_like"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    harness("data", "check", "btcv", "--data", root, "--runs", tmp_path)
    assert "no esophagus" in capsys.readouterr().out
    harness("data", "prepare", "btcv", "--data", root, "--runs", tmp_path)
    words = ["run", "--method", "simmim", "--task", "btcv", "--data", root, "--split", "same", "--runs", tmp_path]
    harness(*words, *BUDGET, "--set", "task.spacing=5,5,5")
    assert "TEST CASES WERE TRAINED" in capsys.readouterr().out
    record = record_of(tmp_path, "simmim")
    assert record["data"]["n_test_seen"] == 1
    assert record["metrics"]["esophagus"]["n_empty"] + record["metrics"]["esophagus"]["n_spurious"] == 1


def test_two_windows_of_one_corpus_are_two_methods(data, tmp_path, capsys):
    for window in ("0,500", "0,900"):
        harness(*run_words(data), "--mode", "generic", "--corpus", f"{data / 'scans'}={window}", "--runs", tmp_path)
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert len(frame["method"].unique()) == 2
    assert (frame["n_seeds"] == 1).all()


def test_saved_predictions_are_what_was_scored(runs, data):

    (folder,) = runs.glob("*-scratch-*")
    task = Registry().task("msd_hippocampus")
    cases = {case.id: case for case in task.cases(data / "msd_hippocampus")}
    rows = pd.read_csv(folder / "cases.csv")
    written = sorted((folder / "predictions").iterdir())
    assert {path.name.removesuffix(".nii.gz") for path in written} == set(rows["case"])
    for path in written:
        case = cases[path.name.removesuffix(".nii.gz")]
        predicted, reference = nib.load(path), nib.load(case.label)
        assert predicted.shape == reference.shape
        assert np.allclose(predicted.affine, reference.affine)
        mine, theirs = (task.masks(np.asarray(image.dataobj)) for image in (predicted, reference))
        for target, scored in zip(task.targets, metrics.score(mine, theirs, (1, 1, 1)), strict=True):
            row = rows[(rows["case"] == case.id) & (rows["target"] == target)].iloc[0]
            assert scored.dice == pytest.approx(row["dice"], abs=1e-6)


def test_predictions_can_be_asked_for_later(runs, data, capsys):
    words = [*run_words(data), "--mode", "generic", "--corpus", data / "scans", "--runs", runs]
    (folder,) = runs.glob("*-simmim-*")
    before = (folder / "cases.csv").read_bytes()
    assert not (folder / "predictions").exists()
    harness(*words, "--save-predictions")
    assert list((folder / "predictions").iterdir())
    assert (folder / "cases.csv").read_bytes() == before


def test_predict_gives_what_was_scored_for_a_file_and_a_folder(runs, data, tmp_path, capsys):
    (folder,) = runs.glob("*-scratch-*")
    (saved, *_) = sorted((folder / "predictions").iterdir())
    source = data / "msd_hippocampus" / "imagesTr" / saved.name
    harness("predict", "--run", folder.name[:-3], source, tmp_path / "out.nii.gz", "--runs", runs)
    assert capsys.readouterr().out.strip().endswith("out.nii.gz")
    mine, theirs = nib.load(tmp_path / "out.nii.gz"), nib.load(saved)
    assert np.array_equal(np.asarray(mine.dataobj), np.asarray(theirs.dataobj))
    assert np.allclose(mine.affine, theirs.affine)
    harness("predict", "--run", folder, data / "scans", tmp_path / "many")
    assert len(list((tmp_path / "many").rglob("*.nii.gz"))) == 6
    assert (tmp_path / "many" / "deep").is_dir()


@pytest.mark.parametrize("form", ["files", "nnunet", "names", "one 4D file"])
def test_predict_takes_several_modalities(form, data, tmp_path, capsys):
    runs = tmp_path / "runs"
    harness(*run_words(data, "brats", "scratch"), "--runs", runs, "--save-predictions")
    (folder,) = runs.glob("*-scratch-*")
    (saved, *_) = sorted((folder / "predictions").iterdir())
    name = saved.name.removesuffix(".nii.gz")
    task = Registry().task("brats")
    (case,) = [case for case in task.cases(data / "brats") if case.id == name]
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    if form == "files":
        harness("predict", "--run", folder, *case.images, out / f"{name}.nii.gz")
    else:
        if form == "one 4D file":
            stacked = np.stack([np.asarray(nib.load(path).dataobj) for path in case.images], axis=-1)
            nib.save(nib.Nifti1Image(stacked, nib.load(case.images[0]).affine), new / f"{name}.nii.gz")
        for place, path in enumerate(case.images if form != "one 4D file" else ()):
            suffix = f"{place:04d}" if form == "nnunet" else task.channels[place].upper()
            shutil.copyfile(path, new / f"{name}_{suffix}.nii.gz")
        harness("predict", "--run", folder, new, out)
    found = np.asarray(nib.load(out / f"{name}.nii.gz").dataobj)
    assert np.array_equal(found, np.asarray(nib.load(saved).dataobj))
    assert set(np.unique(found)) <= {0, 1, 2, 4}


def test_predict_words(runs, data, tmp_path, capsys):
    (folder,) = runs.glob("*-scratch-*")
    image = next((data / "msd_hippocampus" / "imagesTr").iterdir())
    copied = tmp_path / "in.nii.gz"
    shutil.copyfile(image, copied)
    (tmp_path / "empty").mkdir()
    for words, says in [
        ([folder, copied], "give IN ... OUT"),
        ([folder, copied, tmp_path / "out.png"], "written as .nii.gz or .nii"),
        ([folder, copied, copied], "would be overwritten"),
        ([folder, copied, copied, tmp_path / "o.nii.gz"], "2 channels, 'msd_hippocampus' has 1"),
        ([folder, tmp_path / "no.nii.gz", tmp_path / "o.nii.gz"], "is missing"),
        ([folder, tmp_path / "empty", tmp_path / "o"], "holds no image"),
        ([tmp_path / "empty", copied, tmp_path / "o.nii.gz"], "unknown run"),
    ]:
        harness("predict", "--run", words[0], *words[1:], "--runs", runs, status=2)
        assert says in error(capsys)
    assert np.array_equal(nib.load(copied).get_fdata(), nib.load(image).get_fdata())


def test_prepare_verifies_and_mends(data, tmp_path, capsys):
    words = ("data", "prepare", "msd_hippocampus", "--data", data / "msd_hippocampus", "--runs", tmp_path)
    harness(*words)
    (first, second, *_) = sorted((tmp_path / "cache" / "prepared").rglob("*.image.npy"))
    before = first.read_bytes(), second.read_bytes()
    first.write_bytes(before[0][:-2] + b"xx")  # as long as it was
    second.write_bytes(before[1][:100])
    harness(*words)
    assert "2 volumes in" in capsys.readouterr().err
    assert (first.read_bytes(), second.read_bytes()) == before
    harness(*words)
    assert "not as they were written" not in capsys.readouterr().err


def test_a_full_disk_is_known_before_anything_is_written(data, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("harness.data.volumes.shutil.disk_usage", lambda path: usage._replace(free=1000))
    harness("data", "prepare", "btcv", "--data", data / "btcv", "--runs", tmp_path, status=2)
    assert re.search(r"preparing 5 cases of 'btcv' takes up to 0\.\d\d GiB in .*, 0\.00 GiB are free", error(capsys))
    assert not list((tmp_path / "cache" / "prepared").rglob("*.npy"))


def test_check_of_a_corpus_and_of_a_folder(data, tmp_path, capsys):
    harness("data", "check", data / "scans", "--runs", tmp_path)
    assert "6 cases; 0 with a problem" in capsys.readouterr().out
    harness("data", "phantom", "luna16", "--out", tmp_path / "LUNA16", "--cases", "2")
    harness("data", "check", "luna16", "--data", tmp_path, "--runs", tmp_path)
    assert "2 cases; 0 with a problem" in capsys.readouterr().out


NASTY = '<script>alert("x")</script>'


def test_the_report_escapes_names_and_stands_alone(data, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data / "msd_hippocampus", root)
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    entry = content["training"][0]
    # "/" cannot be in a file's name; the opening tag is what matters.
    name = NASTY.replace("/", "")
    for kind in ("image", "label"):
        new = entry[kind].rpartition("/")[0] + f"/{name}.nii.gz"
        (root / entry[kind]).rename(root / new)
        entry[kind] = new
    path.write_text(json.dumps(content))
    (root / content["training"][1]["image"]).write_bytes(b"")
    report = tmp_path / "report.html"
    harness("data", "check", "msd_hippocampus", "--data", root, "--report", report, "--runs", tmp_path, status=2)
    page = report.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;script&gt;" in page
    assert {found[:5] for found in re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", page)} == {"data:"}
    assert page.count("data:image/png;base64,") == 4
    assert "files that cannot be used" in page


def test_the_report_opens_in_a_browser(data, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    harness("data", "check", "btcv", "--data", data / "btcv", "--report", tmp_path / "r.html", "--runs", tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", (tmp_path / "r.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "<h2>Cases</h2>" in done.stdout
    assert done.stdout.count("<img ") == 5
