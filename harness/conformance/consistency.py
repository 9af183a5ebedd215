"""Is a method's step the same however its batch is dealt out? One process against several, and against micro-batches."""

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
    """Two micro-batches against the whole batch."""
    try:
        parted = _step(fixture, SingleProcess(CPU, micro_batches=2))
    except UserError as error:
        return f"not possible: {error}"
    return _compare(_step(fixture, SingleProcess(CPU)), parted, "two micro-batches")


def check_resume(fixture: MethodFixture) -> str:
    """Four steps against two, a checkpoint, and two more by a module that is built anew."""
    whole = _train(fixture, range(1, 5), None)
    half = _train(fixture, range(1, 3), None)
    kept = Checkpoints(fixture.folder / "checkpoints", minutes=0)
    kept.save(2, half.state())
    (state,) = kept.candidates()
    kept.clear()
    resumed = _train(fixture, range(3, 5), state)
    pairs = zip(_flat(whole.state()).items(), _flat(resumed.state()).items(), strict=True)
    other = [
        key for (key, value), (_, again) in pairs if not torch.equal(torch.as_tensor(value), torch.as_tensor(again))
    ]
    if other:
        raise CheckError(
            f"a resumed training ends with another {other[0]}: keep what counts in parameters, in buffers or in "
            "get_extra_state, and let what prepare makes depend on the data and the seed only"
        )
    return "equal weights and optimizer"


def _train(fixture: MethodFixture, steps: range, state: dict[str, Any] | None) -> Trainer:
    built = fixture.new()
    own = {"precision": "fp32", "crop": built.crop, "batch_size": built.batch}
    trainer = Trainer(built.method, build(Training, {**BUDGET, **own}, "pretrain"), 4, 1, SingleProcess(CPU))
    if state is not None:
        trainer.load(state)
    data = built.data(4 * built.batch)
    for step in steps:
        batch = default_collate([data[(step - 1) * built.batch + row] for row in range(built.batch)])
        trainer.clock.start()
        trainer.step(step, [batch], built.method.after_step)
    return trainer


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Tensors and numbers of a nested state, by their places in it."""
    if isinstance(value, Mapping):
        return {k: v for name, each in value.items() for k, v in _flat(each, f"{key}.{name}").items()}
    if isinstance(value, list | tuple):
        return {k: v for place, each in enumerate(value) for k, v in _flat(each, f"{key}.{place}").items()}
    return {key: value} if isinstance(value, Tensor | int | float) else {}


def check_processes(number: int, name: str, plugins: Sequence[str], backbone: str, settings: Mapping[str, str]) -> str:
    """So many processes, through Accelerate with gloo on this machine, against one."""
    context = multiprocessing.get_context("forkserver")
    # The server imports torch and MONAI once, its forks then start at once; it runs nothing before they do.
    context.set_forkserver_preload(["harness.conformance.suite", "monai.networks.nets.swin_unetr"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (number, port, name, tuple(plugins), backbone, dict(settings), queue)
    ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(number)]
    for process in ranks:
        process.start()
    found, problem = "", "a process died before it answered"
    while any(process.is_alive() for process in ranks) or not queue.empty():
        try:
            found, problem = queue.get(timeout=1)
            break
        except Empty:
            continue
    for process in ranks:
        # After a failure the other ones may wait for it forever.
        process.join(timeout=1 if problem else 30)
        process.kill()
    if problem:
        raise CheckError(problem)
    return found


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
    torch.set_num_threads(1)
    found = problem = ""
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
                found = _compare(_step(fixture, SingleProcess(CPU)), together, f"{number} processes")
    except CheckError as error:
        problem = str(error)
    # Reported to the process that asked; a hung peer is killed there.
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if rank == 0 or problem:
        queue.put((found, problem))


def _same_weights(mine: Tensor) -> None:
    """Raises CheckError where processes end a step with other weights."""
    every = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    if not all(torch.equal(every[0], other) for other in every):
        raise CheckError("the processes end with other weights: do not change parameters outside forward")


def _step(fixture: MethodFixture, accelerator: Any) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """One step on a batch of four, in double precision: loss terms, gradients, and a sum of each weight after it."""
    built = fixture.new(batch=BATCH)
    torch.manual_seed(1)
    method = built.method.double()
    # Heads begin at 0 in some methods, which would hide what they are multiplied with.
    for parameter in method.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    own = {"precision": "fp32", "channels_last": False, "crop": built.crop, "batch_size": BATCH}
    trainer = Trainer(method, build(Training, {**BUDGET, **own}, "pretrain"), 30, 3, accelerator)
    data, parts = built.data(BATCH), trainer.parts
    size = BATCH // parts.number
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


def _compare(whole: Any, parted: Any, what: str) -> str:
    """How far losses and gradients are apart. Raises CheckError where that is too far."""
    apart = {key: abs(value - parted[0][key]) for key, value in whole[0].items()}
    worst = max(apart, key=lambda key: apart[key])
    if not apart[worst] <= TOLERANCE * max(1.0, abs(whole[0][worst])):
        raise CheckError(f"{worst} of {what} is {parted[0][worst]:.6g}, of one process {whole[0][worst]:.6g}: {ADVICE}")
    if set(whole[1]) != set(parted[1]):
        raise CheckError(f"{what} have gradients for other parameters than one process: {ADVICE}")
    largest = max(float(slope.abs().max()) for slope in whole[1].values())
    steps = {key: float((slope - parted[1][key]).abs().max()) for key, slope in whole[1].items()}
    at = max(steps, key=lambda key: steps[key])
    if not steps[at] <= TOLERANCE * largest:
        raise CheckError(
            f"the gradient of {at} is {steps[at] / largest:.2g} of the largest apart with {what}: {ADVICE}"
        )
    return f"losses within {max(apart.values()):.0e}, gradients within {steps[at] / largest:.0e}"
