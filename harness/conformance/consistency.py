"""Checks that a step gives the same result however its batch is divided: one process, several processes, micro-batches."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from harness.api.registry import Registry
from harness.api.settings import build
from harness.compute.devices import new_accelerator
from harness.compute.processes import SingleProcess
from harness.config.schema import Training
from harness.conformance.fixture import BUDGET, CheckError, MethodFixture
from harness.system.errors import UserError
from harness.training.checkpoints import Checkpoints
from harness.training.trainer import FINITE, Trainer

BATCH = 4
CPU = torch.device("cpu")
TOLERANCE = 1e-5
ADVICE = (
    "draw with harness.rand or harness.randn, let terms be means over crops, and what compares or counts crops go through "
    "harness.gather and harness.total"
)


def check_micro_batches(fixture: MethodFixture) -> str:
    """A step with two micro-batches equals a step with the whole batch."""
    try:
        parted = _step(fixture, SingleProcess(CPU, micro_batches=2))
    except UserError as error:
        return f"not possible: {error}"
    return _compare(_step(fixture, SingleProcess(CPU)), parted, "two micro-batches")


def check_resume(fixture: MethodFixture) -> str:
    """Four steps equal two steps, a checkpoint, and two steps of a module that is built anew from it."""
    whole = _train(fixture, range(1, 5), None)
    half = _train(fixture, range(1, 3), None)
    checkpoints = Checkpoints(fixture.folder / "checkpoints", minutes=0)
    checkpoints.save(2, half.state())
    (state,) = checkpoints.candidates()
    checkpoints.clear()
    resumed = _train(fixture, range(3, 5), state)
    pairs = zip(_flat(whole.state()).items(), _flat(resumed.state()).items(), strict=True)
    differing = [
        key
        for (key, value), (_, resumed_value) in pairs
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(resumed_value))
    ]
    if differing:
        raise CheckError(
            f"a resumed training ends with another {differing[0]}: keep what counts in parameters, in buffers or in "
            "get_extra_state, and let what prepare makes depend on the data and the seed only"
        )
    return "equal weights and optimizer"


def _train(fixture: MethodFixture, steps: range, state: dict[str, Any] | None) -> Trainer:
    """The trainer after these steps (from 1), begun from `state` where one is given."""
    built = fixture.new()
    settings = {"precision": "fp32", "crop": built.crop, "batch_size": built.batch}
    trainer = Trainer(built.method, build(Training, {**BUDGET, **settings}, "pretrain"), 4, 1, SingleProcess(CPU))
    if state is not None:
        trainer.load(state)
    data = built.data(4 * built.batch)
    for step in steps:
        batch = default_collate([data[(step - 1) * built.batch + row] for row in range(built.batch)])
        trainer.clock.start()
        trainer.step(step, [batch], built.method.after_step)
    return trainer


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Tensors and numbers of a nested state, by their path in it."""
    if isinstance(value, Mapping):
        return {path: leaf for name, item in value.items() for path, leaf in _flat(item, f"{key}.{name}").items()}
    if isinstance(value, list | tuple):
        return {path: leaf for index, item in enumerate(value) for path, leaf in _flat(item, f"{key}.{index}").items()}
    return {key: value} if isinstance(value, Tensor | int | float) else {}


def check_processes(number: int, name: str, plugins: Sequence[str], backbone: str, settings: Mapping[str, str]) -> str:
    """A step in `number` processes (Accelerate with gloo on this machine) equals a step in one process."""
    # Windows has no fork server; there each process imports everything anew.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # The fork server imports torch and MONAI once, so that its forks start at once; it runs nothing else before them.
        context.set_forkserver_preload(["harness.conformance.suite", "monai.networks.nets.swin_unetr"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (number, port, name, tuple(plugins), backbone, dict(settings), queue)
    ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(number)]
    for process in ranks:
        process.start()
    detail, problem = "", "a process died before it answered"
    while any(process.is_alive() for process in ranks) or not queue.empty():
        try:
            detail, problem = queue.get(timeout=1)
            break
        except Empty:
            continue
    for process in ranks:
        # After a failure the other processes may wait for the failed one without end.
        process.join(timeout=1 if problem else 30)
        process.kill()
    if problem:
        raise CheckError(problem)
    return detail


def _rank(
    rank: int,
    number: int,
    port: int,
    name: str,
    plugins: tuple[str, ...],
    backbone: str,
    settings: dict[str, str],
    queue: Any,
) -> None:
    """One of the processes: takes the step, and puts (detail, problem) into the queue. The first one compares."""
    torch.set_num_threads(1)
    detail = problem = ""
    try:
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": number,
            "RANK": rank,
            "LOCAL_RANK": rank,
        }
        os.environ.update(
            {key: str(value) for key, value in address.items()} | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        )
        registry = Registry(plugins)
        with tempfile.TemporaryDirectory() as folder:
            fixture = MethodFixture(
                registry.load("method", name), registry.load("backbone", backbone), Path(folder), settings
            )
            together = _step(fixture, new_accelerator())
            _same_weights(together[2])
            if rank == 0:
                detail = _compare(_step(fixture, SingleProcess(CPU)), together, f"{number} processes")
    except CheckError as error:
        problem = str(error)
    # The parent process reports it, and kills the processes that hang.
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if rank == 0 or problem:
        queue.put((detail, problem))


def _same_weights(sums: Tensor) -> None:
    """Raises CheckError where the processes end a step with different weights. `sums`: a sum of each weight."""
    gathered = [torch.zeros_like(sums) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, sums)
    if not all(torch.equal(gathered[0], sums_of_rank) for sums_of_rank in gathered):
        raise CheckError("the processes end with other weights: do not change parameters outside forward")


def _step(fixture: MethodFixture, accelerator: Any) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """One step on a batch of four crops in double precision.

    Returns:
        loss terms, gradients, and the sum of each weight after the step.
    """
    built = fixture.new(batch=BATCH)
    torch.manual_seed(1)
    method = built.method.double()
    # The heads of some methods start at 0, which would hide differences in what they are multiplied with.
    for parameter in method.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    settings = {"precision": "fp32", "channels_last": False, "crop": built.crop, "batch_size": BATCH}
    trainer = Trainer(method, build(Training, {**BUDGET, **settings}, "pretrain"), 30, 3, accelerator)
    data, parts = built.data(BATCH), trainer.parts
    size = BATCH // parts.num_parts
    batches = []
    for micro_batch in range(parts.micro_batches):
        first = (micro_batch * parts.processes + parts.rank) * size
        batch = default_collate([data[first + row] for row in range(size)])
        batches.append({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    trainer.clock.start()
    terms = trainer.step(1, batches, method.after_step)
    gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    sums = torch.stack([value.detach().sum() for value in method.parameters()])
    return {key: float(term) for key, term in terms.items() if key != FINITE}, gradients, sums


def _compare(whole: Any, parted: Any, mode: str) -> str:
    """How far losses and gradients differ, as text. Raises CheckError where they differ too much.

    Args:
        whole, parted: results of `_step` in one process, and in parts.
        mode: how `parted` was computed, in words.
    """
    loss_errors = {key: abs(value - parted[0][key]) for key, value in whole[0].items()}
    term = max(loss_errors, key=lambda key: loss_errors[key])
    if not loss_errors[term] <= TOLERANCE * max(1.0, abs(whole[0][term])):
        raise CheckError(f"{term} of {mode} is {parted[0][term]:.6g}, of one process {whole[0][term]:.6g}: {ADVICE}")
    if set(whole[1]) != set(parted[1]):
        raise CheckError(f"{mode} have gradients for other parameters than one process: {ADVICE}")
    largest = max(float(gradient.abs().max()) for gradient in whole[1].values())
    errors = {key: float((gradient - parted[1][key]).abs().max()) for key, gradient in whole[1].items()}
    parameter = max(errors, key=lambda key: errors[key])
    if not errors[parameter] <= TOLERANCE * largest:
        raise CheckError(
            f"the gradient of {parameter} is {errors[parameter] / largest:.2g} of the largest apart with {mode}: {ADVICE}"
        )
    return f"losses within {max(loss_errors.values()):.0e}, gradients within {errors[parameter] / largest:.0e}"
