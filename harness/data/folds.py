"""Folds of cross-validation: `--split K/N` by the harness's own rule, `K/N@FILE` as `splits_final.json` of nnU-Net lists them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.system.errors import UserError
from harness.system.files import digest_file, expand, read_json

FOLD = re.compile(r"([1-9]\d{0,2})/([1-9]\d{0,2})(?:@(.+))?")
LARGEST = 2**26
"""Largest size in bytes of a file of folds; that of 1000 cases has 0.2 MB."""


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
    if path.stat().st_size > LARGEST:
        raise UserError(f"--split: {path} is larger than {LARGEST >> 20} MiB: give the splits_final.json of the folds")
    return read_json(path)


def _is_fold(value: Any) -> bool:
    """Whether a value is one fold of a file: a table with two lists of names."""
    return isinstance(value, dict) and all(
        isinstance(value.get(side), list) and value[side] and all(isinstance(name, str) for name in value[side])
        for side in ("train", "val")
    )
