"""Which cases train and which test: by list, by rule, by fold; no patient on both sides."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from harness.api.task import Case, Task
from harness.system.errors import UserError

FOLD = re.compile(r"([1-9]\d{0,2})/([1-9]\d{0,2})")
SAME = "same"
TEST_SHARE = Fraction(1, 5)


@dataclass(frozen=True)
class Split:
    """Training cases, in an order whose prefixes are the nested label fractions, and test cases by id.

    Attributes:
        by: "list" (shipped with the task), "rule" (a function of the patients' names), "fold", or "same".
        left_out: training cases that no list knows as test cases but that are the same patient as one, with that one.
        repeated: pairs of cases that are the same scan.
    """

    train: list[Case]
    test: list[Case]
    by: str
    left_out: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)


def check_how(how: str) -> str:
    """`fixed`, `same`, or `K/N` with K of 1..N and N of 2 or more. Raises UserError for anything else."""
    match = FOLD.fullmatch(how)
    if how in ("fixed", SAME) or (match and int(match[1]) <= int(match[2]) and int(match[2]) > 1):
        return how
    raise UserError(
        f"--split {how!r} cannot be used: give fixed (80/20), K/N for fold K of N (for instance 1/5), or same, which trains "
        "and tests on the same cases and is a plumbing check"
    )


def split_cases(task: Task, cases: Sequence[Case], how: str = "fixed", same: Sequence[tuple[int, int]] = ()) -> Split:
    """Split labelled cases.

    The rule orders patients by a digest of their names alone: the same scans in another layout are split alike, and so is
    a part of them in the sense that no case changes its place in the order.

    Args:
        how: as `check_how` says.
        same: pairs of positions in `cases` that hold the same scan; they count as one patient.

    Raises:
        UserError: nothing would be left on one side, or a fold that there are not enough patients for.
    """
    repeated = [(cases[i].id, cases[j].id) for i, j in same]
    if how == SAME:
        everything = sorted(cases, key=lambda case: case.id)
        return Split(everything, everything, SAME, repeated=repeated)
    groups = _patients(cases, same)
    by, left_out = "rule", []
    if how != "fixed":
        by = "fold"
        test = _fold(task, groups, how)
    elif task.test_ids is not None and any(case.id in task.test_ids for case in cases):
        by = "list"
        test = [[case for case in group if case.id in task.test_ids] for group in groups]
        test = [group for group in test if group]
    else:
        test, wanted = [], max(1, round(TEST_SHARE * len(cases)))
        for group in groups:
            if sum(map(len, test)) < wanted:
                test.append(group)
    chosen = {case.id for group in test for case in group}
    train = []
    for group in groups:
        known = next((case.id for case in group if case.id in chosen), None)
        if known is None:
            train += group
        else:
            left_out += [(case.id, known) for case in group if case.id not in chosen]
    if not train or not chosen:
        raise UserError(
            f"task {task.name!r}: {len(cases)} labelled cases split into {len(train)} for training and {len(chosen)} for "
            "testing; both need at least one: give the whole data set, or --split same for a plumbing check"
        )
    return Split(train, sorted((c for c in cases if c.id in chosen), key=lambda c: c.id), by, left_out, repeated)


def _fold(task: Task, groups: Sequence[list[Case]], how: str) -> list[list[Case]]:
    number, folds = (int(part) for part in how.split("/"))
    if folds > len(groups):
        raise UserError(
            f"--split {how}: task {task.name!r} has {len(groups)} patients here: give at most as many folds"
        )
    return list(groups[number - 1 :: folds])


def _patients(cases: Sequence[Case], same: Sequence[tuple[int, int]]) -> list[list[Case]]:
    """Cases by patient, in the order of a digest of the patient's first name; scans that are the same share a patient."""
    parent = {(case.patient or case.id): (case.patient or case.id) for case in cases}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    names = [case.patient or case.id for case in cases]
    for i, j in same:
        first, second = sorted((root(names[i]), root(names[j])))
        parent[second] = first
    groups: dict[str, list[Case]] = defaultdict(list)
    for case, name in zip(cases, names, strict=True):
        groups[root(name)].append(case)
    ordered = sorted(groups, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest())
    return [sorted(groups[name], key=lambda case: case.id) for name in ordered]
