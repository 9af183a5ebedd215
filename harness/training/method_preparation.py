"""What a method's `prepare` is offered: the engine's loop, a cache for what it finds, and a place in the record."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.api.backbone import Stride
from harness.api.method import Source
from harness.compute.processes import SingleProcess
from harness.config.request import AS_USUAL, Execution
from harness.config.schema import Training
from harness.data.crops import CropDataset
from harness.system.console import say
from harness.system.files import digest, read_json, write_atomic
from harness.system.locks import held
from harness.training.loop import StageContext, train


@dataclass
class PreparationContext:
    """The engine's `harness.contracts.Preparation`.

    Attributes:
        identity: all that every discovery depends on: the method's source and version, the data, the seed.
        folder: where discoveries are kept.
        values: for the record.
        remembered: seconds that kept discoveries took when they were made, less those of reading them.
        how: how the stage is carried out, for the checkpoints of what is trained here.
    """

    seed: int
    device: torch.device
    crop: Stride
    template: Training
    identity: Any
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    remembered: float = 0.0
    how: Execution = AS_USUAL
    place: Path | None = None

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Stride, steps: int, batch_size: int, lr: float
    ) -> None:
        """Minimise the named terms of `module(batch)`, by the loop that pre-training uses, on this process alone."""
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
        place = self.place or self.folder
        place.mkdir(parents=True, exist_ok=True)
        alone: Any = SingleProcess(self.device)
        train(
            *(module, data, settings, steps, steps // 20, alone, place / "history.jsonl", "prepare"),
            seed=self.seed,
            carried=StageContext(how=self.how),
        )

    def remember(self, name: str, depends_on: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before for the same identity and `depends_on`."""
        path = self.folder / f"{name}-{digest([self.identity, self._computing, dict(depends_on)])[:16]}.json"
        with held(path, f"{name} of {path.name}"):
            began = time.perf_counter()
            kept = read_json(path)
            if isinstance(kept, dict) and {"seconds", "value"} <= set(kept):
                say(f"{name} found in {path}; it took {kept['seconds']:.1f} s")
                self.remembered += kept["seconds"] - (time.perf_counter() - began)
                return kept["value"]
            self.place = path.with_suffix("")
            # What is drawn afterwards must not depend on whether this was computed or found.
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                value = compute()
            write_atomic(path, json.dumps({"seconds": time.perf_counter() - began, "value": value}))
            shutil.rmtree(self.place, ignore_errors=True)
            self.place = None
            return json.loads(path.read_text())["value"]

    @property
    def _computing(self) -> list[Any]:
        """What `train` takes over from the run, beside the number of loader workers."""
        return [self.template.precision, self.template.channels_last, self.device.type]

    def report(self, message: str, **values: Any) -> None:
        """One line to the user, and `values` into the record."""
        say(message)
        self.values |= values
