"""Hand-made run folders, whole enough for every command, and the commands as a user calls them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from harness.cli.main import main
from leaderboards import board, records, table

MEASURES = {"dice": "dice", "hd95": "hd95_mm", "surface_dice": "surface_dice"}


def write_run(
    folder: Path,
    method: str = "scratch",
    seed: int = 0,
    dice: float = 0.8,
    preset: str = "demo",
    fingerprint: str = "f" * 32,
    overrides: dict | None = None,
    cases: int = 8,
    **changes,
) -> Path:
    """A run of two targets; `dice` is the mean of target a, b is empty in the first case. `changes` go into the record."""
    frame = scores(dice, cases)
    number = hashlib.blake2b(repr((overrides, changes)).encode(), digest_size=3).hexdigest()
    run_id = changes.pop("run_id", None) or f"t-m-{preset}-s{seed}-{fingerprint[:2]}-{_slug(method)}-{number}"
    place = folder / run_id
    place.mkdir(parents=True)
    frame.to_csv(place / "cases.csv", index=False)
    record = {
        "schema": 1,
        "run_id": run_id,
        "method": method,
        "backbone": "unet",
        "task": "t",
        "task_version": "1",
        "mode": "task-specific",
        "protocol": "finetune",
        "preset": preset,
        "overrides": overrides or {},
        "label_fraction": 1.0,
        "seed": seed,
        "data": {
            "source": "real",
            "fingerprint": fingerprint,
            "licence": "CC0",
            "n_test": cases,
            "n_train": 2,
            "train": ["x", "y"],
            "pretrain": ["x", "y"],
            "test": [f"c{case}" for case in range(cases)],
            "n_test_seen": 0,
        },
        "metrics": summary(frame),
        "metric_policy": "empty-is-worst-v1",
        "metric_definitions": {"hd95": "max-directed", "surface_dice_tolerance_mm": 1.0},
        "timing": timing(method),
        "digests": {"cases.csv": digest_cases(place)},
        "environment": {"torch": "2.9", "gpu": None},
        "finished": "2026-01-01T00:00:00Z",
    }
    record = merge(record, changes)
    (place / "record.json").write_text(json.dumps(record))
    steps = [{"stage": "finetune", "step": s, "loss": 1 / s, "lr": 0.1, "terms": {"dice": 1 / s}} for s in range(1, 30)]
    (place / "history.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    return place


def write_dice(folder: Path, method: str, seed: int, dice: np.ndarray, **changes) -> Path:
    """A run of one target with these Dice values, one per case."""
    made = write_run(folder, method, seed, cases=len(dice), **changes)
    rows = [
        {
            "case": f"c{case}",
            "target": "a",
            "status": "scored",
            "dice": min(0.999, value),
            "hd95_mm": 2.0,
            "surface_dice": 0.9,
        }
        for case, value in enumerate(dice)
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(made / "cases.csv", index=False)
    record = json.loads((made / "record.json").read_text())
    (made / "record.json").write_text(json.dumps(record | {"metrics": summary(frame)}))
    sign(made)
    return made


def sign(folder: Path) -> None:
    """Make the cases of a run, which a test has changed, those of its record."""
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"digests": {"cases.csv": digest_cases(folder)}}))


def digest_cases(folder: Path) -> str:
    """The digest of the scores in a run folder."""
    return hashlib.blake2b((folder / "cases.csv").read_bytes(), digest_size=16).hexdigest()


def three_fractions(folder: Path) -> Path:
    """Two methods, three seeds, 10, 50 and 100 % of the labels."""
    for seed in (0, 1, 2):
        for fraction in (0.1, 0.5, 1.0):
            write_run(folder, "scratch", seed, dice=0.6 + 0.2 * fraction, label_fraction=fraction)
            write_run(folder, "better", seed, dice=0.7 + 0.15 * fraction, label_fraction=fraction)
    return folder


def scores(dice: float, cases: int) -> pd.DataFrame:
    """`cases.csv` of such a run; the noise of a case is the same in every run."""
    rng = np.random.default_rng(1)
    rows = []
    for case in range(cases):
        noise = rng.normal(0, 0.02)
        a = {"dice": min(1, dice + noise), "hd95_mm": 2.0, "surface_dice": 0.9, "status": "scored"}
        b = {"dice": 0.5, "hd95_mm": 4.0, "surface_dice": 0.7, "status": "scored"}
        if case == 0:
            b = {"dice": None, "hd95_mm": None, "surface_dice": None, "status": "empty"}
        rows += [{"case": f"c{case}", "target": target, **each} for target, each in (("a", a), ("b", b))]
    return pd.DataFrame(rows)[["case", "target", "status", "dice", "hd95_mm", "surface_dice"]]


def simulated(rng, *gains, seed_spread=0.006, seeds=3, cases=24):
    """Dice (seeds, cases, 1) of a control, and of methods that gain this much; cases differ, and seeds have luck."""
    case = rng.normal(0.8, 0.05, cases)
    rows = []
    for gain in (0.0, *gains):
        luck, reaction = rng.normal(0, seed_spread, (seeds, 1)), rng.normal(0, 0.01, cases)
        rows.append((case + gain + luck + reaction + rng.normal(0, 0.01, (seeds, cases)))[..., None])
    return rows


def merge(record: dict, changes: dict) -> dict:
    """`changes` laid over the record; tables into tables."""
    return record | {k: merge(record[k], v) if isinstance(v, dict) and k in record else v for k, v in changes.items()}


def summary(frame: pd.DataFrame) -> dict:
    """What the engine writes as `metrics`."""
    found = {}
    for target, rows in frame.groupby("target"):
        status = list(rows["status"])
        means = {name: float(rows[column].mean()) for name, column in MEASURES.items()}
        counts = {f"n_{name}": status.count(name) for name in ("missed", "spurious", "empty")}
        found[target] = means | {"n_cases": int(rows["dice"].notna().sum())} | counts
    return found | {"average": {name: float(np.mean([each[name] for each in found.values()])) for name in MEASURES}}


def timing(method: str) -> dict:
    """As recorded; training from scratch has no pre-training."""
    seconds = {"prepare": 1.0, "finetune": 60.0, "evaluate": 5.0}
    if method == "scratch":
        return {"pretrain_step": None, "seconds": seconds}
    split = {"forward": {"p50_ms": 40.0}, "backward": {"p50_ms": 50.0}, "optimizer": {"p50_ms": 10.0}}
    step = {"step": {"p50_ms": 100.0, "p95_ms": 120.0}, "data": {"p50_ms": 1.0}, **split}
    return {"pretrain_step": step, "seconds": seconds | {"pretrain": 100.0, "method_prepare": 3.0}}


def tables(folder: Path) -> list[board.Table]:
    """The tables of a folder, all of whose records are good."""
    runs, problems = records.load_runs([folder])
    assert not problems, problems
    return board.gather(runs)


def built(folder: Path) -> pd.DataFrame:
    """The leaderboard of a folder."""
    return table.build(tables(folder))


def called(capsys, *words, status: int = 0) -> str:
    """`harness` with these words -> what it prints; it must end with `status`, and an error is in its one form."""
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    if status == 2:
        assert all(line.startswith("harness: ") for line in err.splitlines())
    return out + err


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in text)[:60]
