"""The `harness` command. Torch is imported only by what needs it."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness import actions, data_actions
from harness.board_options import add_leaderboard
from harness.errors import UserError
from harness.execution import STOPPED, Interrupted, catching
from harness.options import (
    add_data_option,
    add_execution_options,
    add_plugin_option,
    add_runs_option,
    later,
    positive,
    seed,
)

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
    add_leaderboard(commands, _Parser)
    _add_data(commands)
    _add_runs(commands)
    _add_doctor(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="pre-train, fine-tune, evaluate, record", allow_abbrev=False)
    _add_request_options(run, required=True)
    run.add_argument("--save-predictions", action="store_true", help="write the test cases' label maps as NIfTI")
    add_execution_options(run)
    run.add_argument(
        "--until", default="", choices=["pretrain"], help="leave after that stage; runs that share it find it there"
    )
    run.add_argument("--dry-run", action="store_true", help="resolve and check everything, compute nothing")
    run.add_argument("--json", action="store_true", help="print the record as one JSON document")
    run.set_defaults(command=actions.run)


def _add_estimate(commands: Any) -> None:
    estimate = commands.add_parser(
        "estimate", help="hours, memory and disk of a run or sweep, from a few measured steps", allow_abbrev=False
    )
    estimate.add_argument("--sweep", type=Path, metavar="FILE.toml", help="all cells of a sweep file, see sweeps/")
    estimate.add_argument("--jobs", type=positive, default=1, metavar="N", help="of the sweep (default: 1)")
    _add_request_options(estimate, required=False)
    estimate.add_argument("--json", action="store_true", help="print the estimates as one JSON document")
    estimate.set_defaults(command=later("cost_actions", "estimate"), save_predictions=False)


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
    run.add_argument("--seed", type=seed, default=0, metavar="N")
    run.add_argument("--label-fraction", type=float, default=1.0, metavar="F", help="share of the training labels")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="method.*, backbone.*, task.*, pretrain.*, finetune.*, evaluate.*; for instance pretrain.steps=200",
    )
    add_data_option(run)
    add_runs_option(run)
    add_plugin_option(run)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="many runs from one file", allow_abbrev=False)
    sweep.add_argument("file", type=Path, metavar="FILE.toml", help="see sweeps/ for examples")
    sweep.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
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
    sweep.add_argument("--processes", type=positive, default=1, metavar="N", help="that share each run (default: 1)")
    sweep.add_argument("--retry", action="store_true", help="run again what failed in an earlier sweep of this file")
    add_execution_options(sweep)
    add_data_option(sweep)
    add_runs_option(sweep)
    add_plugin_option(sweep)
    sweep.add_argument("--dry-run", action="store_true", help="list the cells, with what each takes; run none")
    sweep.set_defaults(command=later("sweep_actions", "run"))


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
    add_plugin_option(check)
    check.add_argument("--json", action="store_true")
    check.set_defaults(command=actions.check_method)


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser("profile", help="what a training step costs", allow_abbrev=False)
    cells = profile.add_mutually_exclusive_group()
    cells.add_argument("--sweep", type=Path, metavar="FILE.toml", help="the cells of a sweep file, see sweeps/")
    cells.add_argument("--suite", metavar="NAME", help="the cells that NAME stands for; `paper`: minutes on a GPU")
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
    profile.add_argument("--rounds", type=positive, metavar="N", help="of all cells in turn (default: 5, of a suite 3)")
    profile.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="as in `harness run`"
    )
    profile.add_argument("--out", type=Path, metavar="CSV", help="default: profiles/NAME.csv in the runs folder")
    add_runs_option(profile)
    add_plugin_option(profile)
    profile.add_argument("--json", action="store_true", help="print the rows as one JSON document")
    profile.set_defaults(command=later("cost_actions", "profile"))


def _add_list(commands: Any) -> None:
    listing = commands.add_parser("list", help="methods, backbones, tasks, presets", allow_abbrev=False)
    listing.add_argument(
        "kind", nargs="?", metavar="KIND", help="methods, backbones, tasks or presets; all if left out"
    )
    add_plugin_option(listing)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=actions.list_plugins)


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="a finished run", allow_abbrev=False)
    show.add_argument("run", metavar="RUN", help="run id, its beginning, or a run folder")
    add_runs_option(show)
    show.add_argument("--json", action="store_true")
    show.set_defaults(command=actions.show)


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
    add_runs_option(predict)
    add_plugin_option(predict)
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
    add_runs_option(export)
    add_plugin_option(export)
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
    add_data_option(reproduce)
    add_runs_option(reproduce)
    add_plugin_option(reproduce)
    reproduce.set_defaults(command=actions.reproduce)


def _add_runs(commands: Any) -> None:
    group = commands.add_parser("runs", help="what is in a runs folder, and what can go", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    listing = verbs.add_parser("list", help="all runs, and where each of them is", allow_abbrev=False)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=later("care_actions", "listed"))
    collect = verbs.add_parser("gc", help="remove checkpoints that finished runs no longer need", allow_abbrev=False)
    collect.add_argument("--yes", action="store_true", help="without asking")
    collect.set_defaults(command=later("care_actions", "collect"))
    for parser in (listing, collect):
        add_runs_option(parser)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="what is wrong here, or will be", allow_abbrev=False)
    doctor.add_argument("--fix", action="store_true", help="remove what a crash left, and what is damaged")
    add_runs_option(doctor)
    add_plugin_option(doctor)
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(command=later("care_actions", "examine"))


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
        add_plugin_option(parser)
        if verb == "phantom":
            parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
            parser.add_argument("--cases", type=int, metavar="N", help="default: the task's own number")
            parser.add_argument("--seed", type=seed, default=0, metavar="N")
        else:
            add_data_option(parser)
        if verb in ("check", "prepare"):
            add_runs_option(parser)
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
