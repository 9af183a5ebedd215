"""The lists of test cases that are shipped in `tasks/splits/`."""

import json
from importlib import resources


def read_test_ids(name: str) -> frozenset[str]:
    """The ids of the test cases in `splits/NAME.json`."""
    return frozenset(json.loads((resources.files("tasks") / "splits" / f"{name}.json").read_text())["test"])
