"""A trial: one stage of a run on made-up data, whose steps `harness profile` and `harness estimate` time."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harness.api.method import Batch, Source
from harness.api.registry import Registry
from harness.api.task import Case, Task
from harness.compute.devices import new_accelerator
from harness.compute.memory import is_out_of_memory, peak_memory
from harness.config.request import Request
from harness.config.resolve import change_task, parse_overrides, resolve
from harness.config.schema import RunConfig, Training
from harness.costs.bounds import WatchedStep
from harness.data.preprocessing import STEPS
from harness.data.volumes import Volume
from harness.system.errors import UserError, unknown
from harness.training.clock import UPDATE
from harness.training.compatibility import check_fit
from harness.training.finetune import finetune_data
from harness.training.loop import StageContext, StagePlan, TrainingLoop
from harness.training.method_preparation import PreparationContext
from harness.training.models import Plugins, new_network
from harness.training.pretrain import pretrain_data
from harness.training.protocols import fixed
from harness.training.segmenter import Segmenter
from harness.training.trainer import Trainer

OUT_OF_MEMORY = "out of memory"
FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def sdpa_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of torch's flash attention on a CPU, an operator that torch's own counter lacks."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


@dataclass(frozen=True)
class TrialSpec:
    """What a trial times: a resolved request and a stage.

    Attributes:
        stage: pretrain or finetune.
        variant: the method's name for some of its settings; empty: none.
    """

    request: Request
    config: RunConfig
    task: Task
    plugins: Plugins
    stage: str
    variant: str = ""

    @property
    def settings(self) -> Training:
        """The training settings of the stage that is timed."""
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
class TrialResult:
    """The measurements of a trial.

    Attributes:
        problem: why there are no measurements; empty where there are.
        flops: FLOPs of a step.
        memory: peaks in GiB, as `harness.compute.memory.peak_memory` gives them.
        used: precision and whatever else the trainer reports that it used.
        batch_bytes: size of a batch.
        prepare_seconds: time of `Method.prepare`.
        sample_seconds: time to make one sample in one process.
        rounds: for each round, phase -> seconds of each step.
        waits: phase -> seconds of each step of the loop with its loader; empty where the loader was not timed.
        watched: what the profiler recorded of a step on a GPU.
    """

    spec: TrialSpec
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
    watched: WatchedStep | None = None

    def steps(self) -> list[list[float]]:
        """Seconds of each step (the sum of the phases `UPDATE`), for each round."""
        return [list(np.sum([phases[phase] for phase in UPDATE], axis=0)) for phases in self.rounds]


def resolve_trial(request: Request, stage: str = "pretrain", variant: str = "") -> TrialSpec:
    """Resolve and check the names and settings of a request as a run does. No data is read.

    Raises:
        UserError: as `harness.runs.plan.plan`; an unknown variant; or a method that does not pre-train.
    """
    registry = Registry(request.plugins)
    method = registry.load("method", request.method)
    if variant:
        if variant not in method.variants:
            raise unknown(f"variant of method {request.method!r}", variant, method.variants)
        pairs = tuple(f"{key}={value}" for key, value in method.variants[variant].items())
        request = replace(request, settings=(*request.settings, *pairs))
    if stage == "pretrain" and not method.trains:
        raise UserError(f"method {request.method!r} pre-trains nothing: choose another, or give --stage finetune")
    task = change_task(registry.task(request.task), request.preset, parse_overrides(request.settings))
    config = resolve(request, registry, task)
    plugins = Plugins(method, registry.load("backbone", request.backbone))
    check_fit(registry, config, plugins, len(task.channels), len(task.channels))
    return TrialSpec(request, config, task, plugins, stage, variant)


class Trial:
    """The module of a stage in the engine's own trainer, and its data, ready to step."""

    def __init__(self, spec: TrialSpec, volumes: Sequence[Any], folder: Path) -> None:
        self.spec, settings = spec, spec.settings
        torch.manual_seed(0)
        module, sources, self.prepare_seconds = _module(spec, volumes, folder)
        self.after_step = getattr(module, "after_step", None)
        self.trainer = Trainer(module, settings, 10**6, 0, new_accelerator())
        if spec.stage == "pretrain":
            module.generator = torch.Generator(self.trainer.device)
            self.data = pretrain_data(spec.config, spec.plugins, spec.task, sources, 10**6, 0)
        else:
            self.data = finetune_data(spec.config, spec.task, volumes, 10**6, 0)
        samples = [self.data[number] for number in range(settings.batch_size)]
        self.batch: Batch = torch.utils.data.default_collate(samples)
        if self.trainer.device.type == "cuda":
            self.batch = {name: value.pin_memory() for name, value in self.batch.items()}
        self.number, self.step_seconds = 0, float("inf")

    def step(self) -> None:
        """Do one step, always on the same batch, and time its phases. The wait for data is not part of the step."""
        self.number += 1
        self.trainer.clock.start()
        self.trainer.clock.lap("data")
        self.trainer.step(self.number, [self.batch], self.after_step)

    def timed(self, number: int) -> dict[str, list[float]]:
        """Phase -> seconds of each of `number` steps. On a GPU the host waits for the device only after the last step."""
        clock = self.trainer.clock
        clock.read()
        for values in clock.seconds.values():
            values.clear()
        for _ in range(number):
            self.step()
        clock.read()
        return {phase: list(values) for phase, values in clock.seconds.items()}

    def measure_memory_and_flops(self) -> tuple[int, int, dict[str, float | None]]:
        """FLOPs of a step, number of parameters, and peaks of memory over two steps, in GiB."""
        device = self.trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        counter = FlopCounterMode(display=False, custom_mapping={FLASH_ON_CPU: sdpa_flops})
        with counter:
            self.timed(1)
        self.timed(1)
        parameters = sum(parameter.numel() for parameter in self.trainer.module.parameters())
        return counter.get_total_flops(), parameters, peak_memory(device)

    def sample_seconds(self) -> float:
        """Seconds to make one sample in one process."""
        number = self.spec.settings.batch_size
        began = time.perf_counter()
        for index in range(10**5, 10**5 + number):
            self.data[index]
        return (time.perf_counter() - began) / number

    def loop(self, number: int) -> dict[str, list[float]]:
        """Phase -> seconds of each of `number` steps of the training loop, without those whose batches were made in advance."""
        clock, ahead = self.trainer.clock, 2 * self.spec.settings.workers + 1
        for values in clock.seconds.values():
            values.clear()
        plan = StagePlan("profile", self.spec.settings, steps=number + ahead, warmup=0)
        with tempfile.TemporaryDirectory(prefix="harness-profile-") as folder:
            history = Path(folder) / "history.jsonl"
            TrainingLoop(plan, self.trainer, self.data, history, StageContext(quiet=True)).run(self.after_step)
        return {phase: values[ahead:] for phase, values in clock.seconds.items()}


def _module(spec: TrialSpec, volumes: Sequence[Any], folder: Path) -> tuple[Any, Sequence[Any], float]:
    """The module to train, the sources of its samples, and the seconds that `Method.prepare` takes."""
    config, channels = spec.config, len(spec.task.channels)
    if spec.stage == "finetune":
        network = new_network(spec.plugins.new_backbone(config, channels), spec.task, config.protocol)
        settings, frozen = config.finetune, fixed(network, config.protocol)
        segmenter = Segmenter(
            network, spec.task.overlapping, frozen, settings.dice_per_sample, settings.dice_background
        )
        return segmenter, volumes, 0.0
    method = spec.plugins.new_method(config, channels)
    device = new_accelerator().device
    preparation = _ShortPreparation(0, device, config.pretrain.crop, config.pretrain, [str(spec), channels], folder)
    preparation.task = spec.task if method.uses_labels else None
    return method, preparation.prepare(method, volumes), preparation.seconds


class _ShortPreparation(PreparationContext):
    """Trains for at most 4 steps and extrapolates the seconds: the cost of a step does not depend on earlier results."""

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Any, steps: int, batch_size: int, lr: float
    ) -> None:
        """Train for at most 4 of the steps, and add the estimated seconds of the others."""
        few_steps = min(steps, 4)
        began = time.perf_counter()
        super().train(module, sources, size=size, steps=few_steps, batch_size=batch_size, lr=lr)
        self.seconds += (time.perf_counter() - began) / few_steps * (steps - few_steps)

    def report(self, message: str, **values: Any) -> None:
        """Print nothing: a method has nothing useful to report about noise."""


@contextmanager
def out_of_memory(result: TrialResult) -> Iterator[None]:
    """Record a lack of memory as the problem of `result`, instead of raising it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result.problem = OUT_OF_MEMORY


def measure_in_new_process(result: TrialResult) -> None:
    """Measure memory and FLOPs of two steps in a new process, and write them into `result`.

    The operating system keeps one peak per process, and memory that earlier work left over would be counted.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            answer = pool.submit(_two_steps, result.spec.request, result.spec.stage, torch.get_num_threads()).result()
        except BrokenProcessPool:
            answer = OUT_OF_MEMORY
    if isinstance(answer, str):
        result.problem = answer
    else:
        result.flops, result.parameters, result.memory = answer


def _two_steps(request: Request, stage: str, threads: int) -> tuple[int, int, dict[str, float | None]] | str:
    """What `Trial.weigh` returns, measured in this process; or the problem."""
    torch.set_num_threads(threads)
    spec = resolve_trial(request, stage)
    result = TrialResult(spec)
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as temporary, out_of_memory(result):
        folder = Path(temporary)
        trial = Trial(spec, made_up_volumes(spec, folder), folder)
        return trial.measure_memory_and_flops()
    return result.problem


def made_up_volumes(spec: TrialSpec, folder: Path, number: int = 4) -> list[Volume]:
    """Write volumes of noise as the cache holds them, with a block of each label.

    An edge is 1.5 times the crop's, and at least 96 voxels. Volumes that are in `folder` already are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = tuple(max(96, edge + edge // 2) for edge in spec.settings.crop)
    rng, channels = np.random.default_rng(0), len(spec.task.channels)
    name = f"{channels}-{'x'.join(map(str, shape))}-{spec.task.name}"
    volumes = [Volume(Case(f"{name}-{index}", (), None), folder / f"{name}-{index}") for index in range(number)]
    for volume in volumes:
        if Path(f"{volume.stem}.points.npy").exists():
            continue
        np.save(f"{volume.stem}.image.npy", rng.integers(33, STEPS, (channels, *shape), dtype=np.int16))
        label, rows = np.zeros(shape, np.uint8), []
        for target, values in enumerate(spec.task.targets.values()):
            start = (8 * target) % (shape[0] - 8)
            label[start : start + 8, 20:60, 20:60] = values[0]
            rows += [(target, start + 4, y, 40) for y in range(20, 60)]
        np.save(f"{volume.stem}.label.npy", label)
        np.save(f"{volume.stem}.points.npy", np.asarray(rows, np.int32))
    return volumes
