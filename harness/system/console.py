"""Progress bars and messages, which go to stderr. Results go to stdout."""

import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable[Any] | None, what: str, total: int | None = None, visible: bool = True, initial: int = 0
) -> Any:
    """A `tqdm` progress bar on stderr. It appears after one second, so that short work shows none.

    If stderr is a file or a pipe, it prints a line at most every 15 seconds. Of several processes of a run, only the first
    one shows the bar.

    Args:
        items: the items to iterate over; None if the caller updates the bar.
        what: the text before the bar.
        total: number of items, if it cannot be taken from `items`.
        visible: whether the bar is shown.
        initial: number of items that were done before.
    """
    return tqdm(
        items,
        desc=what,
        total=total,
        initial=initial,
        disable=not (visible and _is_first_process()),
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        leave=True,
        delay=1,
        ascii=not sys.stderr.isatty(),
        bar_format="{desc:<12} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def say(text: str) -> None:
    """Print progress on stderr. Of several processes of a run, only the first one prints it.

    Characters that would act on the terminal, which names in files may hold, are printed as escapes.
    """
    if _is_first_process():
        shown = "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)
        print(shown, file=sys.stderr, flush=True)


def _is_first_process() -> bool:
    """Whether this is the first process of a run, or its only one; launchers set RANK."""
    return int(os.environ.get("RANK") or 0) == 0


@cache
def say_once(text: str) -> None:
    """As `say`, but print the same text only once per process."""
    say(text)
