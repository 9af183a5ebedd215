"""Sweeps: what a file expands to, what is shared, what fails, and that the rest goes on."""

import json
from pathlib import Path

import pytest

from harness import UserError
from harness.cli import main
from harness.run import Request
from harness.sweep import Cell, execute, read, sort_out

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


def cells(tmp_path, text, **base) -> list[Cell]:
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
    todo, known = sort_out(list(once.values())[:12])
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


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_dies_takes_only_its_own_cell(jobs, tmp_path, hippocampus_phantom):
    plugin = tmp_path / "dying.py"
    plugin.write_text(DYING)
    text = TINY + '[[matrix]]\nmethod = ["dying", "scratch"]\n'
    todo, known = sort_out(
        cells(tmp_path, text, data=hippocampus_phantom, runs=tmp_path / "runs", plugins=(str(plugin),))
    )
    assert not known
    outcomes = {outcome.cell.request.method: outcome for outcome in execute(todo, jobs, tmp_path / "logs")}
    assert "its process died" in outcomes["dying"].problem
    assert (outcomes["scratch"].folder / "record.json").exists()
