"""Mutation testing: change one line in a copy of the tree, run the tests of that file, and see whether they notice.

Each file `mutants/FOLDER/NAME.toml` lists changes of the source `FOLDER/NAME.py`. A change is caught if pytest, run on
`tests/FOLDER/test_NAME.py` and `test_NAME_*.py` of the copy, ends with status 1 (a test failed). Every other end is a failure: an
import error shows a mutant that cannot run, not a test that noticed.

Importing torch and monai takes several seconds. A server therefore imports them once and forks a child for each run. It
imports nothing of this repository, so that each child reads the sources of the copy as they are then.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MUTANTS = Path(__file__).with_name("mutants")
PACKAGES = ("harness", "leaderboards", "methods", "backbones", "tasks", "tests")
SECONDS = 60.0  # for the tests of a mutant
CONTROL_SECONDS = 240.0  # for all fast tests of a file, which a mutant seldom needs
NOT_COPIED = (
    *(".git", ".venv", ".whl", ".*_cache", ".benchmarks", ".hypothesis"),
    *("__pycache__", "*.egg-info", "build", "dist", "reproduced"),
)
PYTEST = ("pytest", "pytest_benchmark.plugin", "pytest_timeout", "xdist.plugin", "hypothesis")
HEAVY = (
    *("torch", "torch._subclasses.fake_tensor", "torch.utils.flop_counter", "safetensors.torch", "accelerate"),
    *("monai.inferers", "monai.losses", "monai.metrics", "monai.networks.nets", "monai.transforms", "timm.optim"),
    *("numba", "scipy.ndimage", "scipy.stats", "pandas", "seaborn", "matplotlib.backends.backend_agg", "nibabel"),
    *("SimpleITK", "pydantic", "jinja2", "rich.live", "rich.table", "filelock"),
)
FROM_ELSEWHERE = 90  # the status of a child that imported one of PACKAGES from outside the copy


@dataclass(frozen=True)
class Mutant:
    """One change of one source file."""

    source: str  # path of the source inside the repository
    breaks: str  # what goes wrong, in plain words
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.source}: {self.breaks}"

    @property
    def tests(self) -> str:
        """The test file that must notice: `methods/x.py` -> `tests/methods/test_x.py`, with all `test_x_*.py` beside it."""
        path = Path(self.source)
        return (Path("tests") / path.parent / f"test_{path.name}").as_posix()

    def apply(self, text: str) -> str:
        """The changed source.

        Raises:
            ValueError: `old` does not occur exactly once, or nothing changes.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: `old` occurs {text.count(self.old)} times in the source, expected once")
        if self.new == self.old:
            raise ValueError(f"{self}: `new` is the same as `old`")
        return text.replace(self.old, self.new)


def read_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """All mutants of a folder of lists, in the order of the sources and of the lists. Raises ValueError for a broken list."""
    mutants = []
    for path in sorted(folder.rglob("*.toml")):
        source = path.relative_to(folder).with_suffix(".py").as_posix()
        try:
            mutants += [Mutant(source, **entry) for entry in tomllib.loads(path.read_text())["mutant"]]
        except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no list of mutants with `breaks`, `old` and `new`: {error}") from None
    return mutants


@dataclass(frozen=True)
class Ended:
    """How the tests of a file ended: pytest's status, None after a time-out, and what they printed."""

    status: int | None
    seconds: float
    output: str

    @property
    def says(self) -> str:
        """The end in words."""
        if self.status is None:
            return f"did not end within {self.seconds:.0f} s"
        meanings = {
            0: "all passed",
            1: "failed",
            2: "could not be imported",
            4: "could not be started",
            5: "hold no fast test",
            FROM_ELSEWHERE: "ran sources from outside the copy",
        }
        return meanings.get(self.status, f"ended with status {self.status}")


class Sandbox:
    """A copy of a tree, and a server that runs its tests. To be closed."""

    def __init__(self, folder: Path, root: Path = ROOT, heavy: Sequence[str] = HEAVY) -> None:
        self.folder, self.copy = folder, folder / "tree"
        shutil.copytree(root, self.copy, ignore=_not_copied(root))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {
            "PYTHONPATH": str(self.copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": str(folder / "numba"),
            "HARNESS_TEST_DATA": os.environ.get("HARNESS_TEST_DATA", str(root.parent / "shared" / "data")),
        }
        # -P: the folder of this file, which holds no package, stays out of sys.path.
        self.words, self.environment = [sys.executable, "-P", __file__, *heavy], environment
        self.server = self._start()

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.words, cwd=self.copy, env=self.environment, stdin=pipe, stdout=pipe, text=True, bufsize=1
        )

    def run(self, tests: str, seconds: float = SECONDS) -> Ended:
        """Run the fast tests of one file until the first one fails.

        Raises:
            RuntimeError: the server died, for instance of too little memory. The next call starts a new one.
        """
        if self.server.poll() is not None:
            self.server = self._start()
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        # Examples that hypothesis remembers from one mutant would be tried on the next.
        shutil.rmtree(self.copy / ".hypothesis", ignore_errors=True)
        output, begin = self.folder / "output", time.monotonic()
        output.write_text("")
        request = {"tests": tests, "seconds": seconds, "output": str(output), "temporary": str(self.folder / "tmp")}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of {tests} died with status {self.server.wait()}")
        status = json.loads(answer)
        return Ended(status, time.monotonic() - begin, output.read_text(errors="replace"))

    def run_mutant(self, mutant: Mutant, seconds: float = SECONDS) -> Ended:
        """Run the tests of the mutant's source with the mutant in place of it."""
        with self._changed(mutant):
            return self.run(mutant.tests, seconds)

    @contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        path = self.copy / mutant.source
        text, stamp = path.read_text(), path.stat()
        path.write_text(mutant.apply(text))  # with the time of now, so that numba compiles it anew
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def close(self) -> None:
        """End the server and what it runs."""
        self.server.terminate()
        self.server.communicate()


def _not_copied(root: Path) -> Any:
    """What is no source, and `runs/` of the root, which holds what a user trained."""
    usual = shutil.ignore_patterns(*NOT_COPIED)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return usual(folder, names) | ({"runs"} if Path(folder) == root else set())

    return ignored


def serve(heavy: Sequence[str]) -> None:
    """Import the heavy packages; then, for each request on stdin, fork a child that runs pytest and print its status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in (*PYTEST, *heavy):
        importlib.import_module(name)
    own = {name.split(".")[0] for name in sys.modules} & set(PACKAGES)
    assert not own, f"the server has imported {own}, so that children would not read the copy"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_tests(request)
        print(json.dumps(_wait(child, time.monotonic() + request["seconds"])), flush=True)


def _wait(child: int, end: float) -> int | None:
    """The exit status of a child, negative after a signal, or None if it must be killed at `end`."""
    try:
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        # Its process group goes with it: processes that its tests started.
        with suppress(ProcessLookupError, ChildProcessError):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _run_tests(request: dict[str, Any]) -> None:
    """In the child: run pytest on the copy, and end with its status."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream, path in ((0, os.devnull), (1, request["output"]), (2, request["output"])):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags), stream)
    status = 3
    try:
        import pytest

        temporary = f"--basetemp={request['temporary']}"
        file = Path(request["tests"])
        files = [str(path) for path in (file, *sorted(file.parent.glob(f"{file.stem}_*.py")))]
        status = int(pytest.main(["-x", "-p", "no:cacheprovider", temporary, *files]))
        copy = Path.cwd()
        for name, module in list(sys.modules.items()):
            origin = getattr(module, "__file__", None)
            if name.split(".")[0] in PACKAGES and origin and not Path(origin).is_relative_to(copy):
                print(f"{name} came from {origin}, not from {copy}")
                status = FROM_ELSEWHERE
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of the mutants at the end of the session: per source, how many were caught and how long it took."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            source = dict(report.user_properties).get("mutant of")
            if source is not None and report.when == "call":
                row = rows[source]
                row[0] += 1
                row[1] += outcome == "passed"
                row[2] += report.duration
    if not rows:
        return
    terminalreporter.section("mutants")
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    terminalreporter.line(f"{'source':40s} mutants  caught  missed  seconds")
    for source, (number, caught, seconds) in rows.items():
        terminalreporter.line(f"{source:40s} {number:7d} {caught:7d} {number - caught:7d} {seconds:8.0f}")


if __name__ == "__main__":
    serve(sys.argv[1:])
