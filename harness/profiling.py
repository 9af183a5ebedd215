"""What a training step costs, beside what the machine can do: `harness profile`. How it is timed: docs/speed.md."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harness import hardware
from harness.config import RunConfig, Training, change_task, parse_overrides
from harness.contracts import Batch, Source
from harness.crops import Augment, CropDataset
from harness.errors import UserError, unknown
from harness.planning import Request, check_fit, resolve_request
from harness.preparation import Workshop
from harness.progress import progress
from harness.protocols import fixed, with_head
from harness.registry import Registry
from harness.stages import Plugins, Segmenter, freeze
from harness.task import Case, Task
from harness.training import PHASES, UPDATE, Trainer, compiled, new_accelerator
from harness.volumes import STEPS, Volume

STAGES = ("pretrain", "finetune")
NOISY = 0.15  # spread of a round's medians above which nothing is to be believed
ROUND_SECONDS = 1.0  # that a cell is timed for per round, at least one step
LOOP_SECONDS = 5.0  # that a cell's loader is watched for
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Cell:
    """What is timed: a request, resolved; `variant` is how the method names its settings."""

    request: Request
    config: RunConfig
    task: Task
    plugins: Plugins
    stage: str
    variant: str = ""

    @property
    def settings(self) -> Training:
        """Of the stage that is timed."""
        return self.config.pretrain if self.stage == "pretrain" else self.config.finetune

    def __str__(self) -> str:
        settings = self.settings
        crop = "x".join(map(str, settings.crop))
        own = [pair for pair in self.request.settings if pair.startswith(("method.", "backbone."))]
        named = self.variant or ", ".join(own)
        return (
            f"{self.config.method}{f' ({named})' if named else ''} {self.config.backbone} {crop} batch "
            f"{settings.batch_size} {settings.precision}"
        )


@dataclass
class Measured:
    """A cell's numbers; times in seconds, one entry per step, round by round.

    Attributes:
        problem: why there are none.
        rounds: per round, phase -> seconds of each step.
        waits: of the loop with its loader, phase -> seconds of each step.
        sample_seconds: to make one sample in one process.
    """

    cell: Cell
    problem: str = ""
    flops: int = 0
    parameters: int = 0
    memory: dict[str, float | None] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    batch_bytes: int = 0
    prepare_seconds: float = 0.0
    sample_seconds: float = 0.0
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    waits: dict[str, list[float]] = field(default_factory=dict)

    def steps(self) -> list[list[float]]:
        """Seconds of each step (`UPDATE`), per round."""
        return [list(np.sum([phases[phase] for phase in UPDATE], axis=0)) for phases in self.rounds]


def resolve_cell(request: Request, stage: str = "pretrain", variant: str = "") -> Cell:
    """Names and settings of a request, checked as a run does it; no data is read.

    Raises:
        UserError: as `harness.planning.plan`; an unknown variant; or a method that does not pre-train.
    """
    registry = Registry(request.plugins)
    method = registry.load("method", request.method)
    if variant:
        if variant not in method.variants:
            raise unknown(f"variant of method {request.method!r}", variant, method.variants)
        chosen = tuple(f"{key}={value}" for key, value in method.variants[variant].items())
        request = replace(request, settings=(*request.settings, *chosen))
    if stage == "pretrain" and not method.trains:
        raise UserError(f"method {request.method!r} pre-trains nothing: choose another, or give --stage finetune")
    task = change_task(registry.task(request.task), parse_overrides(request.settings))
    config = resolve_request(request, registry, task)
    plugins = Plugins(method, registry.load("backbone", request.backbone))
    check_fit(registry, config, plugins, len(task.channels), len(task.channels))
    return Cell(request, config, task, plugins, stage, variant)


class Subject:
    """A cell ready to step: its module under the engine's own trainer, and its data."""

    def __init__(self, cell: Cell, volumes: Sequence[Any], folder: Path) -> None:
        self.cell, settings = cell, cell.settings
        torch.manual_seed(0)
        module, sources, self.prepare_seconds = _module(cell, volumes, folder)
        self.after_step = getattr(module, "after_step", None)
        self.trainer = Trainer(module, settings, 10**6, 0, new_accelerator())
        if cell.stage == "pretrain":
            module.generator = torch.Generator(self.trainer.device).manual_seed(0)
            transform = cell.plugins.method.transform(cell.config.method_settings)
            self.data = CropDataset(sources, settings.crop, 10**6, 0, transform)
        else:
            finetune = cell.config.finetune
            augment = Augment(finetune)
            self.data = CropDataset(sources, settings.crop, 10**6, 0, augment, cell.task, finetune.foreground)
        samples = [self.data[number] for number in range(settings.batch_size)]
        self.batch: Batch = torch.utils.data.default_collate(samples)
        if self.trainer.device.type == "cuda":
            self.batch = {name: value.pin_memory() for name, value in self.batch.items()}
        self.number = 0

    def step(self) -> None:
        """One step on the same batch, its phases on the clock; the wait for data is not part of it."""
        self.number += 1
        self.trainer.clock.start()
        self.trainer.clock.lap()
        self.trainer.step(self.number, self.batch, self.after_step)

    def timed(self, number: int) -> dict[str, list[float]]:
        """Seconds per phase of so many steps; on a GPU the device is waited for after the last one only."""
        clock = self.trainer.clock
        clock.read()
        for values in clock.seconds.values():
            values.clear()
        for _ in range(number):
            self.step()
        clock.read()
        return {phase: list(values) for phase, values in clock.seconds.items()}

    def loop(self, number: int) -> dict[str, list[float]]:
        """As `timed`, with batches of the loader, after those that its workers make in advance."""
        clock, ahead = self.trainer.clock, 2 * self.cell.settings.workers + 1
        for values in clock.seconds.values():
            values.clear()
        clock.start()
        for batch in islice(self.trainer.loader(self.data), number + ahead):
            clock.lap()
            self.number += 1
            self.trainer.step(self.number, batch, self.after_step)
            clock.start()
        clock.marks.pop()
        clock.read()
        return {phase: values[ahead:] for phase, values in clock.seconds.items()}


def _module(cell: Cell, volumes: Sequence[Any], folder: Path) -> tuple[Any, Sequence[Any], float]:
    """What is trained, what to draw samples from, and the seconds that the method's preparation takes."""
    config, channels = cell.config, len(cell.task.channels)
    backbone = cell.plugins.new_backbone(config, channels)
    if cell.stage == "finetune":
        network = with_head(backbone, cell.task.num_outputs, config.protocol)
        return Segmenter(network, cell.task.overlapping, fixed(network, config.protocol)), volumes, 0.0
    method = cell.plugins.method(config.method_settings, backbone)
    freeze(method)
    device = new_accelerator().device
    workshop = _ShortWorkshop(0, device, config.pretrain.crop, config.pretrain, [str(cell), channels], folder)
    began = time.perf_counter()
    sources = method.prepare(volumes, workshop)
    return method, sources, time.perf_counter() - began + workshop.left_out


class _ShortWorkshop(Workshop):
    """Discoveries of a few steps: a step costs the same whatever was found. `left_out`: seconds that the others take."""

    left_out = 0.0

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Any, steps: int, batch_size: int, lr: float
    ) -> None:
        some = min(steps, 4)
        began = time.perf_counter()
        super().train(module, sources, size=size, steps=some, batch_size=batch_size, lr=lr)
        self.left_out += (time.perf_counter() - began) / some * (steps - some)

    def report(self, message: str, **values: Any) -> None:
        """What was found in noise is worth no line."""


def measure(cells: Sequence[Cell], rounds: int) -> tuple[list[Measured], dict[str, list[list[float]]]]:
    """Profile cells side by side: every round times each cell and each ceiling once, in a new order.

    Returns:
        the cells, in their order, and per ceiling (`gemm fp32`, `convolution fp32`, `copy`, ...) and round its rates, in
        FLOP/s or bytes/s.
    """
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as place:
        folder = Path(place)
        found = [Measured(cell) for cell in cells]
        for each in progress(found, "memory"):
            measure_apart(each)
        subjects = _build(found, folder)
        device = new_accelerator().device
        ceilings = make_ceilings(device, {subject.trainer.precision for subject in subjects.values()})
        rates: dict[str, list[list[float]]] = {name: [] for name in ceilings}
        rng = np.random.default_rng(0)
        with progress(None, "rounds", total=rounds * (len(subjects) + len(ceilings))) as bar:
            for _ in range(rounds):
                turns: list[Any] = [*subjects, *ceilings]
                for turn in (turns[place] for place in rng.permutation(len(turns))):
                    if isinstance(turn, str):
                        rates[turn].append(ceilings[turn]())
                    else:
                        _one_round(found[turn], subjects[turn])
                    bar.update()
        for number, subject in progress(subjects.items(), "loaders"):
            _watch_loader(found[number], subject)
        return found, rates


def _build(found: Sequence[Measured], folder: Path) -> dict[int, Subject]:
    """The cells that can run, by their place, warmed up."""
    subjects = {}
    for number, each in enumerate(progress(found, "warm-up")):
        if each.problem:
            continue
        with _out_of_memory(each):
            subject = Subject(each.cell, made_up_volumes(each.cell, folder), folder / str(number))
            subject.timed(1)
            each.prepare_seconds, each.used = subject.prepare_seconds, subject.trainer.used()
            each.batch_bytes = sum(value.nbytes for value in subject.batch.values())
            subjects[number] = subject
    return subjects


def _one_round(each: Measured, subject: Subject) -> None:
    """A step that does not count, for caches that others have filled, and as many as fit the time."""
    with _out_of_memory(each), compiled(subject.trainer.module, each.cell.settings.compile):
        warm = subject.timed(1)
        step = sum(warm[phase][0] for phase in UPDATE)
        each.rounds.append(subject.timed(int(np.clip(ROUND_SECONDS / max(step, 1e-6), 1, 50))))


def _watch_loader(each: Measured, subject: Subject) -> None:
    """The training loop with its loader: what the step waits for, once the batches made in advance are used up."""
    if each.problem:
        return
    began = time.perf_counter()
    samples = [subject.data[10**5 + number] for number in range(each.cell.settings.batch_size)]
    each.sample_seconds = (time.perf_counter() - began) / len(samples)
    median = float(np.median(np.concatenate(each.steps())))
    each.waits = subject.loop(int(np.clip(LOOP_SECONDS / median, 4, 100)))


@contextmanager
def _out_of_memory(each: Measured) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        each.problem = OUT_OF_MEMORY
    except RuntimeError as error:
        # Torch's CPU allocator has no class of its own.
        if "can't allocate memory" not in str(error):
            raise
        each.problem = OUT_OF_MEMORY


def measure_apart(each: Measured) -> None:
    """Memory and FLOPs of two steps, in a process of their own: a peak is a process's, and what is left over counts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            answer = pool.submit(_two_steps, each.cell.request, each.cell.stage, torch.get_num_threads()).result()
        except BrokenProcessPool:
            answer = OUT_OF_MEMORY
    if isinstance(answer, str):
        each.problem = answer
    else:
        each.flops, each.parameters, each.memory = answer


def _two_steps(request: Request, stage: str, threads: int) -> tuple[int, int, dict[str, float | None]] | str:
    torch.set_num_threads(threads)
    cell = resolve_cell(request, stage)
    each = Measured(cell)
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as place, _out_of_memory(each):
        folder = Path(place)
        subject = Subject(cell, made_up_volumes(cell, folder), folder)
        device = subject.trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        counter = FlopCounterMode(display=False, custom_mapping={FLASH_ON_CPU: sdpa_flops})
        with counter:
            subject.timed(1)
        subject.timed(1)
        parameters = sum(parameter.numel() for parameter in subject.trainer.module.parameters())
        return counter.get_total_flops(), parameters, hardware.memory(device)
    return each.problem


FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def sdpa_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of torch's attention on a CPU, which its own counter does not know."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def made_up_volumes(cell: Cell, folder: Path, number: int = 2) -> list[Volume]:
    """Volumes of noise as the cache holds them, larger than the crop by half, with a block of every label."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = tuple(max(96, edge + edge // 2) for edge in cell.settings.crop)
    rng, channels = np.random.default_rng(0), len(cell.task.channels)
    name = f"{channels}-{'x'.join(map(str, shape))}-{cell.task.name}"
    volumes = [Volume(Case(f"{name}-{n}", (), None), folder / f"{name}-{n}") for n in range(number)]
    for volume in volumes:
        if Path(f"{volume.stem}.points.npy").exists():
            continue
        np.save(f"{volume.stem}.image.npy", rng.integers(33, STEPS, (channels, *shape), dtype=np.int16))
        label, rows = np.zeros(shape, np.uint8), []
        for target, values in enumerate(cell.task.targets.values()):
            start = (8 * target) % (shape[0] - 8)
            label[start : start + 8, 20:60, 20:60] = values[0]
            rows += [(target, start + 4, y, 40) for y in range(20, 60)]
        np.save(f"{volume.stem}.label.npy", label)
        np.save(f"{volume.stem}.points.npy", np.asarray(rows, np.int32))
    return volumes


def make_ceilings(device: torch.device, precisions: set[str]) -> dict[str, Callable[[], list[float]]]:
    """What the machine can do: a matrix product and a convolution per precision (FLOP/s), and copies (bytes/s)."""
    on_gpu = device.type == "cuda"
    edge, side = (8192, 128) if on_gpu else (2048, 48)
    found: dict[str, Callable[[], list[float]]] = {}
    for precision in sorted(precisions):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrix = torch.ones(edge, edge, dtype=dtype, device=device)
        layer = nn.Conv3d(64, 64, 3, padding=1, dtype=dtype, device=device).to(memory_format=torch.channels_last_3d)
        image = torch.ones(1, 64, side, side, side, dtype=dtype, device=device)
        image = image.to(memory_format=torch.channels_last_3d)
        found[f"gemm {precision}"] = _rate(partial(torch.matmul, matrix, matrix), 2 * edge**3, device)
        found[f"convolution {precision}"] = _rate(partial(layer, image), 2 * 27 * 64 * 64 * side**3, device)
    source = torch.ones(2**26 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    found["copy"] = _rate(lambda: target.copy_(source), 2 * source.nbytes, device)
    if on_gpu:
        host = torch.ones(2**26).pin_memory()
        found["host-to-device"] = _rate(lambda: source.copy_(host, non_blocking=True), host.nbytes, device)
    return found


def _rate(work: Callable[[], Any], amount: float, device: torch.device, times: int = 5) -> Callable[[], list[float]]:
    """A function that does the work a few times and gives the amounts per second."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext

    @torch.no_grad()
    def run() -> list[float]:
        rates = []
        for _ in range(times + 1):
            wait()
            began = time.perf_counter()
            work()
            wait()
            rates.append(amount / (time.perf_counter() - began))
        return rates[1:]

    return run


def summarise(found: Sequence[Measured], rates: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row per cell, in the columns of `leaderboards.profiles`; what could not be measured is None."""
    device = new_accelerator().device
    described = hardware.environment(device)
    machine = {
        "machine": described["gpu"] or described["cpu"],
        "device": device.type,
        "threads": described["threads"],
        "torch": described["torch"],
        "harness": described["harness"],
        "revision": described["git"]["revision"],
    }
    noise = {name: _spread(rounds) for name, rounds in rates.items()}
    first = next((each for each in found if not each.problem), None)
    return [machine | _row(each, first, rates, noise) for each in found]


def _row(
    each: Measured, first: Measured | None, rates: dict[str, list[list[float]]], noise: dict[str, float]
) -> dict[str, Any]:
    cell, settings = each.cell, each.cell.settings
    row: dict[str, Any] = {
        "stage": cell.stage,
        "method": cell.config.method,
        "variant": cell.variant,
        "backbone": cell.config.backbone,
        "task": cell.task.name,
        "channels": len(cell.task.channels),
        "crop": "x".join(map(str, settings.crop)),
        "batch_size": settings.batch_size,
        "precision": each.used.get("precision", settings.precision),
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "settings": ", ".join(cell.request.settings),
        "problem": each.problem,
    }
    if each.problem or first is None:
        return row
    steps = each.steps()
    medians = [float(np.median(values)) for values in steps]
    step = float(np.median(np.concatenate(steps)))
    every = {phase: np.concatenate([one[phase] for one in each.rounds]) for phase in PHASES}
    row |= _milliseconds("step", np.concatenate(steps))
    for phase in (*UPDATE, "transfer"):
        row |= _milliseconds(phase, every[phase])
    row |= _milliseconds("data_wait", np.asarray(each.waits["data"]))
    busy = sum(float(np.sum(each.waits[phase])) for phase in PHASES[1:])
    waited = float(np.sum(each.waits["data"]))
    rate = {name: float(np.median(np.concatenate(rounds))) for name, rounds in rates.items()}
    achieved = each.flops / float(np.median(every["forward"] + every["backward"]))
    copied = float(np.median(every["transfer"]))
    ratios = [float(np.median(one)) / mine for one, mine in zip(first.steps(), medians, strict=True)]
    mine = {name: value for name, value in noise.items() if name.endswith(row["precision"])}
    return row | {
        "samples_per_s": settings.batch_size / step,
        "first_over_this": float(np.median(ratios)),
        "first_over_this_low": min(ratios),
        "first_over_this_high": max(ratios),
        "data_wait_share": waited / (waited + busy),
        "sample_ms": each.sample_seconds * 1000,
        "workers": settings.workers,
        "workers_needed": int(np.ceil(settings.batch_size * each.sample_seconds / step)),
        "gflop": each.flops / 1e9,
        "tflop_per_s": achieved / 1e12,
        "of_gemm": achieved / rate[f"gemm {row['precision']}"],
        "of_convolution": achieved / rate[f"convolution {row['precision']}"],
        "of_copy": each.batch_bytes / copied / rate["host-to-device"] if "host-to-device" in rate else None,
        "gemm_tflop_per_s": rate[f"gemm {row['precision']}"] / 1e12,
        "convolution_tflop_per_s": rate[f"convolution {row['precision']}"] / 1e12,
        "copy_gb_per_s": rate["copy"] / 1e9,
        "host_peak_gib": each.memory.get("host_peak_gib"),
        "device_peak_gib": each.memory.get("device_peak_gib"),
        "parameters": each.parameters,
        "rounds": len(steps),
        "steps": sum(map(len, steps)),
        "spread": _spread(steps),
        "ceiling_spread": max(mine.values()),
        "noisy": max(_spread(steps), *mine.values()) > NOISY,
    }


def _milliseconds(name: str, seconds: Any) -> dict[str, float]:
    return {f"{name}_ms_p{at}": float(np.percentile(seconds, at)) * 1000 for at in (50, 95)}


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """How far the rounds' medians lie apart, of their median: what the machine did beside."""
    medians = [float(np.median(values)) for values in rounds]
    return (max(medians) - min(medians)) / float(np.median(medians))
