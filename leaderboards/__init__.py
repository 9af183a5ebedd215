"""Tables and statistics from the records of runs. This package reads files of runs, and imports neither torch nor the engine.

`leaderboards.load(folder)` gives everything that the command line does, as pandas frames and figures.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leaderboards.results import Results, load

__all__ = ["Results", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'leaderboards' has no attribute {name!r}")
    return getattr(importlib.import_module("leaderboards.results"), name)
