"""Progress bars and messages on stderr; results go to stdout."""

import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable[Any] | None, what: str, total: int | None = None, shown: bool = True, initial: int = 0
) -> Any:
    """A bar for what takes longer than a second; where stderr is a file or a pipe, a line at most every 15 seconds."""
    return tqdm(
        items,
        desc=what,
        total=total,
        initial=initial,
        disable=not (shown and _first()),
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        leave=True,
        delay=1,
        ascii=not sys.stderr.isatty(),
        bar_format="{desc:<12} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def say(text: str) -> None:
    """One line of what is going on; of several processes of a run the first one says it."""
    if _first():
        print(text, file=sys.stderr, flush=True)


def _first() -> bool:
    return int(os.environ.get("RANK") or 0) == 0


@cache
def say_once(text: str) -> None:
    """As `say`, the same text once in a process."""
    say(text)
