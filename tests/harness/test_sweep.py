"""Sweeps: what a file expands to, what is shared, what fails, and that the rest goes on."""

import json
from pathlib import Path

import pytest

from harness import UserError
from harness.cli.main import main
from harness.config.request import Request
from harness.sweeps.cells import SweepCell, read, sort_out
from harness.sweeps.job import Job
from harness.sweeps.live_table import progress_of
from harness.sweeps.local import Local
from harness.sweeps.schedule import ATTEMPTS, execute, outcome_of
from harness.system.status_file import Ending, read_ending

TINY = """
[defaults]
task = "msd_hippocampus"
[defaults.settings]
"pretrain.steps" = 2
"pretrain.warmup_steps" = 0
"pretrain.crop" = [32, 32, 64]
"finetune.steps" = 2
"finetune.warmup_steps" = 0
"finetune.crop" = [32, 32, 64]
"backbone.features" = [4, 4, 8, 8, 8]
"""


def cells(tmp_path, text, **base) -> list[SweepCell]:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return read(path, Request(method="", task="", **base))


def test_corpora_and_splits_are_axes(tmp_path):
    found = cells(
        tmp_path,
        """
        [[matrix]]
        method = "hybridmim"
        task = "btcv"
        mode = "generic"
        split = ["1/2", "2/2"]
        corpus = ["flare21", ["flare21", "atm22"], ["./scans"]]
        """,
    )
    requests = [cell.request for cell in found]
    assert [(r.split, r.corpora) for r in requests] == [
        (split, corpora)
        for split in ("1/2", "2/2")
        for corpora in (("flare21",), ("flare21", "atm22"), (str(tmp_path / "scans"),))
    ]
    assert str(found[1]) == "hybridmim unet btcv demo seed 0 split 1/2 on flare21+atm22"
    with pytest.raises(UserError, match="give names or folders"):
        cells(tmp_path, '[[matrix]]\nmethod = "mae"\ntask = "btcv"\ncorpus = [3]')


def test_a_matrix_is_the_product_of_its_axes(tmp_path):
    found = cells(
        tmp_path,
        """
        [defaults]
        task = "brats"
        seed = [0, 1]
        settings = { "finetune.steps" = 5 }
        [[matrix]]
        method = ["scratch", "simmim"]
        label_fraction = [0.1, 1.0]
        [[matrix]]
        method = "hybridmim"
        backbone = "swinunetr"
        settings = [{ "method.patch" = [16, 16, 8] }, { "finetune.steps" = 7 }]
        """,
    )
    assert len(found) == 2 * 2 * 2 + 2 * 2
    requests = [cell.request for cell in found]
    assert {(r.method, r.seed, r.label_fraction) for r in requests[:8]} == {
        (m, s, f) for m in ("scratch", "simmim") for s in (0, 1) for f in (0.1, 1.0)
    }
    assert {r.settings for r in requests[8:]} == {
        ("finetune.steps=5", "method.patch=16,16,8"),
        ("finetune.steps=7",),
    }
    assert {r.backbone for r in requests[8:]} == {"swinunetr"}


def test_a_cell_that_comes_up_twice_is_run_once(tmp_path):
    text = '[defaults]\ntask = "brats"\n[[matrix]]\nmethod = ["scratch", "scratch"]\n[[matrix]]\nmethod = "scratch"\n'
    assert len(cells(tmp_path, text)) == 1


def test_data_is_relative_to_the_file_or_a_phantom(tmp_path):
    text = '[[matrix]]\nmethod = "scratch"\ntask = "brats"\n{}'
    assert cells(tmp_path, text.format('data = "d"'))[0].request.data == tmp_path / "d"
    assert cells(tmp_path, text.format('data = "phantom"'), data=Path("x"))[0].request.data is None
    assert cells(tmp_path, text.format(""), data=Path("x"))[0].request.data == Path("x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[matrix]", "cannot be read as a sweep file"),
        ('[matrx]\nmethod = "scratch"', "did you mean 'matrix'"),
        ('[[matrix]]\nmethods = "scratch"', "did you mean 'method'"),
        ('[[matrix]]\nmethod = 3\ntask = "brats"', "method = 3 is not a str"),
        ('[[matrix]]\nmethod = "scratch"', "task = '' is not a str"),
        ('[[matrix]]\nmethod = "scratch"\ntask = "brats"\nseed = "a"', "seed = 'a' is not a int"),
        ('[[matrix]]\nmethod = "scratch"\ntask = "brats"\nsettings = "a"', "settings are tables"),
        ('[[matrix]]\nmethod = "scratch"\ntask = "brats"\ndata = 3', "data = 3 is not a folder"),
        ('[[matrix]]\nmethod = "scratch"\ntask = "brats"\ndata = "~nobody_here/x"', "home directory"),
        ("a = " + "[" * 5000, "cannot be read as a sweep file"),
        ('matrix = "scratch"', r"\[\[matrix\]\] a list of tables"),
    ],
)
def test_wrong_files_are_answered_in_words(text, says, tmp_path):
    with pytest.raises(UserError, match=says):
        cells(tmp_path, text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One runs folder for all shipped sweeps: the phantoms that they ask for are written once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("sweeps/*.toml")), ids=lambda path: path.stem)
def test_shipped_sweeps_can_run(path, runs):
    """Every cell resolves against its task, with the phantoms' case lists."""
    found = read(path, Request(method="", task="", data=None, runs=runs))
    assert found
    # One per method and backbone: plugins, settings and fit are what a typing error would break.
    once = {(c.request.method, c.request.backbone, c.request.settings): c for c in found if c.request.preset == "demo"}
    todo, known = sort_out(list(once.values())[:12], runs)
    assert not [outcome.problem for outcome in known]
    assert len(todo) == min(12, len(once))


def test_table_4_switches_the_terms_of_the_paper():
    path = Path(__file__).parents[2] / "sweeps" / "hybridmim_table4.toml"
    found = [c.request for c in read(path, Request(method="", task="")) if c.request.backbone == "unet"]
    off = [sorted(pair.split(".")[1].split("=")[0] for pair in r.settings) for r in found if r.method == "hybridmim"]
    names = ["number", "location", "consistency", "contrastive"]
    assert off == [sorted(names[number:]) for number in range(5)]


def test_a_sweep_runs_shares_pretraining_lists_failures_and_skips_what_is_finished(
    tmp_path, hippocampus_phantom, capsys
):
    path = tmp_path / "mine.toml"
    path.write_text(
        TINY
        + '[[matrix]]\nmethod = "scratch"\n'
        + '[[matrix]]\nmethod = "simmim"\nlabel_fraction = [0.5, 1.0]\n'
        + '[[matrix]]\nmethod = "simmim"\nsettings = { "method.patch" = 12 }\n'
    )
    words = ["sweep", str(path), "--data", str(hippocampus_phantom), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    assert main([*words, "--dry-run"]) == 2
    assert "3 to run, 1 that cannot run" in capsys.readouterr().out
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "does not divide the crop" in err
    assert "leaderboard of this sweep" in out
    records = sorted((tmp_path / "runs").glob("*/record.json"))
    assert len(records) == 3
    # Both label fractions start from one pre-training.
    assert len(list((tmp_path / "runs" / "cache" / "pretrain").iterdir())) == 1
    fractions = [json.loads(p.read_text())["label_fraction"] for p in records if "-simmim-" in str(p)]
    assert sorted(fractions) == [0.5, 1.0]
    times = [p.stat().st_mtime_ns for p in records]
    assert main(words) == 2
    assert "3 finished before, 0 to run, 1 that cannot run" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in records] == times


DYING = """
import os
from harness import Method

class Dying(Method):
    \"\"\"Takes its process with it.\"\"\"
    name = "dying"
    def forward(self, batch):
        os._exit(9)
"""


def outcomes_of(todo, folder, jobs=2):
    return {o.cell.request.method: o for o in execute(todo, Local(folder, 1, jobs)) if o is not None}


def planned(tmp_path, hippocampus_phantom, text, plugin, **more):
    path = tmp_path / "plugin.py"
    path.write_text(plugin)
    given = {"data": hippocampus_phantom, "runs": tmp_path / "runs", "plugins": (str(path),)}
    return sort_out(cells(tmp_path, TINY + text, **given), tmp_path / "notes", **more)


def test_a_process_that_dies_by_itself_takes_only_its_own_cell(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = ["dying", "scratch"]\n'
    todo, known = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert not known
    outcomes = outcomes_of(todo, tmp_path / "notes")
    assert "its process died" in outcomes["dying"].problem
    assert (outcomes["scratch"].folder / "record.json").exists()
    # What failed is listed with its reason, and run again on request.
    todo, known = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert not todo
    assert {outcome.before for outcome in known} == {True, False}
    todo, _ = planned(tmp_path, hippocampus_phantom, text, DYING, retry=True)
    assert [each.cell.request.method for each in todo] == ["dying"]


KILLED = """
import os, signal
from pathlib import Path
from harness import Method, UserError

class Killed(Method):
    \"\"\"Is killed from outside, once in pre-training.\"\"\"
    name = "killed"

    def forward(self, batch):
        mark = Path("MARK")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return {"zero": features.square().mean()}

class Refuses(Killed):
    \"\"\"Says no in the middle of pre-training.\"\"\"
    name = "refuses"

    def forward(self, batch):
        raise UserError("no, thank you")
"""


def test_what_is_killed_from_outside_goes_on_and_shares_its_pretraining(tmp_path, hippocampus_phantom, capsys):
    text = '[[matrix]]\nmethod = "killed"\nlabel_fraction = [0.5, 1.0]\n'
    todo, _ = planned(tmp_path, hippocampus_phantom, text, KILLED.replace("MARK", str(tmp_path / "mark")))
    found = [outcome for outcome in execute(todo, Local(tmp_path / "notes", 1, 2)) if outcome is not None]
    assert [bool(outcome.problem) for outcome in found] == [False, False]
    assert "its process died by signal 9 (out of memory?)" in capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "cache" / "pretrain").iterdir())) == 1
    logs = "".join(path.read_text() for path in (tmp_path / "notes").glob("*.log"))
    assert logs.count("pre-training found in") == 2


def test_a_pretraining_that_fails_fails_its_cells_with_its_reason(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = "refuses"\nlabel_fraction = [0.5, 1.0]\n'
    todo, _ = planned(tmp_path, hippocampus_phantom, text, KILLED)
    found = [outcome for outcome in execute(todo, Local(tmp_path / "notes", 1, 1)) if outcome is not None]
    assert [outcome.problem for outcome in found] == ["its pre-training: no, thank you"] * 2


def test_gpus_are_handed_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    started = []

    class Started:
        def __init__(self, words, env, **rest):
            started.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self):
            return None

    monkeypatch.setattr("harness.sweeps.local.subprocess.Popen", Started)
    launcher = Local(tmp_path, 2, 2)

    class Job:
        name = "job"

        def words(self, processes):
            return []

    launcher.submit([Job(), Job()])
    assert started == ["3,5", "7,3"]
    assert launcher.room() == 0


def test_the_live_table_knows_where_a_cell_is(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = "simmim"\n'
    (each,), _ = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert progress_of(each) == "waiting"
    each.pretrain.mkdir(parents=True)
    (each.pretrain / "history.jsonl").write_text('{"stage": "pretrain", "step": 1}\n{"stage": "pre')
    assert progress_of(each) == "pre-training, step 1 of 2"
    (each.pretrain / "stage.json").write_text("{}")
    each.folder.mkdir()
    (each.folder / "history.jsonl").write_text('{"stage": "pretrain", "step": 2}\n{"stage": "finetune", "step": 2}\n')
    assert progress_of(each) == "fine-tuning, step 2 of 2"
    (each.folder / "finetune.json").write_text("{}")
    assert progress_of(each) == "evaluating, 0 of 1 cases"


@pytest.mark.parametrize(
    ("status", "ending", "again", "says"),
    [
        (0, Ending(0, ""), False, ""),
        (2, Ending(2, "no such method"), False, "no such method"),
        (1, Ending(1, "KeyError: 'x'"), False, "KeyError: 'x'; see"),
        (1, Ending(75, "stopped by SIGTERM, pretrain step 2 of 40"), True, "stopped by SIGTERM, pretrain step 2 of 40"),
        (-9, None, True, "its process died by signal 9"),
        (None, None, True, "its process died"),
        (0, None, False, "it ended with status 0 before its end"),
        # What a log says decides nothing.
        (-9, Ending(0, ""), False, ""),
    ],
)
def test_how_a_job_ended_decides_whether_it_is_started_again(status, ending, again, says, tmp_path):
    log = tmp_path / "log"
    log.write_text("harness: error: a line that somebody printed\n")
    following, problem = outcome_of(Job(None), status, ending, log)
    assert (following is not None) == again
    assert problem.startswith(says)
    assert bool(problem) == bool(says)
    if again:
        assert following.attempt == 1
        assert outcome_of(Job(None, attempt=ATTEMPTS - 1), status, ending, log)[0] is None


def test_a_command_writes_how_it_ended_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    path = tmp_path / "status.json"
    monkeypatch.setenv("HARNESS_STATUS_FILE", str(path))
    assert main(["list", "presets"]) == 0
    assert read_ending(path) == Ending(0, "")
    assert main(["list", "presetz"]) == 2
    assert read_ending(path).message.startswith("unknown kind to list 'presetz'")
    monkeypatch.setattr("harness.config.presets.preset_names", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list", "presets"])
    assert read_ending(path) == Ending(1, "ZeroDivisionError: division by zero")
    path.write_text("{}")
    assert read_ending(path) is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--slurm", "partition=gpu"], "is for --launcher slurm"),
        (["--launcher", "slurm", "--slurm", "partition"], "is not of the form KEY=VALUE"),
    ],
)
def test_wrong_launchers_are_answered_in_words(more, says, tmp_path, hippocampus_phantom, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(TINY + '[[matrix]]\nmethod = "scratch"\n')
    words = ["sweep", path, "--data", hippocampus_phantom, "--runs", tmp_path / "runs", *more]
    assert main([str(word) for word in words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"seed = {'1' * 5000}", "cannot be read as a sweep file"),
        (f"seed = 0x{'f' * 5000}", "more than 63 bits"),
        (f'settings = {{ "pretrain.steps" = 0x{"f" * 5000} }}', "is no text, number"),
        ("settings = { a = { b = 1 } }", "is no text, number"),
        (f"label_fraction = -1{'0' * 400}", "more than 63 bits"),
        (f"seed = {list(range(200))}\nlabel_fraction = {[n / 999 for n in range(1, 900)]}", "a matrix of 179800 runs"),
    ],
)
def test_hostile_files_are_answered_in_words(text, says, tmp_path):
    with pytest.raises(UserError, match=says):
        cells(tmp_path, f'[[matrix]]\nmethod = "scratch"\ntask = "brats"\n{text}')
