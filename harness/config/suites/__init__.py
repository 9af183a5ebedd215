"""Suites that come with the harness: lists of tasks, protocols and seeds, without methods. They are sweep files.

A name ends in the version. A changed suite is a new version, so that two reports of one name are of the same comparison.
"""

import tomllib
from pathlib import Path

from harness.system.errors import UserError, unknown


def suite_names() -> list[str]:
    """Names of the suites that come with the harness."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def suite_file(name: str) -> Path:
    """The file of a suite: of one that comes with the harness, or the named file. Raises UserError if it does not exist."""
    path = Path(name) if name.endswith(".toml") else Path(__file__).parent / f"{name}.toml"
    if name.endswith(".toml") or name in suite_names():
        return path
    raise UserError(f"{unknown('suite', name, suite_names())}; or give a file that ends in .toml")


def describe_suite(name: str) -> str:
    """The description of a suite that comes with the harness."""
    return str(tomllib.loads(suite_file(name).read_text(encoding="utf-8"))["description"])
