"""Errors that the user can correct, and their messages."""

import difflib
from collections.abc import Iterable
from itertools import islice


class UserError(Exception):
    """An error that the user can correct. The command line prints it as one line and exits with status 2.

    The message says what was given, what is allowed and what to do.
    """


def listing(entries: Iterable[str]) -> str:
    """The first three entries of a message's list, and whether there are more."""
    first = list(islice(entries, 4))
    return "; ".join(first[:3]) + ("; ..." if len(first) > 3 else "")


def unknown(what: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that does not exist. Its message first offers up to three similar names, then lists all of them.

    Args:
        what: the kind of thing that `name` should name, for instance "preset".
        name: the name that was given.
        allowed: all names that exist.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known: {', '.join(names) or 'none'}")
