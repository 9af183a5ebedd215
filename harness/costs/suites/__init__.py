"""Named sets of training steps to profile, one sweep file each: `harness profile --suite NAME`."""

from pathlib import Path

from harness.system.errors import unknown

FOLDER = Path(__file__).parent
ROUNDS = 3  # per suite; fewer than for one method, because a suite has many cells


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def suite_path(name: str) -> Path:
    """The sweep file of a suite. Raises UserError for an unknown one."""
    if name not in suite_names():
        raise unknown("suite", name, suite_names())
    return FOLDER / f"{name}.toml"
