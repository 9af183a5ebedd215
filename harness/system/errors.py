"""What the user can mend, and how it is said."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend; the command line prints it as one line and leaves with status 2.

    The message says what came, what is allowed and what to do.
    """


def unknown(what: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest existing names first."""
    known = sorted(allowed)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known: {', '.join(known) or 'none'}")
