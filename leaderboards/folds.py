"""Cross-validation: the folds of a row become one run over all cases, each scored by the network that did not train on it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from leaderboards.records import SHARED, Run

FOLD = re.compile(r"(\d{1,3})/(\d{1,3})(@\w{1,32})?")
"""A fold in a record: K/N, and a digest of the file that lists the folds, if there was one."""


def pool(runs: Sequence[Run]) -> list[Run]:
    """The runs, with one run in the place of all folds of a method, a backbone and a seed.

    Folds are pooled where all N of them are there and share no test case. Where a row of a comparison lacks a fold, nothing of
    this comparison is lost: its folds are kept beside the pooled rows, each in a table of its own.
    """
    single = [run for run in runs if _fold(run) is None]
    studies: dict[Any, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if (fold := _fold(run)) is not None:
            # Mode is left out: the control of a generic comparison may be task-specific.
            study = (*_without(run, "mode"), run.targets, fold[1:])
            studies[study][run.record["mode"], run.method, run.backbone, run.seed].append(run)
    for rows in studies.values():
        pooled = {name: _complete(members) for name, members in rows.items()}
        single += [run for parts in pooled.values() for run in parts]
        if not all(pooled.values()):
            single += [run for members in rows.values() for run in members]
    return single


def _fold(run: Run) -> tuple[int, int, str] | None:
    """Number and total of a run's fold, and the file that lists the folds; None for a run that is no fold."""
    match = FOLD.fullmatch(str(run.record["data"].get("split", "fixed")))
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def _without(run: Run, *names: str) -> tuple[Any, ...]:
    """What a run shares with its table, without the split, the share of the labels, the test cases, and more."""
    left_out = ("label_fraction", "test_cases", *names)
    return tuple(value for name, value in zip(SHARED, run.table_without("split"), strict=True) if name not in left_out)


def _complete(members: Sequence[Run]) -> list[Run]:
    """The pooled runs of a method, a backbone and a seed, one per amount of labels; empty where a fold is missing.

    Folds of different sizes have different shares for one number of labelled cases. So the smallest amounts of labels of all
    folds belong together, if shares or numbers are equal; then the second smallest, and so on.
    """
    latest: dict[tuple[int, float], Run] = {}
    for run in sorted(members, key=lambda run: (str(run.record.get("finished", "")), run.run_id)):
        fold = _fold(run)
        assert fold is not None
        latest[fold[0], run.record["label_fraction"]] = run
    by_fold: dict[int, list[Run]] = defaultdict(list)
    for key in sorted(latest):
        by_fold[key[0]].append(latest[key])
    total = _fold(members[0])
    assert total is not None
    if sorted(by_fold) != list(range(1, total[1] + 1)) or len({len(each) for each in by_fold.values()}) != 1:
        return []
    amounts = list(zip(*(by_fold[number] for number in sorted(by_fold)), strict=True))
    return [_join(parts) for parts in amounts] if all(_belong_together(parts) for parts in amounts) else []


def _belong_together(parts: Sequence[Run]) -> bool:
    """Whether folds have equal amounts of labels, and no test case in common."""
    shares = {run.record["label_fraction"] for run in parts}
    numbers = {run.record["data"].get("n_train") for run in parts}
    cases = [case for run in parts for case in run.cases]
    return (len(shares) == 1 or len(numbers) == 1) and len(set(cases)) == len(cases)


def _join(parts: Sequence[Run]) -> Run:
    """One run of all folds. Its cases are in alphabetical order, as those of any run."""
    first, cases = parts[0], [case for run in parts for case in run.cases]
    order = sorted(range(len(cases)), key=cases.__getitem__)
    folds = [number for number, run in enumerate(parts) for _ in run.cases]
    fold = _fold(first)
    assert fold is not None
    data = first.record["data"] | {
        "split": f"{fold[1]} folds{fold[2]}",
        "n_test": len(cases),
        "n_test_seen": sum(run.num_test_seen for run in parts),
    }
    record = {key: value for key, value in first.record.items() if key != "validation"}
    return replace(
        first,
        record=record | {"data": data},
        cases=tuple(cases[index] for index in order),
        folds=tuple(folds[index] for index in order),
        parts=tuple(parts),
        dice=np.concatenate([run.dice for run in parts])[order],
        hd95=np.concatenate([run.hd95 for run in parts])[order],
        surface_dice=np.concatenate([run.surface_dice for run in parts])[order],
        status=np.concatenate([run.status for run in parts])[order],
    )


def fold_note(runs: Iterable[Run]) -> str:
    """What a reader must know about rows of pooled folds; empty for other rows."""
    numbers = {len(run.parts) for run in runs if run.parts}
    return (
        f"{numbers.pop()} folds pooled: every case is scored by the network that did not train on it" if numbers else ""
    )
