"""What `Method.prepare` may use: the engine's training loop, a cache for computed values, and lines in the record."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.api.method import Method, Source, VolumeSource
from harness.api.settings import Triple
from harness.api.task import Task
from harness.compute.processes import SingleProcess
from harness.config.request import DEFAULT_EXECUTION, Execution
from harness.config.schema import Training
from harness.data.crops import CropDataset
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import digest, read_json, write_atomic
from harness.system.locks import held
from harness.training.loop import StageContext, StagePlan, train


@dataclass
class PreparationContext:
    """The engine's implementation of `harness.Preparation`.

    Attributes:
        seed: of this preparation.
        device: where `train` trains.
        crop: extent of the pre-training crop in voxels.
        template: settings of pre-training; `train` takes precision, memory layout and loader workers from them.
        identity: what every cached value depends on: the method's source and version, the data, the seed.
        folder: of the cache.
        execution: options for the checkpoints of `train`.
        steps: number of optimizer steps of pre-training.
        task: of the labels, for a method that uses them.
        seconds: that the preparation took; a cached value counts with the seconds that its computation took.
        values: that `report` adds to the record.
    """

    seed: int
    device: torch.device
    crop: Triple
    template: Training
    identity: Any
    folder: Path
    execution: Execution = DEFAULT_EXECUTION
    steps: int = 0
    task: Task | None = None
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    _training_folder: Path | None = None

    def prepare(self, method: Method, volumes: Sequence[VolumeSource]) -> Sequence[Source]:
        """Call `method.prepare` and time it. Returns the sources that pre-training draws its samples from."""
        began = time.perf_counter()
        self.steps, _ = self.template.schedule(len(volumes))
        sources = method.prepare(volumes, self)
        self.seconds += time.perf_counter() - began
        return sources

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Triple, steps: int, batch_size: int, lr: float
    ) -> None:
        """Minimise the sum of the named terms of `module(batch)`, with the loop that pre-training uses, in this process alone.

        Raises:
            UserError: it is called outside `remember`.
        """
        if self._training_folder is None:
            # There, its checkpoints would be those of any other run.
            raise UserError(
                "prepare() calls preparation.train() outside preparation.remember(): call it in the function that remember() "
                "is given, so that what it trains belongs to what it depends on"
            )
        settings = self.template.model_copy(
            update={
                "steps": steps,
                "epochs": None,
                "crop": size,
                "batch_size": batch_size,
                "lr": lr,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            }
        )
        data = CropDataset(sources, size, steps * batch_size, self.seed)
        folder = self._training_folder
        folder.mkdir(parents=True, exist_ok=True)
        plan = StagePlan("prepare", settings, steps, warmup=steps // 20, seed=self.seed)
        context = StageContext(execution=self.execution)
        train(plan, module, data, folder / "history.jsonl", SingleProcess(self.device), context)

    def remember(self, name: str, depends_on: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`compute()`, or its cached value where `identity` and `depends_on` are the same. The value must be JSON."""
        path = self.folder / f"{name}-{digest([self.identity, self._computed_with, dict(depends_on)])[:16]}.json"
        with held(path, f"{name} of {path.name}"):
            began = time.perf_counter()
            cached = read_json(path)
            if isinstance(cached, dict) and {"seconds", "value"} <= set(cached):
                say(f"{name} found in {path}; it took {cached['seconds']:.1f} s")
                # The cost of a cached value is that of its computation, not that of reading the file.
                self.seconds += cached["seconds"] - (time.perf_counter() - began)
                return cached["value"]
            self._training_folder = path.with_suffix("")
            # Later random draws must not depend on whether the value was computed or cached.
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                value = compute()
            write_atomic(path, json.dumps({"seconds": time.perf_counter() - began, "value": value}))
            shutil.rmtree(self._training_folder, ignore_errors=True)
            self._training_folder = None
            return json.loads(path.read_text())["value"]

    @property
    def _computed_with(self) -> list[Any]:
        """The settings of the run that the result of `train` depends on; the number of loader workers does not change it."""
        return [self.template.precision, self.template.channels_last, self.device.type]

    def report(self, message: str, **values: Any) -> None:
        """Show one line to the user, and add `values` to the record."""
        say(message)
        self.values |= values
