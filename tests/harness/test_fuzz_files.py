"""Whatever bytes are in an image, a file of weights, a sidecar, a list of folds or a summary: read, or refused with one error.

As `test_fuzz.py`: HARNESS_FUZZ_SECONDS=600 gives new examples for about so long.
"""

import json
import os
from contextlib import suppress

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.api.nnssl import from_nnssl, read_plan
from harness.api.registry import Registry
from harness.api.task import Case
from harness.api.weight_files import read_weights_file
from harness.config.grid import parse_grid
from harness.config.schema import Evaluate
from harness.data.cases import load_case
from harness.data.duplicates import GRID
from harness.data.image_files import read_header, read_image, write_image
from harness.data.inventory import take_inventory
from harness.data.splits import Fold, read_fold
from harness.runs.imported import _from_summary
from harness.system.errors import UserError
from harness.training.lineage import Lineage, lineage_of, read_lineage, sidecar
from harness.training.stage_files import write_weights
from leaderboards.records import load_runs
from tests.harness.test_fuzz import EDITS, LEAVES, SECONDS, edited
from tests.harness.training.test_lineage import trained, weights
from tests.leaderboards.made import write_run

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

NUMBER_OF_TESTS = 7
# The head of a file has the sizes, offsets and types, so that most changes are made there.
WHERE = st.one_of(st.integers(0, 64), st.integers(0, 400), st.integers(0, 10**6))
CHANGES = st.lists(
    st.tuples(WHERE, st.sampled_from(["set", "cut", "insert", "zero"]), st.binary(min_size=1, max_size=9)), max_size=4
)


def fuzz(per_second):
    still = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    examples = max(10, int(per_second * float(SECONDS or 3.5) / NUMBER_OF_TESTS))
    return settings(max_examples=examples, derandomize=SECONDS is None, **still)


def changed(content, changes):
    """Bytes with some of them overwritten, cut off, inserted or set to zero."""
    content = bytearray(content)
    for where, how, new in changes:
        at = where % (len(content) or 1)
        if how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = new
        else:
            content[at : at + len(new)] = new if how == "set" else bytes(len(new))
    return bytes(content)


KNOWN = Registry()
TASK = KNOWN.task("msd_hippocampus")
KNOWN_EVALUATE = Evaluate()
SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One image in each format."""
    folder = tmp_path_factory.mktemp("images")
    voxels = np.random.default_rng(0).integers(0, 900, (6, 7, 8)).astype(np.int16)
    for suffix in SUFFIXES:
        write_image(folder / f"image{suffix}", voxels, np.diag([1.0, 1.0, 2.0, 1.0]))
    nib.save(nib.Nifti2Image(voxels, np.eye(4)), folder / "two.nii")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz(per_second=120)
@given(name=st.sampled_from(["image.nii", "image.nii.gz", "image.mha", "image.nrrd", "two.nii"]), changes=CHANGES)
def test_images_of_any_bytes_are_read_or_refused(tmp_path, images, name, changes):
    path = tmp_path / name
    path.write_bytes(changed(images[name], changes))
    for read in (read_header, read_image):
        with suppress(UserError):
            read(path)
    case = Case(id="c", images=(path,), label=path)
    with suppress(UserError):
        load_case(TASK, case)
    with suppress(UserError):
        take_inventory(TASK, [case], tmp_path / "cache")


@fuzz(per_second=130)
@given(name=st.sampled_from(["digests.json", "signature"]), changes=CHANGES)
def test_a_cache_of_any_bytes_is_read_or_made_again(tmp_path, images, name, changes):
    path, cache = tmp_path / "image.nii", tmp_path / "cache"
    path.write_bytes(images["image.nii"])
    os.utime(path, ns=(0, 1))
    case = Case(id="c", images=(path,), label=None)
    take_inventory(TASK, [case], cache)
    file = cache / name if name.endswith("json") else next((cache / "signatures").glob("*.npy"))
    file.write_bytes(changed(file.read_bytes(), changes))
    assert take_inventory(TASK, [case], cache).signatures["c"].shape == (1, GRID, GRID, GRID)


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    """Weights as safetensors with a lineage, as a checkpoint of PyTorch, and as one of nnssl."""
    folder = tmp_path_factory.mktemp("weights")
    content = {f"encoder.{number}.weight": torch.randn(4, 1, 3, 3, 3) for number in range(2)}
    save_file(content, folder / "plain.safetensors")
    write_weights(weights(), folder / "own.safetensors", trained(0))
    torch.save({"state_dict": content, "epoch": 3}, folder / "torch.pt")
    torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL"},
        "key_to_encoder": "encoder",
        "key_to_stem": "encoder.0",
    }
    torch.save({"network_weights": content, "nnssl_adaptation_plan": plan}, folder / "nnssl.pth")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FILES = ["plain.safetensors", "own.safetensors", "torch.pt", "old.pt", "nnssl.pth"]


@fuzz(per_second=250)
@given(name=st.sampled_from(FILES), changes=CHANGES)
def test_weights_of_any_bytes_are_read_or_refused(tmp_path, weight_files, name, changes):
    path = tmp_path / name
    path.write_bytes(changed(weight_files[name], changes))
    with suppress(UserError):
        file = read_weights_file(path)
        read_lineage(path, file.tensors, "0" * 32, tmp_path / "cache")
        if (plan := read_plan(file)) is not None:
            from_nnssl(file, plan, KNOWN.load("backbone", "resenc")(1))


@fuzz(per_second=160)
@given(edits=EDITS)
def test_plans_of_anything_are_read_or_refused(tmp_path, edits):
    content = {"encoder.stages.0.weight": torch.zeros(4, 1, 3, 3, 3)}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL"},
        "key_to_encoder": "encoder",
        "key_to_stem": "encoder.0",
    }
    plan |= {"pretrain_plan": {"configurations": {}}, "recommended_downstream_patchsize": [32, 32, 32]}
    path = tmp_path / "nnssl.pth"
    with suppress(TypeError, ValueError, UnicodeError):  # what cannot be saved was never a file
        torch.save({"network_weights": content, "nnssl_adaptation_plan": edited(plan, edits)}, path)
    with suppress(UserError):
        file = read_weights_file(path)
        if (read := read_plan(file)) is not None:
            from_nnssl(file, read, KNOWN.load("backbone", "resenc")(1))


@fuzz(per_second=260)
@given(changes=CHANGES, which=st.booleans())
def test_sidecars_of_any_bytes_are_read_or_left_out(tmp_path, weight_files, changes, which):
    path = tmp_path / "own.safetensors"
    path.write_bytes(weight_files["own.safetensors"])
    beside = sidecar(path)
    intact = weight_files[beside.name]
    beside.write_bytes(changed(intact, changes))
    if which:
        path.write_bytes(weight_files["plain.safetensors"])
    found = lineage_of(path, tmp_path / "cache")
    assert found is None or isinstance(found, Lineage)
    if not which:
        assert found is not None, "the weights themselves say what they were trained on"


@fuzz(per_second=260)
@given(edits=EDITS, changes=CHANGES, text=st.text(max_size=30))
def test_folds_summaries_and_grids_of_anything_are_read_or_refused(tmp_path, edits, changes, text):
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    path = tmp_path / "splits_final.json"
    path.write_bytes(changed(json.dumps(edited(folds, edits)).encode(), changes))
    with suppress(UserError):
        read_fold(Fold(1, 2, path))
    counts = {"TP": 4, "FP": 1, "FN": 1, "n_ref": 5, "n_pred": 5}
    one = {"prediction_file": "/x/c.nii.gz", "reference_file": "/y/c.nii.gz", "metrics": {"1": counts, "2": counts}}
    path = tmp_path / "summary.json"
    path.write_bytes(changed(json.dumps(edited({"metric_per_case": [one]}, edits)).encode(), changes))
    with suppress(UserError):
        _from_summary(path, TASK, [Case(id="c", images=(path,), label=path)], KNOWN_EVALUATE)
    with suppress(UserError):
        parse_grid(f"finetune.lr=0.001,{text};{text}")


@pytest.fixture
def table(tmp_path):
    """The table of cases of a run, and its bytes."""
    path = write_run(tmp_path) / "cases.csv"
    return path, path.read_bytes()


@fuzz(per_second=200)
@given(changes=CHANGES, row=st.lists(LEAVES, max_size=8))
def test_case_tables_of_anything_are_read_or_left_out(table, changes, row):
    path, content = table
    path.write_bytes(changed(content + ",".join(map(str, row)).encode(errors="replace"), changes))
    runs, problems = load_runs([path.parents[1]])
    assert len(runs) + len(problems) >= 1
