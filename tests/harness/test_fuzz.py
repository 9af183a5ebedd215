"""Whatever is in a record, a sweep, a `--set` or a `dataset.json`: it is read, or refused with the one error that is due.

The same examples every time; with HARNESS_FUZZ_SECONDS=600 in the environment new ones, at random, for about so long.
"""

import copy
import itertools
import json
import math
import os
from contextlib import suppress

import nibabel as nib
import numpy as np
import pytest

from harness.api.registry import Registry
from harness.config.request import Request
from harness.config.resolve import change_task, parse_overrides, resolve
from harness.config.schema import Evaluate, Finetune, TaskSettings, Training
from harness.data.datasets import open_task
from harness.sweeps.cells import read
from harness.system.errors import UserError
from leaderboards import board, table, validate
from leaderboards.records import load_runs
from tests.leaderboards.made import write_run

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SECONDS = os.environ.get("HARNESS_FUZZ_SECONDS")
NAMES = ["", "a", "b", "0", "average", "ignore", "../x", "/etc/x", "\0", "\ud800", "=1", "<b>", "a" * 300, "1" * 400]
NUMBERS = [0, 1, -1, 2, 255, 256, 2**63, 10**300, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf]
LEAVES = st.sampled_from([None, True, *NAMES, *NUMBERS]) | st.text(max_size=8) | st.integers()
KEYS = st.sampled_from(NAMES)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3))
HOW = st.sampled_from(["set", "drop", "add", "rename"])
EDITS = st.lists(st.tuples(st.integers(0, 10**6), HOW, VALUES), max_size=3)
PAIRS = [{"image": f"imagesTr/c{n}.nii", "label": f"labelsTr/c{n}.nii"} for n in range(2)]
LISTED = {f"c{n}": {"images": [pair["image"]], "label": pair["label"]} for n, pair in enumerate(PAIRS)}
NAMED = {"background": 0, "a": 1, "b": 2}
DECATHLON = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": PAIRS}
NNUNET = {"channel_names": {"0": "MRI"}, "labels": NAMED, "file_ending": ".nii", "dataset": LISTED}
DATASETS = {"decathlon": DECATHLON, "nnunet": NNUNET}
SWEEP = {"method": "'scratch'", "task": "'msd_hippocampus'", "seed": "[0, 1]", "label_fraction": "0.5"}
TOML = ["0", "-1", "nan", "-inf", "true", "[]", "[[]]", "{}", "{a=1}", "''", "'~nobody/x'", "1979-05-27", "[" * 2000]
TOML += [f"'{'a' * 5000}'", r'"\u0000"', f"0x{'f' * 5000}", "1" * 5000, f"-1{'0' * 400}", f"{{a = 0x{'f' * 5000}}}"]
TICK = itertools.count(1)


def fuzz(per_second: int):
    """As many examples of a test as a quarter of the time allows, without a deadline."""
    still = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=int(per_second * float(SECONDS or 6) / 4), derandomize=SECONDS is None, **still)


def edited(value, edits):
    """A copy of nested tables with some of their places set, dropped, added to or renamed."""
    value = copy.deepcopy(value)
    for place, how, new in edits:
        spots = list(_spots(value)) or [([None], 0)]
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


@pytest.fixture
def made(tmp_path):
    """One of two runs: the path of its record, and the record."""
    write_run(tmp_path, "mae", dice=0.82)
    path = write_run(tmp_path) / "record.json"
    return path, json.loads(path.read_text())


@fuzz(per_second=45)
@given(edits=EDITS, depth=st.sampled_from([0, 0, 0, 100_000]))
def test_records_of_anything_are_read_or_refused(made, edits, depth):
    """`record.json` with wrong types, names and numbers, lacking fields, or nested without end; all that is done with it."""
    path, text = made[0], json.dumps(edited(made[1], edits))
    path.write_text(text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}" if depth else text)
    validate.check_run(path.parent)
    tables = board.gather(load_runs([path.parents[1]])[0])
    frame = table.build(tables)
    _ = [text.encode() for text in (table.render(tables), table.markdown(frame), table.latex(frame))]


KNOWN = Registry()
CONFIGS = [(kind, KNOWN.load(kind, name).Config) for kind, name in (("method", "official"), ("backbone", "unet"))]
CONFIGS += [("pretrain", Training), ("finetune", Finetune), ("evaluate", Evaluate), ("task", TaskSettings)]
FIELDS = [f"{section}.{field}" for section, config in CONFIGS for field in (*config.model_fields, "nothing")]
PLACES = st.sampled_from([*SWEEP, "settings", "corpus", "data", "mode", "split"])
WORDS = st.sampled_from([*NAMES, "none", "1e400", "1_0", "1,2,3", ",,,", "a" * 5000, "/dev/null", ".", "-1,1e308"])


@fuzz(per_second=250)
@given(pairs=st.lists(st.tuples(st.sampled_from(FIELDS), WORDS | st.text(max_size=8) | st.floats()), max_size=3))
@example(pairs=[("method.weights", "a" * 5000)])
def test_overrides_of_anything_are_resolved_or_refused(pairs):
    """`--set` of real fields with any value."""
    with suppress(UserError):
        settings = tuple(f"{key}={value}" for key, value in pairs)
        task = change_task(KNOWN.task("msd_hippocampus"), "demo", parse_overrides(settings))
        resolve(Request(method="official", task="msd_hippocampus", settings=settings), KNOWN, task)


@fuzz(per_second=500)
@given(changes=st.dictionaries(PLACES, st.sampled_from(TOML), max_size=2))
def test_sweeps_of_anything_are_read_or_refused(tmp_path, changes):
    """TOML with any value in any place; each cell can be named."""
    path = tmp_path / "sweep.toml"
    path.write_text("[defaults]\n" + "".join(f"{key} = {value}\n" for key, value in (SWEEP | changes).items()))
    with suppress(UserError):
        _ = [str(cell) for cell in read(path, Request(method="", task=""))]


@pytest.fixture
def folders(tmp_path):
    """Two cases, in a folder for each kind of `dataset.json`."""
    rng = np.random.default_rng(0)
    for kind, place, number in itertools.product(DATASETS, ("imagesTr", "labelsTr"), range(2)):
        (tmp_path / kind / place).mkdir(parents=True, exist_ok=True)
        voxels = rng.integers(0, 3, (8, 8, 8)).astype(np.uint8)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / kind / place / f"c{number}.nii")
    return tmp_path


@fuzz(per_second=120)
@given(kind=st.sampled_from(sorted(DATASETS)), edits=EDITS)
@example(kind="decathlon", edits=[(8, "set", "\ud800")])
@example(kind="nnunet", edits=[(2, "set", {"background": 0, "b": [1, 2]})])
def test_data_sets_of_anything_are_read_or_refused(folders, kind, edits):
    """`dataset.json` with wrong types, names and numbers, or lacking fields."""
    path = folders / kind / "dataset.json"
    path.write_text(json.dumps(edited(DATASETS[kind], edits)))
    os.utime(path, ns=(0, next(TICK)))  # what was read is known by its time
    with suppress(UserError):
        task = KNOWN.task(str(path.parent))
        open_task(task, task.find(path.parent), folders / "cache", "fixed")
