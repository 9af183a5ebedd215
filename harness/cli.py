"""The `harness` command. Torch is imported only by what needs it."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from harness import actions, data_actions
from harness.errors import UserError
from harness.execution import STOPPED, Interrupted, catching
from harness.tracking import TRACKERS

# Errors of the file system that are the user's to mend: no permission, read-only, full, a file where a folder is due, a
# name that is too long or a link to itself.
MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}
MENDABLE |= {errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY}


class _Parser(argparse.ArgumentParser):
    """One line on stderr instead of the usage, and near matches for a misspelt command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what is allowed")


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user can mend it, 75 stopped by a signal; a fault of ours raises (status 1)."""
    try:
        arguments = _parser().parse_args(words)
        with catching():
            status: int | None = arguments.command(arguments)
        return status or 0
    except UserError as error:
        print("harness: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"harness: stopped by {error or 'Ctrl-C'}; the same command goes on from there", file=sys.stderr)
        return STOPPED
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
    _add_check_method(commands)
    _add_profile(commands)
    _add_estimate(commands)
    _add_list(commands)
    _add_show(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_reproduce(commands)
    _add_leaderboard(commands)
    _add_data(commands)
    _add_runs(commands)
    _add_doctor(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="pre-train, fine-tune, evaluate, record", allow_abbrev=False)
    _add_request_options(run, required=True)
    run.add_argument("--save-predictions", action="store_true", help="write the test cases' label maps as NIfTI")
    _add_execution_options(run)
    run.add_argument(
        "--until", default="", choices=["pretrain"], help="leave after that stage; runs that share it find it there"
    )
    run.add_argument("--dry-run", action="store_true", help="resolve and check everything, compute nothing")
    run.add_argument("--json", action="store_true", help="print the record as one JSON document")
    run.set_defaults(command=actions.run)


def _add_execution_options(run: argparse.ArgumentParser) -> None:
    """How a run is carried out; the same run goes on under other ones."""
    run.add_argument(
        "--checkpoint-minutes",
        type=_minutes,
        default=10.0,
        metavar="M",
        help="between checkpoints of a training stage (default: 10)",
    )
    run.add_argument(
        "--micro-batches",
        type=_positive,
        default=0,
        metavar="N",
        help="compute each batch in N parts one after the other, for the same result in less memory",
    )
    run.add_argument(
        "--on-nonfinite",
        default="stop",
        choices=["stop", "skip"],
        help="a loss or gradient that is not finite ends the run (default), or its step is left out and counted",
    )
    run.add_argument(
        "--tracker",
        action="append",
        default=[],
        choices=list(TRACKERS),
        dest="trackers",
        help="where the values of every step go as well, also several; a tracker's failure never stops a run",
    )


def _add_estimate(commands: Any) -> None:
    estimate = commands.add_parser(
        "estimate", help="hours, memory and disk of a run or sweep, from a few measured steps", allow_abbrev=False
    )
    estimate.add_argument("--sweep", type=Path, metavar="FILE.toml", help="all cells of a sweep file, see sweeps/")
    estimate.add_argument("--jobs", type=_positive, default=1, metavar="N", help="of the sweep (default: 1)")
    _add_request_options(estimate, required=False)
    estimate.add_argument("--json", action="store_true", help="print the estimates as one JSON document")
    estimate.set_defaults(command=_later("cost_actions", "estimate"), save_predictions=False)


def _add_request_options(run: argparse.ArgumentParser, required: bool) -> None:
    """All that determines a run."""
    run.add_argument("--method", required=required, metavar="M", help="`harness list methods`")
    run.add_argument(
        "--task", required=required, metavar="T", help="`harness list tasks`, or a Decathlon or nnU-Net folder"
    )
    run.add_argument("--backbone", default="unet", metavar="B", help="`harness list backbones` (default: unet)")
    run.add_argument("--preset", default="demo", metavar="P", help="`harness list presets` (default: demo)")
    run.add_argument(
        "--mode",
        default="task-specific",
        choices=["task-specific", "generic"],
        help="pre-train on the task's own training cases, or on corpora",
    )
    run.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME|DIR[=LOW,HIGH]",
        dest="corpora",
        help="what generic mode pre-trains on, also several: `harness list corpora`, or a folder of scans; with a window",
    )
    run.add_argument("--skip-bad", action="store_true", help="leave out scans of a corpus that cannot be used, counted")
    run.add_argument(
        "--allow-overlap", action="store_true", help="pre-train although scans are test cases; every table says so"
    )
    run.add_argument(
        "--split",
        default="fixed",
        metavar="fixed|K/N|same",
        help="80/20 (default), fold K of N, or train and test on the same cases, a plumbing check",
    )
    run.add_argument(
        "--protocol",
        default="finetune",
        choices=["finetune", "frozen", "linear"],
        help="what is trained with labels: all, all but the encoder, or one layer on the frozen encoder",
    )
    run.add_argument("--seed", type=_seed, default=0, metavar="N")
    run.add_argument("--label-fraction", type=float, default=1.0, metavar="F", help="share of the training labels")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="method.*, backbone.*, task.*, pretrain.*, finetune.*, evaluate.*; for instance pretrain.steps=200",
    )
    _add_data_option(run)
    _add_runs_option(run)
    _add_plugin_option(run)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="many runs from one file", allow_abbrev=False)
    sweep.add_argument("file", type=Path, metavar="FILE.toml", help="see sweeps/ for examples")
    sweep.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    sweep.add_argument(
        "--launcher",
        default="local",
        choices=["local", "slurm"],
        help="where they run (default: local, on this machine)",
    )
    sweep.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit: partition, timeout_min, mem_gb, cpus_per_task, gpus_per_node, ...; also several",
    )
    sweep.add_argument("--processes", type=_positive, default=1, metavar="N", help="that share each run (default: 1)")
    sweep.add_argument("--retry", action="store_true", help="run again what failed in an earlier sweep of this file")
    _add_execution_options(sweep)
    _add_data_option(sweep)
    _add_runs_option(sweep)
    _add_plugin_option(sweep)
    sweep.add_argument("--dry-run", action="store_true", help="list the cells, with what each takes; run none")
    sweep.set_defaults(command=_later("sweep_actions", "run"))


def _add_check_method(commands: Any) -> None:
    check = commands.add_parser("check-method", help="does a method keep the contract?", allow_abbrev=False)
    check.add_argument("method", metavar="NAME|FILE", help="an installed method, or a Python file with methods")
    check.add_argument("--backbone", action="append", metavar="B", dest="backbones", help="default: all that can serve")
    check.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="method.*, for instance method.noise=1",
    )
    _add_plugin_option(check)
    check.add_argument("--json", action="store_true")
    check.set_defaults(command=actions.check_method)


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser("profile", help="what a training step costs", allow_abbrev=False)
    profile.add_argument("--sweep", type=Path, metavar="FILE.toml", help="the cells of a sweep file, see sweeps/")
    for name, metavar, text in (
        ("method", "M", "`harness list methods`"),
        ("backbone", "B", "`harness list backbones` (default: unet)"),
        ("crop", "X,Y,Z", "extent of a crop (default: the preset's)"),
        ("batch", "N", "crops per step (default: the preset's)"),
        ("precision", "fp32|bf16", "default: auto"),
    ):
        many = {"batch": "batches", "precision": "precisions"}.get(name, f"{name}s")
        profile.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, dest=many, help=f"{text}; also several"
        )
    profile.add_argument("--task", metavar="T", help="gives channels, crop and batch: `harness list tasks`")
    profile.add_argument("--preset", default="demo", metavar="P", help="`harness list presets` (default: demo)")
    profile.add_argument("--stage", default="pretrain", choices=["pretrain", "finetune"])
    profile.add_argument(
        "--compare",
        nargs="+",
        metavar="VARIANT",
        help="settings that the method has a name for, side by side, for instance whole partial",
    )
    profile.add_argument("--rounds", type=_positive, default=5, metavar="N", help="of all cells in turn (default: 5)")
    profile.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="as in `harness run`"
    )
    profile.add_argument("--out", type=Path, metavar="CSV", help="default: profiles/NAME.csv in the runs folder")
    _add_runs_option(profile)
    _add_plugin_option(profile)
    profile.add_argument("--json", action="store_true", help="print the rows as one JSON document")
    profile.set_defaults(command=_later("cost_actions", "profile"))


def _add_list(commands: Any) -> None:
    listing = commands.add_parser("list", help="methods, backbones, tasks, presets", allow_abbrev=False)
    listing.add_argument(
        "kind", nargs="?", metavar="KIND", help="methods, backbones, tasks or presets; all if left out"
    )
    _add_plugin_option(listing)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=actions.list_plugins)


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="a finished run", allow_abbrev=False)
    show.add_argument("run", metavar="RUN", help="run id, its beginning, or a run folder")
    _add_runs_option(show)
    show.add_argument("--json", action="store_true")
    show.set_defaults(command=actions.show)


def _add_leaderboard(commands: Any) -> None:
    group = commands.add_parser("leaderboard", help="tables from records", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    build = verbs.add_parser("build", help="one CSV and a table from all finished runs", allow_abbrev=False)
    build.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help=".csv, .md or .tex, also several (default: leaderboard.csv in the runs folder)",
    )
    build.add_argument("--json", action="store_true")
    _add_reported_option(build)
    compare = verbs.add_parser("compare", help="two methods, or two runs, case by case", allow_abbrev=False)
    compare.add_argument("first", metavar="A", help="a method as the tables name it, or a run id")
    compare.add_argument("second", metavar="B")
    compare.add_argument("--out", type=Path, metavar="CSV", help="every case and target")
    ranks = verbs.add_parser("ranks", help="how often each method holds each rank", allow_abbrev=False)
    efficiency = verbs.add_parser("efficiency", help="Dice over label fractions, and its area", allow_abbrev=False)
    check = verbs.add_parser("validate", help="check records and CSVs from anywhere", allow_abbrev=False)
    check.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="CSVs, records, run folders, folders of runs, sites"
    )
    _add_runs_option(check)
    check.set_defaults(command=_later("board_actions", "check"))
    for parser, command in ((build, "build"), (compare, "compare_two"), (ranks, "ranks"), (efficiency, "efficiency")):
        _add_records(parser, command)
    _add_publish(verbs)
    _add_panels(verbs)


def _add_publish(verbs: Any) -> None:
    publish = verbs.add_parser("publish", help="a static site that opens from disk", allow_abbrev=False)
    publish.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one published before")
    publish.add_argument("--title", default="Leaderboard", metavar="TEXT")
    publish.add_argument("--note", type=Path, metavar="FILE", help="a text that stands above the tables")
    publish.add_argument(
        "--without-scans",
        action="store_false",
        dest="pictures",
        help="leave out pictures of scans, where the licence of the data forbids to pass them on",
    )
    _add_reported_option(publish)
    _add_records(publish, "publish")


def _add_panels(verbs: Any) -> None:
    panels = verbs.add_parser("panels", help="cases side by side, as several runs segment them", allow_abbrev=False)
    panels.add_argument("names", nargs="+", metavar="RUN", help="run ids; runs that kept their predictions")
    panels.add_argument("--case", action="append", default=[], metavar="CASE", dest="cases", help="default: three")
    panels.add_argument("--out", type=Path, required=True, metavar="PNG|SVG")
    _add_data_option(panels)
    _add_plugin_option(panels)
    _add_records(panels, "panels")


def _add_records(parser: argparse.ArgumentParser, command: str) -> None:
    """Where the records come from, and what is done with them."""
    _add_runs_option(parser)
    parser.add_argument(
        "--from",
        action="append",
        type=Path,
        metavar="DIR",
        dest="folders",
        help="a folder of runs to merge, also several, of other labs too (default: the runs folder)",
    )
    parser.set_defaults(command=_later("board_actions", command))


def _later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """The command of that name; what its module imports is imported when it is called."""

    def command(arguments: argparse.Namespace) -> int:
        status: int = getattr(import_module(f"harness.{module}"), name)(arguments)
        return status

    return command


def _add_reported_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with-reported",
        action="store_true",
        help="show what papers report for these tasks beside the measured rows, never ranked with them",
    )


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="segment new images with a finished run", allow_abbrev=False)
    predict.add_argument("--run", required=True, metavar="RUN", help="run id, its beginning, or a run folder")
    predict.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="IN ... OUT",
        help="an image, or one per channel in the task's order, and the file to write; or a folder and a folder",
    )
    _add_runs_option(predict)
    _add_plugin_option(predict)
    predict.set_defaults(command=actions.predict)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="a finished run's weights, with a model card", allow_abbrev=False)
    export.add_argument("--run", required=True, metavar="RUN", help="run id, its beginning, or a run folder")
    export.add_argument(
        "--format",
        required=True,
        choices=["monai", "safetensors", "onnx"],
        dest="kind",
        help="for MONAI's own network, as the run left them, or as a graph",
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: ./RUN-FORMAT)")
    _add_runs_option(export)
    _add_plugin_option(export)
    export.set_defaults(command=actions.export)


def _add_reproduce(commands: Any) -> None:
    reproduce = commands.add_parser(
        "reproduce", help="the command of a run, what differs here, and the run again", allow_abbrev=False
    )
    reproduce.add_argument("run", metavar="RUN_ID|RECORD", help="run id, its beginning, a run folder or a record.json")
    reproduce.add_argument("--go", action="store_true", help="run it, and compare every case")
    reproduce.add_argument(
        "--into", type=Path, default=Path("reproduced"), metavar="DIR", help="its runs folder (default: ./reproduced)"
    )
    reproduce.add_argument(
        "--corpus", action="append", default=[], metavar="NAME|DIR[=LOW,HIGH]", dest="corpora", help="where it is here"
    )
    _add_data_option(reproduce)
    _add_runs_option(reproduce)
    _add_plugin_option(reproduce)
    reproduce.set_defaults(command=actions.reproduce)


def _add_runs(commands: Any) -> None:
    group = commands.add_parser("runs", help="what is in a runs folder, and what can go", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    listing = verbs.add_parser("list", help="all runs, and where each of them is", allow_abbrev=False)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_later("care_actions", "listed"))
    collect = verbs.add_parser("gc", help="remove checkpoints that finished runs no longer need", allow_abbrev=False)
    collect.add_argument("--yes", action="store_true", help="without asking")
    collect.set_defaults(command=_later("care_actions", "collect"))
    for parser in (listing, collect):
        _add_runs_option(parser)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="what is wrong here, or will be", allow_abbrev=False)
    doctor.add_argument("--fix", action="store_true", help="remove what a crash left, and what is damaged")
    _add_runs_option(doctor)
    _add_plugin_option(doctor)
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(command=_later("care_actions", "examine"))


def _add_data(commands: Any) -> None:
    group = commands.add_parser("data", help="check, prepare, fetch or make up data", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    for verb, text, command in (
        ("check", "open and check every file of a task or corpus, and write a report", data_actions.check),
        ("prepare", "fill the cache that runs read from, and verify what is there", data_actions.prepare),
        ("fetch", "bring a public data set, or say where to register for it", data_actions.fetch),
        ("phantom", "write a phantom in the exact layout of a task or corpus", data_actions.phantom),
    ):
        parser = verbs.add_parser(verb, help=text, allow_abbrev=False)
        parser.add_argument("task", metavar="TASK", help="a task, a corpus, or a folder of either kind")
        _add_plugin_option(parser)
        if verb == "phantom":
            parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
            parser.add_argument("--cases", type=int, metavar="N", help="default: the task's own number")
            parser.add_argument("--seed", type=_seed, default=0, metavar="N")
        else:
            _add_data_option(parser)
        if verb in ("check", "prepare"):
            _add_runs_option(parser)
        if verb == "check":
            parser.add_argument(
                "--report", type=Path, metavar="HTML", help="default: checks/TASK.html in the runs folder"
            )
        if verb == "fetch":
            parser.add_argument(
                "--url", metavar="URL", help="another address of the same archive; its MD5 sum must be right"
            )
            parser.add_argument("--keep", action="store_true", help="keep the archive after unpacking it")
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


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes, 0 or more")
    return minutes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
