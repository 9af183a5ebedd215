"""What each command of `harness` does. Torch is imported only by what needs it."""

import argparse
import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, unknown

if TYPE_CHECKING:
    from harness.execution import Execution
    from harness.planning import Request


def run(arguments: argparse.Namespace) -> None:
    """One run, then its table and its files."""
    from harness import run as engine
    from harness.tracking import check_trackers

    request = request_of(arguments)
    if arguments.dry_run:
        _dry_run(request, arguments.json)
        return
    check_trackers(request.how.trackers)
    if request.how.until:
        print(f"pre-trained:\n  {engine.pretrain_only(request)}")
        return
    finished = engine.run(request)
    if int(os.environ.get("RANK") or 0) > 0:
        return  # one of several processes speaks for all
    if arguments.json:
        print(json.dumps(finished.record, indent=1))
        return
    from leaderboards import board, records, table

    runs, problems = records.load_runs([request.runs])
    for problem in problems:
        print(f"harness: left out of the table: {problem}", file=sys.stderr)
    csv = request.runs / "leaderboard.csv"
    tables = board.gather(runs)
    table.write(table.build(tables), csv)
    mine = board.without_mode(records.load_run(finished.folder).table)
    print(f"\n{table.render([each for each in tables if board.without_mode(each.key) == mine])}\n")
    print("this run was finished before, nothing was computed" if finished.again else "files of this run:")
    for path in sorted(path for path in finished.folder.rglob("*") if path.is_file()):
        print(f"  {path}")
    print(f"leaderboard of all runs:\n  {csv}")


def request_of(arguments: argparse.Namespace) -> "Request":
    """What the options of a run ask for."""
    from harness.planning import Request

    if not 0 < arguments.label_fraction <= 1:
        raise UserError(f"--label-fraction {arguments.label_fraction:g} is not in 0..1: give for instance 0.1")
    return Request(
        method=arguments.method,
        task=arguments.task,
        backbone=arguments.backbone,
        preset=arguments.preset,
        seed=arguments.seed,
        label_fraction=arguments.label_fraction,
        data=arguments.data,
        runs=arguments.runs,
        settings=tuple(arguments.settings),
        plugins=tuple(arguments.plugins),
        mode=arguments.mode,
        corpora=tuple(arguments.corpora),
        split=arguments.split,
        protocol=arguments.protocol,
        skip_bad=arguments.skip_bad,
        allow_overlap=arguments.allow_overlap,
        save_predictions=arguments.save_predictions,
        how=execution_of(arguments),
    )


def execution_of(arguments: argparse.Namespace) -> "Execution":
    """How the options say that a run is carried out; as usual where the command has none."""
    from harness.execution import Execution

    names = [each.name for each in fields(Execution)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return Execution(**given | {"trackers": tuple(given.get("trackers", ()))})


def _dry_run(request: "Request", as_json: bool) -> None:
    from harness.planning import plan_without_data

    config, setting = plan_without_data(request)
    found: dict[str, Any] = {"config": config.model_dump(mode="json"), "data": "phantom, written when it runs"}
    if setting is not None:
        found["config"] = setting.config.model_dump(mode="json")
        found["data"] = f"{len(setting.train)} training cases ({len(setting.label_cases)} with labels used), "
        found["data"] += f"{len(setting.test)} test cases, fingerprint {setting.data.fingerprint}"
        found["pretrain_on"] = f"{setting.num_pretrain} scans" if setting.plugins.method.trains else "nothing"
        found["run_id"] = setting.run_id
        found["finished"] = (request.runs / setting.run_id / "record.json").exists()
    print(json.dumps(found, indent=1) if as_json else _lines(found))


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
    from harness.registry import PLURAL, Registry

    registry = Registry(arguments.plugins)
    kinds = [*PLURAL.values(), "presets"]
    if arguments.kind is not None and arguments.kind not in kinds:
        raise unknown("kind to list", arguments.kind, kinds)
    found = {}
    for kind in kinds if arguments.kind is None else [arguments.kind]:
        if kind == "presets":
            found[kind] = [{"name": name, **read_preset(name)} for name in preset_names()]
        else:
            found[kind] = registry.describe(next(one for one, many in PLURAL.items() if many == kind))
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
    from leaderboards import board, records, table

    try:
        run = records.load_run(_find_run(arguments.run, arguments.runs))
    except records.RecordError as error:
        raise UserError(str(error)) from None
    if arguments.json:
        print(json.dumps(run.record, indent=1))
        return
    print(table.render(board.gather([run])))
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
    print(*map(table.printable, _lines({name: run.record.get(name) for name in shown}).splitlines()), sep="\n")


def predict(arguments: argparse.Namespace) -> None:
    """New images through a finished run."""
    *inputs, output = arguments.paths
    if not inputs:
        raise UserError(f"predict needs images and where to write: it got {output} only; give IN ... OUT")
    folder = _find_run(arguments.run, arguments.runs)
    from harness.inference import predict_images

    for path in predict_images(folder, inputs, output, arguments.plugins):
        print(path)


def export(arguments: argparse.Namespace) -> None:
    """Weights for elsewhere."""
    folder = _find_run(arguments.run, arguments.runs)
    from harness.export import export as write

    out = arguments.out or Path(f"{folder.resolve().name}-{arguments.kind}")
    for path in write(folder, arguments.kind, out, tuple(arguments.plugins)):
        print(path)


def reproduce(arguments: argparse.Namespace) -> None:
    """The command of a run, what differs here, and with --go the run itself."""
    from leaderboards.records import RecordError, read_record
    from leaderboards.table import printable

    named = Path(arguments.run)
    path = named if named.is_file() else _find_run(arguments.run, arguments.runs) / "record.json"
    try:
        record = read_record(path)
    except RecordError as error:
        raise UserError(str(error)) from None
    from harness import reproduce as again

    found = again.look(record, arguments.data, arguments.into, arguments.plugins, arguments.corpora)
    print(*map(printable, str(found).splitlines()), sep="\n", flush=True)
    if arguments.go:
        from harness import run as engine

        finished = engine.run(found.request)
        print(again.compare(record, path.parent / "cases.csv", finished.record, finished.folder / "cases.csv"))


def _find_run(name: str, runs: Path) -> Path:
    """The folder of a finished run: by path, by id, or by the beginning of one id."""
    if (Path(name) / "record.json").exists():
        return Path(name)
    known = sorted(path.parent for path in runs.glob("*/record.json"))
    found = [folder for folder in known if folder.name.startswith(name)]
    if not found:
        raise unknown(f"run in {runs}", name, [folder.name for folder in known])
    if len(found) > 1:
        raise UserError(f"{name!r} begins {len(found)} run ids: {', '.join(folder.name for folder in found)}")
    return found[0]


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
