"""The `harness` command: its parser and its exit status."""

import argparse
import errno
import getpass
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from harness.cli import (
    check_method,
    data,
    doctor,
    estimate,
    export,
    fetch_weights,
    leaderboard,
    predict,
    profile,
    reproduce,
    run,
    runs,
    show,
    suite,
    sweep,
    tune,
)
from harness.cli import list as listing
from harness.cli.options import Parser, complete
from harness.system.console import escape_control, say_on_terminal, unbreakable
from harness.system.errors import UserError
from harness.system.signals import STOPPED, Interrupted, catching
from harness.system.status_file import write_ending

# In the order in which `harness --help` lists them.
COMMANDS = (
    run,
    sweep,
    suite,
    tune,
    check_method,
    profile,
    estimate,
    listing,
    fetch_weights,
    show,
    predict,
    export,
    reproduce,
    leaderboard,
    data,
    runs,
    doctor,
)
TRACEBACK = "--traceback"
FIRST_LINES = dict.fromkeys(
    (each.__name__ for each in (run, sweep, suite, tune, check_method, profile, estimate, predict, export, reproduce)),
    "loading PyTorch and MONAI ...",
) | {
    leaderboard.__name__: "reading records ...",
    show.__name__: "reading records ...",
    data.__name__: "looking at the data ...",
    doctor.__name__: "looking at the machine and the runs ...",
}
"""What commands say on a terminal at once, since their imports or their reading take seconds."""
RESUMES = {each.__name__ for each in (run, sweep, suite, tune, reproduce, data)}
"""Commands that keep what they have computed when they are stopped."""
# Errors of the file system that the user can mend: no permission, read-only, full, a file where a folder is needed, a name
# that is too long, or a link to itself.
MENDABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EEXIST,
    errno.ENOTEMPTY,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    The status is 0 for success, 2 for an error that the user can mend and 75 for a stop by a signal. An error in a plugin's code
    is its author's to mend. Any other error is a bug of the harness: it is raised, and Python exits with status 1.
    """
    words = list(sys.argv[1:] if words is None else words)
    whole = TRACEBACK in words
    _name_user()
    with unbreakable():
        try:
            status, message = _run([word for word in words if word != TRACEBACK], whole)
        except Exception as error:
            write_ending(1, f"{type(error).__name__}: {error}")
            raise
        write_ending(status, message)
    return status


def _run(words: Sequence[str], whole_traceback: bool) -> tuple[int, str]:
    """Exit status of the command, and the message for its status file; empty where it succeeded."""
    arguments = argparse.Namespace()
    try:
        _check_launcher()
        parser = _parser()
        if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
            complete(parser)
        arguments = parser.parse_args(words)
        with catching():
            return _carry_out(arguments) or 0, ""
    except UserError as error:
        return _refuse(" ".join(str(error).split()))
    except (Interrupted, KeyboardInterrupt) as error:
        message = f"stopped by {error or 'Ctrl-C'}"
        later = "goes on from there" if _module(arguments) in RESUMES else "begins again"
        print(f"harness: {message}; the same command {later}", file=sys.stderr)
        return STOPPED, message
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return _refuse(f"{error.strerror}: {error.filename or 'writing'}; mend it and ask again")
    # A plugin is foreign code: whatever it raises is said to its author.
    except Exception as error:
        from harness.api.plugin_fault import explain_plugin_fault  # the start of every command need not wait for it

        explained = explain_plugin_fault(error, getattr(arguments, "plugins", ()))
        if explained is None:
            raise
        if whole_traceback:
            traceback.print_exception(error)
        return _refuse(" ".join(explained.split()))


def _carry_out(arguments: argparse.Namespace) -> int | None:
    """The exit status of the command. Raises UserError if something that it called, such as a plugin, ended the process."""
    if _module(arguments) in FIRST_LINES:
        say_on_terminal(FIRST_LINES[_module(arguments)])
    try:
        status: int | None = arguments.command(arguments)
    except SystemExit as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{last.filename}, line {last.lineno} called sys.exit({error.code!r}), and nothing was finished: raise an error "
            "there instead"
        ) from None
    return status


def _module(arguments: argparse.Namespace) -> str:
    """The module of the command in `harness.cli`; empty where the command line was not understood."""
    module: str = getattr(getattr(arguments, "command", None), "__module__", "")
    return ".".join(module.split(".")[:3])  # a verb may have a file of its own in its command's folder


def _version() -> str:
    """The version of the installed package."""
    try:
        return version("ssl-seg-harness")
    except PackageNotFoundError:
        return "(not installed)"


def _name_user() -> None:
    """Give a user without an entry in the list of users a name: MONAI asks for it when it is imported (`docker --user`)."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "unknown"


def _check_launcher() -> None:
    """Raises UserError if a variable that launchers of several processes set holds no number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if (value := os.environ.get(name, "")) and not value.isdecimal():
            raise UserError(
                f"{name}={value[:40]!r} is not a number: launchers set it; unset it, or set it to a whole number"
            )


def _refuse(message: str) -> tuple[int, str]:
    """Print an error that the user can mend. Returns exit status 2 and the message."""
    print(f"harness: error: {escape_control(message)}", file=sys.stderr)
    return 2, message


def _parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="harness",
        description="Does this self-supervised pre-training help my 3D segmentation, by how much, and at what cost?",
        epilog=f"{TRACEBACK}, anywhere: show the whole traceback of an error in a plugin",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"harness {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
