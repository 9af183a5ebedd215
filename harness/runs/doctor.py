"""Checks of an installation and a runs folder: environment, devices, disk, plugins, caches, and files left by crashes."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from harness.api.registry import PLURAL, Registry
from harness.api.task import Case
from harness.compute.devices import computes_in_bf16, new_accelerator
from harness.data.volumes import Volume, verify_volumes
from harness.runs.cleanup import size_on_disk, unfinished
from harness.runs.locate import writable_folder
from harness.system.errors import UserError
from harness.system.locks import dead_locks, holders
from harness.training.stage_files import read_stage

TESTED = {
    "torch": "2.14",
    "torchvision": "0.29",
    "monai": "1.6",
    "accelerate": "1.15",
    "timm": "1.0",
    "nibabel": "5.4",
    "numpy": "2.4",
    "scipy": "1.17",
}
"""Versions with which the whole test suite has passed."""

LOW_DISK = 5 * 2**30  # bytes of free disk space; with less, a run may not fit


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: ok, note (worth knowing) or FAIL.
        what: name of the check.
        fix: paths that --fix removes.
    """

    status: str
    what: str
    detail: str
    fix: tuple[Path, ...] = ()


def examine(runs: Path, plugins: tuple[str, ...]) -> Iterator[Finding]:
    """Run all checks, the most important first. Each finding is yielded as soon as it is known."""
    yield from packages()
    yield from device()
    yield from disk(runs)
    yield from loaded_plugins(plugins)
    if runs.is_dir():
        yield from preprocessed_cache(runs)
        yield from pretrainings(runs)
        yield from remains(runs)


def packages() -> Iterator[Finding]:
    """Whether the required packages can be imported, and whether their versions were tested."""
    yield Finding("ok", "python", platform.python_version())
    for name, tested in TESTED.items():
        try:
            installed = version(name)
            importlib.import_module(name)
        except PackageNotFoundError:
            yield Finding("FAIL", name, f"is not installed: pip install -e . brings it ({tested} was tested)")
        # An import may raise any error, for example if a library is missing or versions do not fit each other.
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            yield Finding(
                "FAIL", name, f"cannot be imported, {type(error).__name__}: {text}; install all in one command"
            )
        else:
            other = "" if installed.startswith(f"{tested}.") or installed == tested else f"; {tested} was tested"
            yield Finding("note" if other else "ok", name, f"{installed}{other}")


def device() -> Iterator[Finding]:
    """The GPUs or CPU that runs use, their free memory in GiB, and their precision."""
    try:
        device = new_accelerator().device
    # Drivers and launchers may raise any error.
    except Exception as error:
        yield Finding("FAIL", "device", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            free, capacity = (amount / 2**30 for amount in torch.cuda.mem_get_info(number))
            name = torch.cuda.get_device_name(number)
            status = "note" if free < 0.8 * capacity else "ok"
            yield Finding(status, f"gpu {number}", f"{name}, {free:.1f} of {capacity:.1f} GiB free, {precision}")
    else:
        cores = os.cpu_count()
        yield Finding(
            "note",
            "device",
            f"no GPU that torch can use: {torch.get_num_threads()} threads of {cores} cores, {precision}",
        )


def disk(runs: Path) -> Iterator[Finding]:
    """Whether the runs folder can be written, and its free disk space in GiB."""
    try:
        writable_folder(runs)
    except UserError as error:
        yield Finding("FAIL", "runs folder", str(error))
        return
    usage = shutil.disk_usage(runs)
    text = f"{runs.resolve()}: {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    yield Finding("note" if usage.free < LOW_DISK else "ok", "runs folder", text)


def loaded_plugins(extra: tuple[str, ...]) -> Iterator[Finding]:
    """Whether every plugin loads. A plugin that does not is named, with the file or package it came from."""
    try:
        registry = Registry(extra)
    except UserError as error:
        yield Finding("FAIL", "plugins", str(error))
        return
    for kind, many in PLURAL.items():
        names = registry.names(kind)
        broken = 0
        for name in names:
            try:
                registry.load(kind, name)
            except UserError as error:
                broken += 1
                yield Finding("FAIL", f"{kind} {name}", str(error))
        yield Finding("ok", many, f"{len(names) - broken} load")


def preprocessed_cache(runs: Path) -> Iterator[Finding]:
    """Whether the files of preprocessed volumes still have the bytes that were written."""
    paths = sorted(path for path in (runs / "cache" / "prepared").glob("*/*.json") if not path.name.startswith("."))
    volumes = [Volume(Case(path.stem, (), None), path.with_suffix("")) for path in paths]
    damaged = [path for path, intact in zip(paths, verify_volumes(volumes), strict=True) if not intact]
    if damaged:
        detail = f"{len(damaged)} of {len(paths)} volumes are not as they were written, {damaged[0]} among them"
        yield Finding("FAIL", "prepared volumes", f"{detail}; runs prepare them again", tuple(damaged))
    else:
        yield Finding("ok", "prepared volumes", f"{len(paths)}, all as they were written")


def pretrainings(runs: Path) -> Iterator[Finding]:
    """Whether the files of finished pre-trainings still have the bytes that were written."""
    stages = sorted((runs / "cache" / "pretrain").glob("*/stage.json"))
    damaged = [path for path in stages if read_stage(path) is None]
    if damaged:
        detail = f"{len(damaged)} of {len(stages)} are damaged, {damaged[0].parent} among them; runs pre-train again"
        yield Finding("FAIL", "pre-trainings", detail, tuple(damaged))
    else:
        yield Finding("ok", "pre-trainings", f"{len(stages)} finished, all as they were written")


def remains(runs: Path) -> Iterator[Finding]:
    """Running processes, locks whose owner is gone, unfinished files of crashes, and runs that can go on."""
    alive = holders(runs)
    for path, owner in alive:
        yield Finding("note", "at work", f"{path.parent.relative_to(runs)}: {owner}")
    dead = dead_locks(runs)
    if dead:
        text = f"{len(dead)} of processes that are gone, {dead[0].relative_to(runs)} among them; whoever needs one takes it"
        yield Finding("note", "locks", text, tuple(dead))
    left = [path for path in unfinished(runs) if not any(path.is_relative_to(lock.parent) for lock, _ in alive)]
    if left:
        size = sum(size_on_disk(path) for path in left) / 2**20
        yield Finding(
            "note", "left by a crash", f"{len(left)} files, {size:.1f} MiB, {left[0]} among them", tuple(left)
        )
    busy = {lock.parent for lock, _ in alive}
    stopped = [path.parent for path in runs.glob("*/config.json") if not (path.parent / "record.json").exists()]
    for folder in sorted(set(stopped) - busy):
        yield Finding("note", "can go on", f"{folder.name}: the command that began it goes on where it stopped")
