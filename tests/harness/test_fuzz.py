"""Whatever is in a record, a sweep, a `--set` or a `dataset.json`: it is read, or refused with the one error that is due.

A few seconds by default, the same examples every time. `HARNESS_FUZZ_SECONDS=600 pytest tests/harness/test_fuzz.py` looks
for new ones, at random, for about so long.
"""

import copy
import itertools
import json
import math
import os
import warnings
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from harness.config import Evaluate, Finetune, TaskSettings, Training, change_task, parse_overrides, resolve
from harness.data import open_task
from harness.errors import UserError
from harness.planning import Request
from harness.registry import Registry
from harness.sweep import read
from leaderboards import board, table, validate
from leaderboards.records import RecordError, load_run, load_runs
from tests.leaderboards.made import write_run

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SECONDS = os.environ.get("HARNESS_FUZZ_SECONDS")
PER_SECOND = {"record": 45, "overrides": 250, "sweep": 500, "dataset": 120}
"""Examples of each test in a second of the whole."""

NAMES = ["", "a", "b", "0", "average", "ignore", "../x", "/etc/passwd", "\0", "\ud800", "=1", "<b>"]
NAMES += ["a" * 300, "1" * 400]
NUMBERS = [0, 1, -1, 2, 255, 256, 2**63, 10**300, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf]
LEAVES = st.sampled_from([None, True, *NAMES, *NUMBERS]) | st.text(max_size=8) | st.integers()
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(NAMES), v, max_size=3)
)
HOW = st.sampled_from(["set", "drop", "add", "rename"])
EDITS = st.lists(st.tuples(st.integers(0, 10**6), HOW, VALUES), max_size=3)
PAIRS = [{"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii"} for n in range(2)]
LISTED = {f"c{n}": {"images": [pair["image"]], "label": pair["label"]} for n, pair in enumerate(PAIRS)}
NUMBERED, NAMED = {"0": "background", "1": "a", "2": "b"}, {"background": 0, "a": 1, "b": 2}
DATASETS = {
    "decathlon": {"modality": {"0": "MRI"}, "labels": NUMBERED, "training": PAIRS},
    "nnunet": {"channel_names": {"0": "MRI"}, "labels": NAMED, "file_ending": ".nii", "dataset": LISTED},
}
SWEEP = {
    "method": "'scratch'",
    "task": "'msd_hippocampus'",
    "seed": "[0, 1]",
    "label_fraction": "0.5",
    "split": "'1/2'",
}
TOML = ["0", "-1", "1.5", "nan", "-inf", "true", "[]", "[[]]", "{}", "{a=1}", "''", "'~nobody/x'", "1979-05-27"]
TOML += ["0x" + "f" * 5000, "1" * 5000, "-1" + "0" * 400, "[" * 2000, f"'{'a' * 5000}'", r'"\u0000"']
TICK = itertools.count(1)


def fuzz(kind: str):
    """As many examples of a test as the time allows, without a deadline."""
    number = max(10, int(PER_SECOND[kind] * float(SECONDS or 5) / len(PER_SECOND)))
    still = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=number, derandomize=SECONDS is None, **still)


def edited(value, edits):
    """A copy of nested tables with some of their places set, dropped, added to or renamed."""
    value = copy.deepcopy(value)
    for place, how, new in edits:
        spots = list(_spots(value))
        if not spots:
            return value
        holder, key = spots[place % len(spots)]
        if how == "set" or isinstance(holder, list):
            holder[key] = copy.deepcopy(new)
        elif how == "drop":
            del holder[key]
        else:
            holder[NAMES[place % len(NAMES)]] = holder.pop(key) if how == "rename" else copy.deepcopy(new)
    return value


def _spots(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _spots(value[key])


def use(folder: Path) -> None:
    """All that is done with runs from elsewhere, with a folder of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        runs, _ = load_runs([folder])
        for each in folder.iterdir():
            validate.check_run(each)
        tables = board.gather(runs)
        frame = table.build(tables)
        _ = [text.encode() for text in (table.render(tables), table.markdown(frame), table.latex(frame))]


@pytest.fixture
def runs(tmp_path) -> Path:
    write_run(tmp_path / "runs", "mae", dice=0.82)
    write_run(tmp_path / "runs")
    return tmp_path / "runs"


@fuzz("record")
@given(edits=EDITS, depth=st.sampled_from([0, 0, 0, 100_000]))
def test_records_of_anything_are_read_or_refused(runs, edits, depth):
    """`record.json` with wrong types, names and numbers, lacking fields, or nested without end."""
    path = sorted(runs.glob("*/record.json"))[0]
    before = path.read_text()
    text = json.dumps(edited(json.loads(before), edits))
    path.write_text(text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}" if depth else text)
    try:
        use(runs)
    finally:
        path.write_text(before)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["record.json", "cases.csv"])
def test_a_pipe_is_no_record(runs, name):
    """It would be waited for without end."""
    path = sorted(runs.glob(f"*/{name}"))[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecordError, match="regular file"):
        load_run(path.parent)


KNOWN = Registry()
CONFIGS = [(kind, KNOWN.load(kind, name).Config) for kind, name in (("method", "official"), ("backbone", "unet"))]
CONFIGS += [("pretrain", Training), ("finetune", Finetune), ("evaluate", Evaluate), ("task", TaskSettings)]
FIELDS = [f"{section}.{field}" for section, config in CONFIGS for field in (*config.model_fields, "nothing")]
WORDS = st.sampled_from([*NAMES, "none", "1e400", "1_0", "1,2,3", ",,,", "a" * 5000, "/dev/null", ".", "-1,1e308"])


@fuzz("overrides")
@given(pairs=st.lists(st.tuples(st.sampled_from(FIELDS), WORDS | st.text(max_size=8) | st.floats()), max_size=3))
@example(pairs=[("method.weights", "a" * 5000)])
def test_overrides_of_anything_are_resolved_or_refused(pairs):
    """`--set` of real fields with any value."""
    with suppress(UserError):
        wanted = parse_overrides([f"{key}={value}" for key, value in pairs])
        task = change_task(KNOWN.task("msd_hippocampus"), wanted)
        resolve(KNOWN, task, method="official", backbone="unet", preset="demo", overrides=wanted)


KEYS = st.sampled_from([*SWEEP, "settings", "corpus", "data", "mode"])


@fuzz("sweep")
@given(changes=st.dictionaries(KEYS, st.sampled_from(TOML), max_size=2))
@example(changes={"seed": "1" * 5000})
@example(changes={"seed": "0x" + "f" * 5000})
@example(changes={"settings": '{"pretrain.steps" = 0x' + "f" * 5000 + "}"})
@example(changes={"settings." + ".".join("a" * 3000): "1"})
@example(changes={"label_fraction": "-1" + "0" * 400})
def test_sweeps_of_anything_are_read_or_refused(tmp_path, changes):
    """TOML with any value in any place; each cell can be named."""
    path = tmp_path / "sweep.toml"
    path.write_text("[defaults]\n" + "".join(f"{key} = {value}\n" for key, value in (SWEEP | changes).items()))
    with suppress(UserError):
        _ = [str(cell) for cell in read(path, Request(method="", task=""))]


@pytest.fixture
def folders(tmp_path) -> Path:
    """Two cases, in a folder for each kind of `dataset.json`."""
    rng = np.random.default_rng(0)
    for kind in DATASETS:
        for place in ("imagesTr", "labelsTr"):
            (tmp_path / kind / place).mkdir(parents=True)
            for number in range(2):
                voxels = rng.integers(0, 3, (8, 8, 8)).astype(np.uint8)
                nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / kind / place / f"c{number}.nii")
    return tmp_path


@fuzz("dataset")
@given(kind=st.sampled_from(sorted(DATASETS)), edits=EDITS)
@example(kind="decathlon", edits=[(8, "set", "\ud800")])
@example(kind="decathlon", edits=[(9, "set", "\ud800")])
@example(kind="nnunet", edits=[(2, "set", {"background": 0, "b": [1, 2]})])
def test_data_sets_of_anything_are_read_or_refused(folders, kind, edits):
    """`dataset.json` with wrong types, names and numbers, or lacking fields."""
    path = folders / kind / "dataset.json"
    path.write_text(json.dumps(edited(DATASETS[kind], edits)))
    os.utime(path, ns=(0, next(TICK)))  # what was read is known by its time
    with suppress(UserError):
        task = KNOWN.task(str(path.parent))
        open_task(task, task.find(path.parent), folders / "cache", "fixed")
