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
    this comparison is lost: its folds with this amount of labels are kept beside the pooled rows, each in a table of its own.
    """
    single = [run for run in runs if _fold(run) is None]
    studies: dict[Any, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if (fold := _fold(run)) is not None:
            # Mode is left out: the control of a generic comparison may be task-specific.
            study = (*_without(run, "mode"), run.targets, fold[1:])
            studies[study][run.record["mode"], run.method, run.backbone, run.seed].append(run)
    for rows in studies.values():
        left: list[Run] = []
        for members in rows.values():
            pooled, unmatched = _complete(members)
            single += pooled
            left += unmatched
        single += [run for members in rows.values() for run in members if any(_same_amount(run, one) for one in left)]
    return single


def _fold(run: Run) -> tuple[int, int, str] | None:
    """Number and total of a run's fold, and the file that lists the folds; None for a run that is no fold."""
    match = FOLD.fullmatch(str(run.record["data"].get("split", "fixed")))
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def _without(run: Run, *names: str) -> tuple[Any, ...]:
    """What a run shares with its table, without the split, the share of the labels, the test cases, and more."""
    left_out = ("label_fraction", "test_cases", *names)
    return tuple(value for name, value in zip(SHARED, run.table_without("split"), strict=True) if name not in left_out)


def _complete(members: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The pooled runs of a method, a backbone and a seed, one per amount of labels; and the runs that lack another fold."""
    latest: dict[tuple[int, float], Run] = {}
    for run in sorted(members, key=lambda run: (str(run.record.get("finished", "")), run.run_id)):
        fold = _fold(run)
        assert fold is not None
        latest[fold[0], run.record["label_fraction"]] = run
        total = fold[1]
    pooled, used = [], set()
    for first in (run for (number, _), run in sorted(latest.items()) if number == 1):
        parts = [first]
        for fold_number in range(2, total + 1):
            others = [run for (number, _), run in sorted(latest.items()) if number == fold_number]
            # The same share before the same number: another number of cases may have the same share elsewhere.
            equal = [run for run in others if run.record["label_fraction"] == first.record["label_fraction"]]
            parts += (equal or [run for run in others if _same_amount(run, first)])[:1]
        cases = [case for run in parts for case in run.cases]
        if len(parts) == total and len(set(cases)) == len(cases):
            pooled.append(_join(parts))
            used |= {run.run_id for run in parts}
    return pooled, [run for run in latest.values() if run.run_id not in used]


def _same_amount(first: Run, second: Run) -> bool:
    """Whether two runs have equal amounts of labels: the same share, or, as folds have other sizes, the same number of cases."""
    numbers = [run.record["data"].get("n_train") for run in (first, second)]
    same_number = numbers[0] is not None and numbers[0] == numbers[1]
    return first.record["label_fraction"] == second.record["label_fraction"] or same_number


def _join(parts: Sequence[Run]) -> Run:
    """One run of all folds. Its cases are in alphabetical order, as those of any run."""
    first, cases = parts[0], [case for run in parts for case in run.cases]
    order = sorted(range(len(cases)), key=cases.__getitem__)
    folds = [number for number, run in enumerate(parts) for _ in run.cases]
    fold = _fold(first)
    assert fold is not None
    seen = [run.num_test_seen for run in parts]
    data = first.record["data"] | {
        "split": f"{fold[1]} folds{fold[2]}",
        "n_test": len(cases),
        "n_test_seen": sum(run.num_test_seen or 0 for run in parts) or (None if None in seen else 0),
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
