"""`harness reproduce`: the command of a run, what differs on this machine, and the run once more."""

import argparse
from pathlib import Path
from typing import Any

from harness.cli.options import add_options
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness reproduce`."""
    parser = commands.add_parser(
        "reproduce", help="the command of a run, what differs here, and the run again", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN_ID|RECORD", help="run id, its beginning, a run folder or a record.json")
    parser.add_argument(
        "--go",
        action="store_true",
        help="run it, and compare every case; status 0 says that it ran",
    )
    parser.add_argument(
        "--into", type=Path, default=Path("reproduced"), metavar="DIR", help="its runs folder (default: ./reproduced)"
    )
    add_options(parser, "corpora", text="where it is here")
    parser.add_argument(
        "--split-file", type=Path, metavar="FILE", help="where the file of folds is here, if it had one"
    )
    add_options(parser, "data", "runs", "plugins")
    parser.set_defaults(command=reproduce)


def reproduce(arguments: argparse.Namespace) -> None:
    """Print the command and the differences; with --go carry out the command and compare every case."""
    from harness.runs.status import find_run
    from leaderboards.records import RecordError, read_record
    from leaderboards.text import printable

    argument = Path(arguments.run)
    path = argument if argument.is_file() else find_run(arguments.run, arguments.runs) / "record.json"
    try:
        record = read_record(path)
    except RecordError as error:
        raise UserError(str(error)) from None
    from harness.runs.reproduce import compare, inspect

    if arguments.go and arguments.data is None and record["data"]["source"] == "real":
        raise UserError("the run used real data: give its folder with --data or HARNESS_DATA")
    _name_split_file(record, arguments.split_file)
    reproduction = inspect(record, arguments.data, arguments.into, arguments.plugins, arguments.corpora)
    print(*map(printable, str(reproduction).splitlines()), sep="\n", flush=True)
    if arguments.go:
        from harness.runs.execute import run

        finished = run(reproduction.request)
        print(compare(record, path.parent / "cases.csv", finished.record, finished.folder / "cases.csv"))


def _name_split_file(record: dict[str, Any], path: Path | None) -> None:
    """Put the path of the file of folds into a record that names a digest of it.

    Raises:
        UserError: the record names such a file and none is given, the other way round, or it is another file.
    """
    fold, sign, digest = str(record["data"].get("split", "fixed")).partition("@")
    if not sign:
        if path is not None:
            raise UserError(f"--split-file {path}: the run was split by {fold!r}, without a file: leave it out")
        return
    if path is None:
        raise UserError(
            f"the run was split by a file of folds whose digest begins with {digest}: give it with --split-file FILE"
        )
    from harness.system.files import digest_file

    if not path.is_file() or digest_file(path)[: len(digest)] != digest:
        raise UserError(
            f"--split-file {path} is not the file of the run, whose digest begins with {digest}: give that one"
        )
    record["data"]["split"] = f"{fold}@{path}"
