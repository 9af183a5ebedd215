"""Splits cases into training and test cases, by a list, by a rule or by folds. No patient is on both sides.

Folds are those of the rule (`--split K/N`), or of a file as nnU-Net writes it (`K/N@splits_final.json`).
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from harness.api.task import Case, Task
from harness.system.errors import UserError
from harness.system.files import digest_file, expand, read_json

FOLD = re.compile(r"([1-9]\d{0,2})/([1-9]\d{0,2})(?:@(.+))?")
LARGEST_FILE = 2**26
"""Largest size in bytes of a file of folds."""
SAME = "same"
TEST_SHARE = Fraction(1, 5)
VALIDATION_SHARE, TUNING_SHARE = Fraction(1, 20), Fraction(1, 5)
"""The largest shares of the training cases that may be validation cases: to watch fine-tuning, and to choose its settings."""


@dataclass(frozen=True)
class Fold:
    """Fold `number` (from 1) of `total`; `file` lists the cases of each fold, None where the rule deals them out."""

    number: int
    total: int
    file: Path | None = None

    @property
    def canonical(self) -> str:
        """The fold without the path of its file, which is not the same on another machine: `1/5@` and a digest of the file."""
        name = f"{self.number}/{self.total}"
        return name if self.file is None else f"{name}@{digest_file(self.file)[:8]}"


@dataclass(frozen=True)
class Split:
    """Training cases, validation cases and test cases.

    Attributes:
        train: in the order of a digest of the patients' names.
        test: sorted by id.
        by: "list" (shipped with the task), "rule" (a function of the patients' names), "fold", "file" (of folds), or "same".
        left_out: pairs (case, test case) of the same patient, where the test list has only the second one. The first one is
            not used for training.
        repeated: pairs of cases that are the same scan.
        validation: a few cases that would be training cases, held out to watch fine-tuning; none where there are few cases.
        unused: cases that a file of folds does not list.
    """

    train: list[Case]
    test: list[Case]
    by: str
    left_out: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    validation: list[Case] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def check_split(how: str) -> str:
    """Check a value of --split and return it: `fixed`, `same`, `K/N` with K of 1..N and N of 2 or more, or `K/N@FILE`.

    Raises:
        UserError: for any other value, or as `read_fold`.
    """
    fold = parse_fold(how)
    if fold is not None and fold.file is not None:
        read_fold(fold)
    if how in ("fixed", SAME) or fold is not None:
        return how
    raise UserError(
        f"--split {how!r} cannot be used: give fixed (80/20), K/N for fold K of N (for instance 1/5), K/N@splits_final.json for "
        "a fold that a file of nnU-Net lists, or same, which trains and tests on the same cases and is a plumbing check"
    )


def split_cases(
    task: Task,
    cases: Sequence[Case],
    how: str = "fixed",
    same: Sequence[tuple[int, int]] = (),
    validation: int = 0,
    share: Fraction = VALIDATION_SHARE,
) -> Split:
    """Split labelled cases.

    The rule orders patients by a digest of their names alone. So the same scans in another layout are split in the same
    way, and a subset of the scans has the same order.

    Args:
        how: as `check_split` returns it.
        same: pairs of indices of `cases` that are the same scan; they count as one patient.
        validation: largest number of training cases that are held out.
        share: largest share of the training cases that is held out.

    Raises:
        UserError: all cases look alike, no case is left on one side, or there are more folds than patients.
    """
    repeated = [(cases[i].id, cases[j].id) for i, j in same]
    if how == SAME:
        by_id = sorted(cases, key=lambda case: case.id)
        return Split(by_id, by_id, SAME, repeated=repeated)
    groups = _patients(cases, same)
    if same and len(groups) == 1 < len({case.patient or case.id for case in cases}):
        raise UserError(
            f"task {task.name!r}: all {len(cases)} labelled cases look like one scan, which counts as one patient: `harness data "
            "check` lists the pairs; take the copies out, or give --split same for a plumbing check"
        )
    by, left_out, fold = "rule", [], parse_fold(how)
    unused: list[str] = []
    if fold is not None and fold.file is not None:
        by = "file"
        groups, test, unused = _listed(task, groups, fold)
    elif fold is not None:
        by = "fold"
        test = _fold(task, groups, fold)
    elif task.test_ids is not None and any(case.id in task.test_ids for case in cases):
        by = "list"
        test = [[case for case in group if case.id in task.test_ids] for group in groups]
        test = [group for group in test if group]
    else:
        test, num_test = [], max(1, round(TEST_SHARE * len(cases)))
        for group in groups:
            if sum(map(len, test)) < num_test:
                test.append(group)
    test_ids = {case.id for group in test for case in group}
    training: list[list[Case]] = []
    for group in groups:
        test_id = next((case.id for case in group if case.id in test_ids), None)
        if test_id is None:
            training.append(group)
        else:
            left_out += [(case.id, test_id) for case in group if case.id not in test_ids]
    held_out = _hold_out(training, min(validation, int(share * sum(map(len, training)))))
    train = [case for group in training for case in group]
    if not train or not test_ids:
        raise UserError(
            f"task {task.name!r}: {len(cases)} labelled cases split into {len(train)} for training and {len(test_ids)} for "
            "testing; both need at least one: give the whole data set, or --split same for a plumbing check"
        )
    tested = sorted((case for case in cases if case.id in test_ids), key=lambda case: case.id)
    return Split(train, tested, by, left_out, repeated, held_out, unused)


def _hold_out(training: list[list[Case]], most: int) -> list[Case]:
    """Take at most `most` validation cases out of the training patients: the last patients."""
    validation: list[Case] = []
    while training and len(validation) + len(training[-1]) <= most:
        validation += training.pop()
    return validation


def draw_labelled(train: Sequence[Case], fraction: float, seed: int) -> list[Case]:
    """The training cases whose labels are used, in the order of `train`; at least one.

    Patients are drawn in an order that depends on the seed alone. So the cases of a smaller share are among those of a larger
    one, and the luck of the draw is part of the spread over seeds.

    Args:
        fraction: share of the cases, above 0 and at most 1.
        seed: of the draw.
    """
    # A share such as 4/176 is not exact: the product may exceed a whole number by its last digit.
    number = max(1, ceil(fraction * len(train) - 1e-9))
    if number >= len(train):
        return list(train)
    patients = list(dict.fromkeys(case.patient or case.id for case in train))
    order = np.random.default_rng(seed).permutation(len(patients))
    rank = {patients[index]: position for position, index in enumerate(order)}
    drawn = sorted(train, key=lambda case: rank[case.patient or case.id])[:number]
    chosen = {case.id for case in drawn}
    return [case for case in train if case.id in chosen]


def _fold(task: Task, groups: Sequence[list[Case]], fold: Fold) -> list[list[Case]]:
    """The patients of fold K of N. Raises UserError if there are fewer patients than folds."""
    if fold.total > len(groups):
        raise UserError(
            f"--split {fold.canonical}: task {task.name!r} has {len(groups)} patients here: give at most as many folds"
        )
    return list(groups[fold.number - 1 :: fold.total])


def _listed(
    task: Task, groups: Sequence[list[Case]], fold: Fold
) -> tuple[list[list[Case]], list[list[Case]], list[str]]:
    """The patients that a file of folds lists, those of them to test on, and the cases that it does not list.

    Raises:
        UserError: the file lists a case that the task does not have here, or as `read_fold`.
    """
    train, test = map(set, read_fold(fold))
    known = {case.id for group in groups for case in group}
    if missing := sorted((train | test) - known):
        raise UserError(
            f"--split: {fold.file} lists {len(missing)} cases that task {task.name!r} does not have here, for instance "
            f"{missing[0]!r}: give the file of this data set"
        )
    listed = [[case for case in group if case.id in train | test] for group in groups]
    tested = [[case for case in group if case.id in test] for group in groups]
    return [group for group in listed if group], [group for group in tested if group], sorted(known - train - test)


def _patients(cases: Sequence[Case], same: Sequence[tuple[int, int]]) -> list[list[Case]]:
    """Groups of cases of the same patient; cases that are the same scan count as one patient.

    Groups are in the order of a digest of the patient's name; a patient with several names has the alphabetically first one.
    """
    parent = {(case.patient or case.id): (case.patient or case.id) for case in cases}

    def root(name: str) -> str:
        """The name that stands for all names of a patient."""
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


def parse_fold(how: str) -> Fold | None:
    """The fold that a value of `--split` names; None if it names none."""
    match = FOLD.fullmatch(how)
    if match is None or not 1 < int(match[2]) >= int(match[1]):
        return None
    return Fold(int(match[1]), int(match[2]), expand(match[3]) if match[3] else None)


def read_fold(fold: Fold) -> tuple[list[str], list[str]]:
    """The cases that a file of folds lists to train on and to test on, as nnU-Net writes it.

    The file is a list of tables with the keys `train` and `val`. What nnU-Net validates on is tested here.

    Raises:
        UserError: the file cannot be read, is of another form, has another number of folds, or has a case on both sides.
    """
    path = fold.file
    assert path is not None
    content = _read(path)
    if not isinstance(content, list) or not all(_is_fold(each) for each in content):
        raise UserError(f"--split: {path} is not a list of tables with lists `train` and `val`, as nnU-Net writes it")
    if len(content) < 2:
        raise UserError(f"--split: {path} has one fold: give a file of two folds or more")
    if len(content) != fold.total:
        raise UserError(f"--split: {path} has {len(content)} folds: give K/{len(content)}@{path}")
    train, test = (list(dict.fromkeys(content[fold.number - 1][side])) for side in ("train", "val"))
    if both := sorted(set(train) & set(test)):
        raise UserError(f"--split: {path} trains and tests on {both[0]} in fold {fold.number}: mend the file")
    return train, test


def _read(path: Path) -> Any:
    """The JSON in a file. Raises UserError where there is no such file, or it is too large."""
    if not path.is_file():
        raise UserError(f"--split: there is no file {path}: give the splits_final.json of the folds")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(
            f"--split: {path} is larger than {LARGEST_FILE >> 20} MiB: give the splits_final.json of the folds"
        )
    return read_json(path)


def _is_fold(value: Any) -> bool:
    """Whether a value is one fold of a file: a table with two lists of names."""
    return isinstance(value, dict) and all(
        isinstance(value.get(side), list) and value[side] and all(isinstance(name, str) for name in value[side])
        for side in ("train", "val")
    )
