"""The command line in this process, and the words of short runs."""

import json
from pathlib import Path

from harness.cli.main import main

# Two steps of each stage, and networks that take seconds.
BUDGET = [
    *("--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.crop=32,32,64"),
    *("--set", "finetune.steps=2", "--set", "finetune.warmup_steps=0", "--set", "finetune.crop=32,32,64"),
]
SMALL = {
    "unet": ["--set", "backbone.features=4,4,8,8,8"],
    "swinunetr": ["--set", "backbone.depths=1,1,1,1"],
    "segresnet": [],
    "unetr": ["--set", "backbone.image_size=32,32,64"],
}
# Settings for `run_words`, where two steps are too few.
FOUR_STEPS = [
    *("pretrain.steps=4", "pretrain.warmup_steps=1", "pretrain.crop=32,32,32", "backbone.features=4,4,8,8,8"),
    *("finetune.steps=4", "finetune.warmup_steps=1", "finetune.crop=32,32,32"),
]
# A run that is not short: of words that are refused before it begins.
HYBRIDMIM = ("run", "--method", "hybridmim", "--task", "msd_hippocampus")


def status_of(*words) -> int:
    """The exit status of `harness WORDS`."""
    return main([str(word) for word in words])


def harness(*words, status=0) -> None:
    """`harness WORDS`, which ends with this status."""
    assert status_of(*words) == status


def last_error(capsys) -> str:
    """The last line that was said on stderr, where no traceback is."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def fails(capsys, *words) -> str:
    """The one error of `harness WORDS`, which says nothing else and ends with status 2."""
    capsys.readouterr()
    harness(*words, status=2)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("harness: error: ")
    assert "Traceback" not in err
    assert not out.strip()
    return last


def short_run(method, data, task="msd_hippocampus", backbone="unet") -> list:
    """The words of a run of two steps on the data of a task; `--runs` is to be added."""
    words = ["run", "--method", method, "--backbone", backbone, "--task", task, "--data", data]
    return [*words, *BUDGET, *SMALL[backbone]]


def make_run(runs, data, method="scratch", backbone="unet", *more) -> Path:
    """The folder of a run of two steps that this makes."""
    harness(*short_run(method, data, backbone=backbone), *more, "--runs", runs)
    return folder_of(runs, f"{method}-{backbone}")


def folder_of(runs, method) -> Path:
    """The folder of the one finished run of a method."""
    (record,) = runs.glob(f"*-{method}-*/record.json")
    return record.parent


def record_of(runs, method) -> dict:
    """The record of the one finished run of a method."""
    return json.loads((folder_of(runs, method) / "record.json").read_text())
