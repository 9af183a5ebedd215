"""Progress bars and messages, which go to stderr. Results go to stdout."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tqdm import tqdm

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ESTALE)
"""Errors of writing to a pipe without a reader, or to a terminal that was closed."""


class Stream:
    """A text stream whose reader may go away. What nobody can read any more is dropped, so that speaking never ends the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; the number of its characters."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        except RuntimeError:  # a signal handler speaks while the same stream is being written to
            os.write(self._stream.fileno(), text.encode(self._stream.encoding or "utf-8", "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)
        except RuntimeError:  # as above; whoever was interrupted flushes
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        """Send all further output nowhere, if nobody can read it. Raises the error if it is another one."""
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def unbreakable() -> Iterator[None]:
    """Context manager: inside it, nothing that is printed fails, whatever the terminal's encoding and whether anybody reads."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (None if stream is None else Stream(stream) for stream in before)
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


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
        disable=not (visible and is_first_process()),
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
    if is_first_process():
        print(escape_control(text), file=sys.stderr, flush=True)


def say_on_terminal(text: str) -> None:
    """As `say`, but only where a person is likely to wait for it: on a terminal."""
    if sys.stderr.isatty():
        say(text)


def escape_control(text: str) -> str:
    """The text with escapes in place of characters that would act on the terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def is_first_process() -> bool:
    """Whether this is the first process of a run, or its only one; launchers set RANK."""
    return os.environ.get("RANK", "") in ("", "0")


@cache
def say_once(text: str) -> None:
    """As `say`, but print the same text only once per process."""
    say(text)
