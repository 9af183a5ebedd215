"""The command line in processes of its own, which start at once: a server imports torch and MONAI before it forks them."""

import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["harness.runs.execute", "harness.runs.plan", "monai.networks.nets.basic_unet"])


def run_words(method, settings, data, runs, *more) -> list:
    """The command of a run of a phantom's hippocampi."""
    given = [word for pair in settings for word in ("--set", pair)]
    return ["run", "--method", method, "--task", "msd_hippocampus", "--data", data, "--runs", runs, *given, *more]


def only_run(runs) -> Path:
    """The folder of the one finished run."""
    (record,) = runs.glob("*/record.json")
    return record.parent


def compute_alike() -> None:
    """Let this process compute in fp32 where a test does not ask for bf16, which is the default on processors with AMX.

    Numbers and tolerances of tests are those of fp32, whatever machine runs them.
    """
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def start(words, log: Path, **environment) -> multiprocessing.Process:
    """`harness WORDS`, both of its streams into `log`."""
    process = CONTEXT.Process(target=_go, args=([str(word) for word in words], str(log), environment))
    process.start()
    return process


def finish(process, timeout=240) -> int:
    """Its exit status, negative for a signal."""
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def _go(words, log, environment):
    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from harness.cli.main import main

    torch.set_num_threads(1)
    compute_alike()
    status = main(words)
    sys.stdout.flush()
    sys.exit(status)
