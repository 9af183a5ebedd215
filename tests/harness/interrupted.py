"""A run of twelve and eight steps to be disturbed, how far it is, and whether it ends as the undisturbed one did."""

import json

from harness.system.files import find_below
from tests.harness.processes import run_words

STEPS = {"pretrain": 12, "finetune": 8}
BUDGET = [
    *("pretrain.steps=12", "pretrain.warmup_steps=2", "pretrain.crop=32,32,32", "backbone.features=4,4,8,8,8"),
    *("finetune.steps=8", "finetune.warmup_steps=2", "finetune.crop=32,32,32", "method.sub_volume=32"),
    # In processes that `compute_alike` does not reach, too.
    *("pretrain.precision=fp32", "finetune.precision=fp32"),
]


def words(data, runs, *more):
    """The command of the run."""
    return run_words("hybridmim", BUDGET, data, runs, *more)


def assert_same(run, whole):
    """Weights, scores and metrics to the last byte; every step once."""
    for name in ("weights.safetensors", "cases.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    due = [(stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]
    assert [(line["stage"], line["step"]) for line in lines] == due
    here, there = (json.loads((each / "record.json").read_text()) for each in (run, whole))
    assert here["metrics"] == there["metrics"]
    assert here["digests"] == there["digests"]


def seen(stage, runs) -> float:
    """How far a stage is."""
    if stage == "prepare":
        return len(find_below(runs / "cache" / "prepared", "*.json"))
    if stage == "pretrain":
        return _lines_in("cache/pretrain/*/history.jsonl", runs)
    if stage == "finetune":
        return max(0, _lines_in("*/history.jsonl", runs) - STEPS["pretrain"])
    return sum(len(find_below(folder / "evaluation", "*.npz")) for folder in runs.iterdir())


def _lines_in(pattern, runs) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob(pattern) if path.exists())
