"""What each command of `harness` does. Torch is imported only by what needs it."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.errors import UserError, unknown


def run(arguments: argparse.Namespace) -> None:
    """One run, then its table and its files."""
    from harness import run as engine

    if not 0 < arguments.label_fraction <= 1:
        raise UserError(f"--label-fraction {arguments.label_fraction:g} is not in 0..1: give for instance 0.1")
    request = engine.Request(
        **{name: getattr(arguments, name) for name in ("method", "task", "backbone", "preset", "seed", "data", "runs")},
        label_fraction=arguments.label_fraction,
        settings=tuple(arguments.settings),
        plugins=tuple(arguments.plugins),
    )
    if arguments.dry_run:
        _dry_run(request, arguments.json)
        return
    finished = engine.run(request)
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


def sweep(arguments: argparse.Namespace) -> int:
    """All cells of a file, then their table."""
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


def check_method(arguments: argparse.Namespace) -> int:
    """The conformance checks of a method or of all methods in a file."""
    from harness.config import parse_overrides
    from harness.registry import Registry

    settings = parse_overrides(arguments.settings)
    for key in settings:
        if not key.startswith("method."):
            raise UserError(f"--set {key}: check-method takes method.* only; networks have a preset of their own here")
    is_file = arguments.method.endswith(".py")
    plugins = [*arguments.plugins, *([arguments.method] if is_file else [])]
    registry = Registry(plugins)
    origin = f"--plugin {arguments.method}"
    names = [n for n in registry.names("method") if registry.plugin("method", n).origin == origin]
    if is_file and not names:
        raise UserError(f"{arguments.method} defines no method: it needs a subclass of harness.Method with a `name`")
    for name in (names := names if is_file else [arguments.method]):
        registry.plugin("method", name)
    for backbone in arguments.backbones or ():
        registry.plugin("backbone", backbone)
    from harness import conformance

    own = {key.partition(".")[2]: value for key, value in settings.items()}
    found = {}
    for name in names:
        found[name] = conformance.check_method(name, plugins, arguments.backbones, own, done=_say_result)
        if not arguments.json:
            print(f"{name}:\n{conformance.report(found[name])}\n")
    if arguments.json:
        print(json.dumps({name: [asdict(result) for result in results] for name, results in found.items()}, indent=1))
    served = {name: [result for result in results if result.status != "refused"] for name, results in found.items()}
    bad = [name for name, results in served.items() if not results or any(r.status == "FAIL" for r in results)]
    if bad:
        print(f"harness: error: {', '.join(bad)}: not every check passes, see above", file=sys.stderr)
    return 2 if bad else 0


def _say_result(result: Any) -> None:
    from harness.progress import say

    say(f"{result.backbone}: {result.check}: {result.status}")


def list_plugins(arguments: argparse.Namespace) -> None:
    """Plugins and presets, without importing torch."""
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


def show(arguments: argparse.Namespace) -> None:
    """One finished run."""
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


def leaderboard_build(arguments: argparse.Namespace) -> int:
    """All finished runs as one CSV and a table."""
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


def data_check(arguments: argparse.Namespace) -> int:
    """Open every file of a task."""
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


def data_prepare(arguments: argparse.Namespace) -> None:
    """Fill the cache of prepared volumes."""
    from harness.registry import Registry
    from harness.run import find_data, writable
    from harness.volumes import digest_cases, fingerprint, prepare

    task = Registry(arguments.plugins).task(arguments.task)
    cache = writable(arguments.runs) / "cache"
    cases = task.cases(find_data(task, arguments.data, arguments.runs))
    digests = digest_cases(cases, cache)
    volumes = prepare(task, cases, digests, cache)
    print(f"{len(volumes)} cases prepared in {volumes[0].stem.parent}, fingerprint {fingerprint(digests)}")


def data_phantom(arguments: argparse.Namespace) -> None:
    """Write a phantom."""
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
