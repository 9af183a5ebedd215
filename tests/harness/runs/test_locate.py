"""What is wrong with a request is known before data is read or made up."""

import json
from dataclasses import replace

import pytest

from harness import UserError
from harness.config.request import Request
from harness.data.phantom import is_phantom
from harness.runs.locate import locate, writable_folder


@pytest.fixture
def request_(tmp_path):
    return Request(method="mae", task="msd_hippocampus", runs=tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "msd_hipocampus"}, "did you mean 'msd_hippocampus'"),
        ({"method": "simim"}, "did you mean 'simmim'"),
        ({"backbone": "unett"}, "did you mean 'unet'"),
        ({"preset": "smal"}, "did you mean 'small'"),
        ({"split": "3/2"}, "--split '3/2' cannot be used"),
        ({"settings": ("finetune.steps",)}, "is not of the form section.field=value"),
        ({"settings": ("finetun.steps=1",)}, "did you mean 'finetune'"),
        ({"settings": ("task.spacing=0,1,1",)}, "each spacing must be more than 0 mm"),
        ({"mode": "generic"}, "--mode generic needs what to pre-train on"),
        ({"corpora": ("flare21",)}, "--corpus is for --mode generic"),
        ({"mode": "generic", "corpora": ("flare22",)}, "did you mean 'flare21'"),
        ({"plugins": ("gone.py",)}, "there is no such file"),
    ],
)
def test_a_wrong_name_is_said_before_a_phantom_is_written(changes, says, request_):
    with pytest.raises(UserError, match=says):
        locate(replace(request_, **changes))
    assert not request_.runs.exists()


def test_data_that_is_given_is_used_and_a_phantom_is_made_up_where_none_is(request_, hippocampus_phantom):
    _, task, root, corpora = locate(
        replace(request_, data=hippocampus_phantom.parent, settings=("task.spacing=2,2,2",))
    )
    assert (root, corpora, task.spacing) == (hippocampus_phantom, [], (2, 2, 2))
    assert not (request_.runs / "phantoms").exists()
    _, task, root, _ = locate(request_)
    assert is_phantom(root)
    assert root.is_relative_to(request_.runs)
    assert len(task.cases(root)) == task.phantom_cases


def test_a_task_that_is_a_folder_is_its_own_data(request_, tmp_path, hippocampus_phantom):
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    folder = tmp_path / "Dataset007_Mine"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for path in (hippocampus_phantom / "imagesTr").glob("*.nii.gz"):
        name = path.name.removesuffix(".nii.gz")
        (folder / "imagesTr" / f"{name}_0000.nii.gz").symlink_to(path)
        (folder / "labelsTr" / path.name).symlink_to(hippocampus_phantom / "labelsTr" / path.name)
    (folder / "dataset.json").write_text(json.dumps(described))
    _, task, root, _ = locate(replace(request_, task=str(folder), data=tmp_path / "elsewhere"))
    assert root == folder
    assert list(task.targets) == ["a", "b"]
    assert len(task.cases(root)) == 4


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written .*: give another with --runs or HARNESS_RUNS"):
            writable_folder(place)
    assert (tmp_path / "file").read_text() == "mine"
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())
