"""What a sweep's file expands to; wrong files are answered in words."""

from collections import Counter
from pathlib import Path

import pytest

from harness import UserError
from harness.config.request import Request
from harness.config.resolve import resolve
from harness.sweeps.cells import read, select_cells
from tests.harness.sweep_files import cells_of


def test_corpora_and_splits_are_axes(tmp_path):
    found = cells_of(
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
        cells_of(tmp_path, '[[matrix]]\nmethod = "mae"\ntask = "btcv"\ncorpus = [3]')


def test_a_matrix_is_the_product_of_its_axes(tmp_path):
    found = cells_of(
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
    assert len(cells_of(tmp_path, text)) == 1


def test_data_is_relative_to_the_file_or_a_phantom(tmp_path):
    text = '[[matrix]]\nmethod = "scratch"\ntask = "brats"\n{}'
    assert cells_of(tmp_path, text.format('data = "d"'))[0].request.data == tmp_path / "d"
    assert cells_of(tmp_path, text.format('data = "phantom"'), data=Path("x"))[0].request.data is None
    assert cells_of(tmp_path, text.format(""), data=Path("x"))[0].request.data == Path("x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[matrix]", "cannot be read as a sweep file"),
        ('[matrx]\nmethod = "scratch"', "did you mean 'matrix'"),
        ('[[matrix]]\nmethods = "scratch"', "did you mean 'method'"),
        ('[[matrix]]\nmethod = 3\ntask = "brats"', "method = 3 is not a str that can be used"),
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
        cells_of(tmp_path, text)


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
        cells_of(tmp_path, f'[[matrix]]\nmethod = "scratch"\ntask = "brats"\n{text}')


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One runs folder for all shipped sweeps: the phantoms that they ask for are written once."""
    return tmp_path_factory.mktemp("runs")


TRIED_AS_DEMO = ("hybridmim_table1", "hybridmim_table2", "hybridmim_table3", "hybridmim_table4", "hybridmim_figure4")
TRIED_AS_DEMO = (*TRIED_AS_DEMO, "hippocampus_small", "nnunet_hippocampus")
# Table 4 has cells of the same kinds.
SLOW = ("hybridmim_table1", "hybridmim_table2", "hybridmim_table3", "hybridmim_table4", "hybridmim_figure4")
PROFILED = ("hybridmim_figure5", "hybridmim_figure6")  # their cells are steps to profile, of sizes that no phantom has


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW))
        for path in sorted(Path(__file__).parents[3].glob("sweeps/*.toml"))
    ],
    ids=lambda path: path.stem,
)
def test_shipped_sweeps_can_run(path, runs):
    """Every cell resolves against its task, with the phantoms' case lists."""
    tried = "demo" if path.stem in TRIED_AS_DEMO else ""
    found = read(path, Request(method="", task="", data=None, runs=runs), preset=tried)
    assert found
    # One per method and backbone: plugins, settings and fit are what a typing error would break.
    small = [c for c in found if c.request.preset in ("demo", "fewshot") and c.request.shots <= 4]
    once = {(c.request.method, c.request.backbone, c.request.settings): c for c in small}
    assert once or path.stem in PROFILED
    todo, known = select_cells(list(once.values())[:12], runs)
    assert not [outcome.problem for outcome in known]
    assert len(todo) == min(12, len(once))


def shipped(name):
    """The requests of a shipped sweep."""
    path = Path(__file__).parents[3] / "sweeps" / f"{name}.toml"
    return [cell.request for cell in read(path, Request(method="", task=""))]


def test_another_preset_replaces_that_of_the_file():
    path = Path(__file__).parents[3] / "sweeps" / "hybridmim_table4.toml"
    assert {cell.request.preset for cell in read(path, Request(method="", task=""))} == {"paper"}
    assert {cell.request.preset for cell in read(path, Request(method="", task=""), preset="small")} == {"small"}


@pytest.mark.parametrize(
    ("name", "tasks", "generic", "specific"),
    [
        ("hybridmim_table1", {"btcv"}, 5, 3),
        ("hybridmim_table2", {"msd_liver", "msd_spleen"}, 5, 3),
        ("hybridmim_table3", {"brats"}, 5, 3),
        ("hybridmim_table4", {"brats"}, 10, 0),
        ("hybridmim_figure4", {"brats"}, 18, 0),
        ("hybridmim_figure6", {"brats"}, 7, 0),
    ],
)
def test_the_papers_sweeps_have_the_papers_modes_and_numbers(name, tasks, generic, specific, registry):
    requests = shipped(name)
    assert {request.task for request in requests} == tasks
    pretrained = [request for request in requests if request.method != "scratch"]
    modes = Counter(request.mode for request in pretrained)
    assert modes == {"generic": generic * len(tasks), "task-specific": specific * len(tasks)} or not specific
    assert modes["generic"] == generic * len(tasks)
    for request in requests:
        config = resolve(request, registry, registry.task(request.task))
        epochs = {"btcv": 2000, "msd_liver": 600, "msd_spleen": 600, "brats": 300}[request.task]
        tuning, training = config.finetune, config.pretrain
        assert (tuning.epochs, tuning.lr, tuning.foreground, tuning.clip_norm) == (epochs, 1e-4, 0, 0)
        if request.method == "scratch":
            continue
        assert (training.steps, training.lr, training.weight_decay, training.warmup_epochs) == (100_000, 1e-4, 1e-5, 50)
        on_ct = request.mode == "generic" and name != "hybridmim_figure6"
        small = on_ct or request.task != "brats"
        assert (training.crop, training.batch_size) == (((96,) * 3, 4) if small else ((128,) * 3, 2))
        assert request.corpora == (("atm22", "luna16", "covid19_20", "flare21") if request.mode == "generic" else ())


def test_figure_4_has_the_papers_label_fractions():
    assert {request.label_fraction for request in shipped("hybridmim_figure4")} == {0.1, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_figure_6_has_the_papers_sizes():
    sizes = [
        "-".join(pair.partition("=")[2] for pair in request.settings)
        for request in shipped("hybridmim_figure6")
        if request.method == "hybridmim"
    ]
    assert sizes == ["64-32-128", "64-16-128", "32-16-128", "32-8-128", "32-16-96", "32-16-64", "32-16-32"]


def test_table_4_switches_the_terms_of_the_paper():
    found = [request for request in shipped("hybridmim_table4") if request.backbone == "unet"]
    off = [
        sorted(pair.split(".")[1].split("=")[0] for pair in r.settings if pair.startswith("method."))
        for r in found
        if r.method == "hybridmim"
    ]
    names = ["number", "location", "consistency", "contrastive"]
    assert off == [sorted(names[number:]) for number in range(5)]
