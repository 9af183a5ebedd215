"""The `harness` command. Torch is imported only by what needs it."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import UserError, unknown

# Errors of the file system that are the user's to mend: no permission, read-only, full, a file where a folder is due.
MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


class _Parser(argparse.ArgumentParser):
    """One line on stderr instead of the usage, and near matches for a misspelt command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what is allowed")


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user can mend it, 130 interrupted; a fault of ours raises (status 1)."""
    try:
        arguments = _parser().parse_args(words)
        status: int | None = arguments.command(arguments)
        return status or 0
    except UserError as error:
        print("harness: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("harness: interrupted; the same command goes on after the last finished stage", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) has left; nothing is wrong with the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        print(
            f"harness: error: {error.strerror}: {error.filename or 'writing'}; mend it and ask again", file=sys.stderr
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="harness",
        description="Does this self-supervised pre-training help my 3D segmentation, by how much, and at what cost?",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_run(commands)
    _add_sweep(commands)
    _add_list(commands)
    _add_show(commands)
    _add_leaderboard(commands)
    _add_data(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="pre-train, fine-tune, evaluate, record", allow_abbrev=False)
    run.add_argument("--method", required=True, metavar="M", help="`harness list methods`")
    run.add_argument("--task", required=True, metavar="T", help="`harness list tasks`, or a Decathlon folder")
    run.add_argument("--backbone", default="unet", metavar="B", help="`harness list backbones` (default: unet)")
    run.add_argument("--preset", default="demo", metavar="P", help="`harness list presets` (default: demo)")
    run.add_argument("--mode", default="task-specific", choices=["task-specific"], help="what to pre-train on")
    run.add_argument("--protocol", default="finetune", choices=["finetune"], help="what is trained with labels")
    run.add_argument("--seed", type=_seed, default=0, metavar="N")
    run.add_argument("--label-fraction", type=float, default=1.0, metavar="F", help="share of the training labels")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="method.*, backbone.*, pretrain.*, finetune.*, evaluate.*; for instance pretrain.steps=200",
    )
    _add_data_option(run)
    _add_runs_option(run)
    _add_plugin_option(run)
    run.add_argument("--dry-run", action="store_true", help="resolve and check everything, compute nothing")
    run.add_argument("--json", action="store_true", help="print the record as one JSON document")
    run.set_defaults(command=_run)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="many runs from one file", allow_abbrev=False)
    sweep.add_argument("file", type=Path, metavar="FILE.toml", help="see sweeps/ for examples")
    sweep.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    _add_data_option(sweep)
    _add_runs_option(sweep)
    _add_plugin_option(sweep)
    sweep.add_argument("--dry-run", action="store_true", help="list the cells, compute nothing")
    sweep.set_defaults(command=_sweep)


def _add_list(commands: Any) -> None:
    listing = commands.add_parser("list", help="methods, backbones, tasks, presets", allow_abbrev=False)
    listing.add_argument(
        "kind", nargs="?", metavar="KIND", help="methods, backbones, tasks or presets; all if left out"
    )
    _add_plugin_option(listing)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_list)


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="a finished run", allow_abbrev=False)
    show.add_argument("run", metavar="RUN", help="run id, its beginning, or a run folder")
    _add_runs_option(show)
    show.add_argument("--json", action="store_true")
    show.set_defaults(command=_show)


def _add_leaderboard(commands: Any) -> None:
    group = commands.add_parser("leaderboard", help="tables from records", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    build = verbs.add_parser("build", help="one CSV and a table from all finished runs", allow_abbrev=False)
    build.add_argument("--out", type=Path, metavar="CSV", help="default: leaderboard.csv in the runs folder")
    build.add_argument("--json", action="store_true")
    _add_runs_option(build)
    build.set_defaults(command=_leaderboard_build)


def _add_data(commands: Any) -> None:
    group = commands.add_parser("data", help="check, prepare or make up data", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    for verb, text, command in (
        ("check", "open and check every file of a task", _data_check),
        ("prepare", "fill the cache that runs read from", _data_prepare),
        ("phantom", "write a phantom in the task's exact layout", _data_phantom),
    ):
        parser = verbs.add_parser(verb, help=text, allow_abbrev=False)
        parser.add_argument("task", metavar="TASK")
        _add_plugin_option(parser)
        if verb == "phantom":
            parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
            parser.add_argument("--cases", type=int, metavar="N", help="default: the task's own number")
            parser.add_argument("--seed", type=_seed, default=0, metavar="N")
        else:
            _add_data_option(parser)
            _add_runs_option(parser)
        parser.set_defaults(command=command)


def _add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("HARNESS_DATA") or None,
        metavar="DIR",
        help="the task's folder or the one that contains it (default: $HARNESS_DATA, else a phantom)",
    )


def _add_runs_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=Path,
        default=os.environ.get("HARNESS_RUNS") or "runs",
        metavar="DIR",
        help="where runs and caches are kept (default: $HARNESS_RUNS, else ./runs)",
    )


def _add_plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE|MODULE",
        dest="plugins",
        help="Python file or module with methods, backbones or tasks of your own; its code is run",
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _run(arguments: argparse.Namespace) -> None:
    from harness.run import Request, run

    if not 0 < arguments.label_fraction <= 1:
        raise UserError(f"--label-fraction {arguments.label_fraction:g} is not in 0..1: give for instance 0.1")
    request = Request(
        **{name: getattr(arguments, name) for name in ("method", "task", "backbone", "preset", "seed", "data", "runs")},
        label_fraction=arguments.label_fraction,
        settings=tuple(arguments.settings),
        plugins=tuple(arguments.plugins),
    )
    if arguments.dry_run:
        _dry_run(request, arguments.json)
        return
    finished = run(request)
    if arguments.json:
        print(json.dumps(finished.record, indent=1))
        return
    from leaderboards import records, table

    runs, problems = records.load_runs([request.runs])
    for problem in problems:
        print(f"harness: left out of the table: {problem}", file=sys.stderr)
    csv = request.runs / "leaderboard.csv"
    table.write_csv(table.build(runs), csv)
    mine = records.load_run(finished.folder).table
    print(f"\n{table.render(table.build([run for run in runs if run.table == mine]))}\n")
    print("this run was finished before, nothing was computed" if finished.again else "files of this run:")
    for path in sorted(path for path in finished.folder.rglob("*") if path.is_file()):
        print(f"  {path}")
    print(f"leaderboard of all runs:\n  {csv}")


def _dry_run(request: Any, as_json: bool) -> None:
    from harness.config import parse_overrides, resolve
    from harness.registry import Registry
    from harness.run import check_fit, plan
    from harness.stages import Plugins

    registry = Registry(request.plugins)
    task = registry.task(request.task)
    names = {name: getattr(request, name) for name in ("method", "backbone", "preset", "seed", "label_fraction")}
    config = resolve(registry, task, overrides=parse_overrides(request.settings), **names)
    check_fit(
        registry,
        config,
        Plugins(registry.load("method", config.method), registry.load("backbone", config.backbone)),
        task,
    )
    found: dict[str, Any] = {"config": config.model_dump(mode="json"), "data": "phantom, written when it runs"}
    if request.data is not None:
        setting = plan(request, registry, task, task.find(request.data))
        found["data"] = f"{len(setting.train)} training cases ({len(setting.label_cases)} with labels used), "
        found["data"] += f"{len(setting.test)} test cases, fingerprint {setting.fingerprint}"
        found["run_id"] = setting.run_id
        found["finished"] = (request.runs / setting.run_id / "record.json").exists()
    print(json.dumps(found, indent=1) if as_json else _lines(found))


def _sweep(arguments: argparse.Namespace) -> int:
    from harness import sweep
    from harness.run import Request
    from leaderboards import records, table

    # Method and task stand in the file; these are not names that anything has.
    base = Request(method="", task="", data=arguments.data, runs=arguments.runs, plugins=tuple(arguments.plugins))
    cells = sweep.read(arguments.file, base)
    todo, outcomes = sweep.sort_out(cells)
    finished, refused = (sum((o.folder is None) == bad for o in outcomes) for bad in (False, True))
    print(f"{len(cells)} cells: {finished} finished before, {len(todo)} to run, {refused} that cannot run", flush=True)
    for outcome in outcomes:
        if outcome.problem:
            print(f"  cannot run: {outcome.cell}: {outcome.problem}")
    if arguments.dry_run:
        print(*(f"  to run: {cell}" for cell in todo), sep="\n")
        return 2 if refused else 0
    for number, outcome in enumerate(
        sweep.execute(todo, arguments.jobs, arguments.runs / "sweeps" / arguments.file.stem), 1
    ):
        outcomes.append(outcome)
        print(
            f"[{number}/{len(todo)}] {outcome.problem or 'done'}: {outcome.cell}, {outcome.seconds:.0f} s", flush=True
        )
    runs = [records.load_run(outcome.folder) for outcome in outcomes if outcome.folder is not None]
    csv = arguments.runs / "sweeps" / f"{arguments.file.stem}.csv"
    table.write_csv(table.build(runs), csv)
    print(f"\n{table.render(table.build(runs))}\n\nleaderboard of this sweep:\n  {csv}")
    failed = [outcome for outcome in outcomes if outcome.folder is None]
    for outcome in failed:
        print(f"harness: error: no record of {outcome.cell}: {outcome.problem}", file=sys.stderr)
    return 2 if failed else 0


def _list(arguments: argparse.Namespace) -> None:
    from harness.presets import preset_names, read_preset
    from harness.registry import KINDS, Registry

    registry = Registry(arguments.plugins)
    kinds = [f"{kind}s" for kind in KINDS] + ["presets"]
    if arguments.kind is not None and arguments.kind not in kinds:
        raise unknown("kind to list", arguments.kind, kinds)
    found = {}
    for kind in kinds if arguments.kind is None else [arguments.kind]:
        if kind == "presets":
            found[kind] = [{"name": name, **read_preset(name)} for name in preset_names()]
        else:
            found[kind] = registry.describe(kind.removesuffix("s"))
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for kind, rows in found.items():
        print(f"{kind}:")
        for row in rows:
            print(f"  {row['name']}: {row['description']}")
            rest = {key: value for key, value in row.items() if key not in ("name", "description", "origin")}
            for key, value in rest.items():
                if value not in ("", [], (), {}) or key in ("trains", "needs"):
                    print(f"      {key}: {_inline(value) or 'nothing'}")


def _show(arguments: argparse.Namespace) -> None:
    from leaderboards import records, table

    named = Path(arguments.run)
    folders = (
        [named]
        if (named / "record.json").exists()
        else sorted(
            path.parent for path in arguments.runs.glob("*/record.json") if path.parent.name.startswith(arguments.run)
        )
    )
    if len(folders) != 1:
        known = [path.parent.name for path in arguments.runs.glob("*/record.json")]
        if not folders:
            raise unknown(f"run in {arguments.runs}", arguments.run, known)
        raise UserError(f"{arguments.run!r} begins {len(folders)} run ids: {', '.join(f.name for f in folders)}")
    try:
        run = records.load_run(folders[0])
    except records.RecordError as error:
        raise UserError(str(error)) from None
    if arguments.json:
        print(json.dumps(run.record, indent=1))
        return
    print(table.render(table.build([run])))
    shown = (
        "run_id",
        "config",
        "data",
        "transfer",
        "timing",
        "memory",
        "computed_with",
        "environment",
        "metric_policy",
    )
    print(_lines({name: run.record.get(name) for name in shown}))


def _leaderboard_build(arguments: argparse.Namespace) -> int:
    from leaderboards import records, table

    if not arguments.runs.is_dir():
        raise UserError(f"--runs {arguments.runs} is not a folder: give the folder that holds the runs")
    runs, problems = records.load_runs([arguments.runs])
    if not runs and not problems:
        raise UserError(f"no finished run in {arguments.runs}: `harness run` makes one")
    frame = table.build(runs)
    out = arguments.out or arguments.runs / "leaderboard.csv"
    table.write_csv(frame, out)
    if arguments.json:
        print(frame.to_json(orient="records", indent=1))
    else:
        print(f"{table.render(frame)}\n\n{len(runs)} runs, {len(frame)} rows:\n  {out}")
    for problem in problems:
        print(f"harness: error: left out: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _data_check(arguments: argparse.Namespace) -> int:
    from harness.images import load_case
    from harness.progress import progress
    from harness.registry import Registry

    task = Registry(arguments.plugins).task(arguments.task)
    cases = task.cases(task.find(_given(arguments)))
    problems = []
    for case in progress(cases, "check"):
        try:
            load_case(task, case)
        except UserError as error:
            problems.append(str(error))
    print(*problems, sep="\n", end="\n" if problems else "")
    train, test = task.split(cases)
    print(f"{len(cases)} cases, {len(train)} for training and {len(test)} for testing; {len(problems)} with a problem")
    return 2 if problems else 0


def _data_prepare(arguments: argparse.Namespace) -> None:
    from harness.registry import Registry
    from harness.run import find_data, writable
    from harness.volumes import digest_cases, fingerprint, prepare

    task = Registry(arguments.plugins).task(arguments.task)
    cache = writable(arguments.runs) / "cache"
    cases = task.cases(find_data(task, arguments.data, arguments.runs))
    digests = digest_cases(cases, cache)
    volumes = prepare(task, cases, digests, cache)
    print(f"{len(volumes)} cases prepared in {volumes[0].stem.parent}, fingerprint {fingerprint(digests)}")


def _data_phantom(arguments: argparse.Namespace) -> None:
    from harness.phantom import write_phantom
    from harness.registry import Registry

    task = Registry(arguments.plugins).task(arguments.task)
    number = task.phantom_cases if arguments.cases is None else arguments.cases
    if number < 2:
        raise UserError(f"--cases {number}: a phantom needs at least 2 cases, one to train and one to test")
    write_phantom(task, arguments.out, number, arguments.seed)
    print(f"{number} phantom cases of {task.name} in {arguments.out}")


def _given(arguments: argparse.Namespace) -> Path:
    if arguments.data is None:
        raise UserError("no data to check: give --data DIR or set HARNESS_DATA")
    if not Path(arguments.data).is_dir():
        raise UserError(f"--data {arguments.data} is not a folder: give the task's folder or the one that contains it")
    return Path(arguments.data)


def _lines(value: Any, indent: int = 0) -> str:
    """Nested values, one a line."""
    pad, lines = " " * indent, []
    for key, item in value.items():
        if isinstance(item, dict) and item and any(isinstance(inner, dict) for inner in item.values()):
            lines += [f"{pad}{key}:", _lines(item, indent + 2)]
        else:
            lines.append(f"{pad}{key}: {_inline(item)}")
    return "\n".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        text = ", ".join(map(_inline, value))
        return text if len(text) <= 160 else f"{len(value)} entries, {text[:120]} ..."
    return str(value)
