"""Verbs that print tables and statistics: build, compare, ranks, efficiency, cite."""

import argparse
from pathlib import Path

from harness.cli.leaderboard.records import as_text, finish, load, named_run, reported_rows
from harness.cli.output import terminal_width
from harness.system.errors import UserError, unknown


def build(arguments: argparse.Namespace) -> int:
    """Write all finished runs to files, and print the table. Returns the exit status."""
    import pandas as pd

    from leaderboards import board, table
    from leaderboards.text import counted

    runs, problems = load(arguments)
    tables = board.gather(runs)
    frame, warnings, reported = table.build(tables), table.warnings_of(tables), None
    if arguments.with_reported:
        reported = reported_rows(runs)
        frame = pd.concat([frame, reported], ignore_index=True) if len(reported) else frame
    paths = arguments.out or [(Path() if arguments.folders else arguments.runs) / "leaderboard.csv"]
    for path in paths:
        try:
            table.write(frame, path, warnings)
        except table.EndingError as error:
            raise UserError(f"--out {path}: {error}: give a name that ends so") from None
    if arguments.json:
        print(frame.to_json(orient="records", indent=1))
    else:
        width = None if arguments.wide else terminal_width()
        print(f"{table.render(tables, reported, width)}\n\n{counted(len(runs), 'run')}, {counted(len(frame), 'row')}:")
        print(*(f"  {path}" for path in paths), sep="\n")
    return finish(problems)


def compare_two(arguments: argparse.Namespace) -> int:
    """Compare two methods in every table that has both, or two runs, case by case. Returns the exit status."""
    import pandas as pd

    from leaderboards import board, compare
    from leaderboards.text import escape_cell

    runs, problems = load(arguments)
    if arguments.first == arguments.second:
        raise UserError(f"{arguments.first} is compared with itself: give two methods, or two runs")
    single = [named_run(name, runs) for name in (arguments.first, arguments.second)]
    try:
        if single[0] is not None and single[1] is not None:
            comparisons = [compare.compare_runs(single[0], single[1])]
        else:
            comparisons = compare.compare_methods(board.gather(runs), arguments.first, arguments.second)
    except board.NotComparableError as error:
        raise UserError(
            f"{error}: compare results that share all of it, `harness leaderboard build` shows which do"
        ) from None
    print(*map(as_text, comparisons), sep="\n\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        frames = [
            comparison.cases.assign(table=comparison.title, a=comparison.names[0], b=comparison.names[1])
            for comparison in comparisons
        ]
        cases = pd.concat(frames, ignore_index=True)
        for column in ("case", "target", "table", "a", "b"):
            cases[column] = cases[column].map(escape_cell)
        cases.to_csv(arguments.out, index=False, float_format="%.6g")
        print(f"\nevery case:\n  {arguments.out}")
    return finish(problems)


def ranks(arguments: argparse.Namespace) -> int:
    """Print how often each method holds each rank among the resamples. Returns the exit status."""
    from leaderboards import board
    from leaderboards.text import align, printable

    runs, problems = load(arguments)
    for table in board.gather(runs):
        if len(table.groups) < 2:
            continue
        stability = table.stability
        if stability is None:
            print(f"{printable(table.title)}\nno ranks: rows of one seed, whose luck cannot be told from the method\n")
            continue
        # Controls have no rank, and rows of one seed have no share (NaN, which differs from itself).
        ranked = {
            index: rank
            for index, rank in enumerate(table.ranks())
            if rank is not None and stability.shares[index, 0] == stability.shares[index, 0]
        }
        order = sorted(ranked, key=lambda index: ranked[index])
        num_ranks = min(len(order), 12)
        lines = [["method", "backbone", *(f"#{rank + 1}" for rank in range(num_ranks))]]
        for index in order[:50]:
            group = table.groups[index]
            shares = [f"{share:.0%}" for share in stability.shares[index, :num_ranks]]
            lines.append([group.method, group.backbone, *shares])
        print(*map(printable, [table.title, *table.sentences, *align(lines)]), sep="\n")
        print(f"Kendall's tau between resampled ranks and these: {stability.tau:.2f}\n")
    return finish(problems)


def efficiency(arguments: argparse.Namespace) -> int:
    """Print Dice over label fractions or steps and the area under the curve. Returns the exit status."""
    from leaderboards import board, curves

    if arguments.over not in curves.AXES:
        raise unknown("value of --over", arguments.over, curves.AXES)
    runs, problems = load(arguments)
    curve_sets = curves.find(board.gather(runs), arguments.over)
    if not curve_sets:
        example = "--label-fraction 0.1" if arguments.over == "label_fraction" else f"--set {arguments.over}=1000"
        raise UserError(
            f"no method was run at two {curves.AXES[arguments.over].values} or more: run it with `{example}` as well"
        )
    print(*map(as_text, curve_sets), sep="\n\n")
    return finish(problems)


def cite(arguments: argparse.Namespace) -> int:
    """Print BibTeX for everything that the runs used. Returns the exit status."""
    from harness.api.registry import Registry
    from leaderboards.cite import cite as entries

    runs, problems = load(arguments)
    print(entries(runs, Registry(arguments.plugins).citation))
    return finish(problems)
