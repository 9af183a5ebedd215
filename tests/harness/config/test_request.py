"""A request survives the command line and the record; what it refuses, it refuses with near matches."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import UserError
from harness.cli import run
from harness.cli.options import Parser, request_of
from harness.config.request import Execution, Request, command, options, recorded_fields
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.runs.record import make_record
from harness.sweeps.cells import read

# No word that looks like an option; anything else a shell can hand over.
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda word: not word.startswith("-")
)
WORDS = st.lists(WORD, max_size=3).map(tuple)
FOLDER = WORD.map(Path)
# As many digits as `{:g}` writes.
SHORT = st.integers(1, 999_999).map(lambda number: number / 1_000_000)
EXECUTION = {
    "checkpoint_minutes": SHORT.map(lambda share: float(f"{1000 * share:g}")),
    "micro_batches": st.integers(0, 64),
    "on_nonfinite": st.sampled_from(["stop", "skip"]),
    "trackers": st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), max_size=3).map(tuple),
    "until": st.sampled_from(["", "pretrain"]),
}
REQUEST = {
    "method": WORD,
    "backbone": WORD,
    "task": WORD,
    "preset": WORD,
    "mode": st.sampled_from(["task-specific", "generic"]),
    "protocol": st.sampled_from(["finetune", "frozen", "linear"]),
    "transfer": st.sampled_from(["method", "encoder", "all"]),
    "split": WORD,
    "seed": st.integers(0, 2**70),
    "label_fraction": SHORT | st.just(1.0),
    "shots": st.just(0),  # together with a fraction they are refused
    "label_seed": st.none() | st.integers(0, 2**62),
    "corpora": WORDS,
    "tune": WORD.filter(str.strip),
    "settings": WORDS,
    "plugins": WORDS,
    "data": st.none() | FOLDER,
    "allow_overlap": st.booleans(),
    "skip_bad": st.booleans(),
    "save_predictions": st.booleans(),
    "execution": st.builds(Execution, **EXECUTION),
    "runs": FOLDER,
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.delenv("HARNESS_RUNS", raising=False)
    # Every tracker's package is there: a command without its package is refused, and that is tested elsewhere.
    monkeypatch.setattr("harness.training.trackers.find_spec", lambda name: name)


def parsed(words) -> Request:
    """What `harness run` understands."""
    parser = Parser(prog="harness", allow_abbrev=False)
    run.add_parser(parser.add_subparsers(parser_class=Parser))
    return request_of(parser.parse_args(words))


def test_every_field_is_tried():
    assert set(REQUEST) == {each.name for each in fields(Request)}
    assert set(EXECUTION) == {each.name for each in fields(Execution)}


@given(request=st.builds(Request, **REQUEST))
@settings(max_examples=200, deadline=None)
def test_a_request_is_what_its_command_asks_for(request):
    program, *words = command(request)
    assert program == "harness"
    assert parsed(words) == request


def test_each_field_alone_makes_it_to_the_other_side():
    """No field hides behind another one: each is changed alone, by hand."""
    usual = Request(method="mae", task="brats")
    changed = {"method": "voco", "backbone": "unetr", "task": "./a b", "preset": "paper", "mode": "generic"}
    changed |= {"protocol": "linear", "split": "2/5", "seed": 7, "label_fraction": 0.25, "data": Path("/d")}
    changed |= {"corpora": ("a=-5,5", "b"), "settings": ("x.y=1,2", "z="), "plugins": ("p.py",), "runs": Path("r/s")}
    changed |= {"shots": 4, "label_seed": 0, "tune": "finetune.lr=1e-3,3e-3 finetune.layer_decay=1"}
    changed |= {"transfer": "encoder", "allow_overlap": True, "skip_bad": True, "save_predictions": True}
    inner = {"checkpoint_minutes": 0.5, "micro_batches": 2, "on_nonfinite": "skip", "trackers": ("mlflow", "wandb")}
    requests = [replace(usual, **{name: value}) for name, value in changed.items()]
    requests += [
        replace(usual, execution=Execution(**{name: value})) for name, value in {**inner, "until": "pretrain"}.items()
    ]
    assert len(requests) == len(REQUEST) - 1 + len(EXECUTION)
    for request in requests:
        assert request != usual
        assert parsed(command(request)[1:]) == request


@pytest.mark.parametrize("fraction", [1 / 3, 0.1234567])
def test_a_fraction_keeps_all_its_digits(fraction):
    request = Request(method="mae", task="brats", label_fraction=fraction)
    assert parsed(command(request)[1:]) == request


@pytest.mark.parametrize(("shots", "fraction", "says"), [(4, 0.5, "give one of them"), (-1, 1.0, "give 1 or more")])
def test_shots_and_a_share_are_not_given_together(shots, fraction, says):
    with pytest.raises(UserError, match=says):
        Request(method="mae", task="brats", shots=shots, label_fraction=fraction)


def test_a_damaged_number_in_a_record_is_refused():
    for value in ("x", 2.7):
        with pytest.raises(UserError, match=r"config\.label_seed is"):
            recorded_fields({"config": {"label_seed": value}})


def test_a_folder_whose_name_begins_with_a_dash_is_a_folder():
    request = Request(method="mae", task="brats", data=Path("-scans"))
    assert parsed(command(request)[1:]) == request


def test_a_variable_of_the_environment_is_a_default_only(monkeypatch):
    monkeypatch.setenv("HARNESS_DATA", "/from/environment")
    monkeypatch.setenv("HARNESS_RUNS", "/runs/there")
    words = ["run", "--method", "mae", "--task", "brats"]
    assert (parsed(words).data, parsed(words).runs) == (Path("/from/environment"), Path("/runs/there"))
    given_here = parsed([*words, "--data", "d", "--runs", "r"])
    assert (given_here.data, given_here.runs) == (Path("d"), Path("r"))


def test_a_phantom_can_be_asked_for_by_name(monkeypatch):
    monkeypatch.setenv("HARNESS_DATA", "/from/environment")
    words = ["run", "--method", "mae", "--task", "brats"]
    assert parsed([*words, "--data", "phantom"]).data is None
    assert parsed([*words, "--data", "./phantom"]).data == Path("phantom")
    monkeypatch.setenv("HARNESS_DATA", "phantom")
    assert parsed(words).data is None


def test_a_record_gives_back_what_was_asked_for(hippocampus_phantom, tmp_path):
    request = Request(
        method="simmim",
        task="msd_hippocampus",
        preset="small",
        seed=5,
        protocol="frozen",
        transfer="encoder",
        split="1/2",
        label_fraction=0.5,
        label_seed=3,
        data=hippocampus_phantom,
        runs=tmp_path,
        settings=("finetune.crop=32", "pretrain.crop=32,32,32", "backbone.features=4,4,8,8,8"),
    )
    report = {"clock": {}, "used": {}, "resumed": 0, "skipped": []}
    tuned = {"trained": report, "memory": {}, "transfer": {"text": "", "loaded": 1, "requested": "encoder"}}
    record = make_record(plan(request, *locate(request)), {}, {"finetune": 1.0}, tuned, torch.nn.Linear(1, 1), {})
    found = recorded_fields(json.loads(json.dumps(record)))
    assert set(found) == {name for name, option in options(Request) if option.record}
    assert found == {name: getattr(request, name) for name in found}
    assert found["split"] == "1/2"
    # Of a record of an older version there is what it holds, and no more.
    del record["protocol"], record["data"]["split"]
    assert set(recorded_fields(record)) == set(found) - {"protocol", "split"}
    assert recorded_fields({"data": None, "seed": 0}) == {"seed": 0}


AXES = ("method", "backbone", "task", "preset", "mode", "protocol", "transfer", "split", "seed", "label_fraction")
AXES = (*AXES, "shots", "label_seed", "tune")


def test_the_axes_of_a_sweep_are_the_fields_with_an_axis(tmp_path):
    assert tuple(name for name, option in options(Request) if option.axis) == AXES
    assert all(f"{name}," in read.__doc__.replace("\n", " ").replace("tune (a grid)", "tune,") for name in AXES)
    values = {
        "mode": ["task-specific", "generic"],
        "protocol": ["finetune", "linear"],
        "transfer": ["method", "encoder"],
        "seed": [0, 1],
    }
    values |= {"label_fraction": [0.5, 1.0], "shots": [1, 4], "label_seed": [0, 1]}
    for name in AXES:
        (tmp_path / "s.toml").write_text(f"[[matrix]]\n{name} = {json.dumps(values.get(name, ['a', 'b']))}\n")
        requests = [cell.request for cell in read(tmp_path / "s.toml", Request(method="mae", task="brats"))]
        assert [getattr(each, name) for each in requests] == values.get(name, ["a", "b"])
    for other in {each.name for each in fields(Request)} - {*AXES, "settings", "data"}:
        (tmp_path / "s.toml").write_text(f"[[matrix]]\n{other} = true\n")
        with pytest.raises(UserError, match=f"unknown key of a matrix in .*, '{other}'"):
            read(tmp_path / "s.toml", Request(method="mae", task="brats"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "generc"}, "unknown value of --mode 'generc': did you mean 'generic'? known: generic, task-specific"),
        ({"protocol": "Linear"}, "unknown value of --protocol 'Linear': did you mean 'linear'"),
        ({"label_fraction": 0.0}, "--label-fraction 0 is not a share of the labels"),
        ({"label_fraction": 1.5}, "--label-fraction 1.5 is not a share of the labels"),
        ({"label_fraction": float("nan")}, "--label-fraction nan is not a share of the labels"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_near_matches(changes, says):
    with pytest.raises(UserError) as error:
        Request(method="mae", task="brats", **changes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "1.5"], "'1.5' is not a whole number of 0 or more"),
        (["--micro-batches", "0"], "'0' is not a whole number of 1 or more"),
        (["--checkpoint-minutes", "nan"], "'nan' is not a number of minutes, 0 or more"),
        (["--checkpoint-minutes", "-5"], "--checkpoint-minutes"),
        (["--label-fraction", "half"], "--label-fraction"),
        (["--mode", "generc"], "--mode"),
        (["--meth", "mae"], "--meth"),
        (["--until", "finetune"], "--until"),
    ],
)
def test_words_that_are_no_request_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        parsed(["run", "--method", "mae", "--task", "brats", *words])


def test_a_run_needs_a_method_and_a_task():
    for words in (["run", "--method", "mae"], ["run", "--task", "brats"]):
        with pytest.raises(UserError, match="required"):
            parsed(words)
